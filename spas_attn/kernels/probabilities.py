"""How probable key blocks are for query blocks, from the means of sub-blocks, without holding fine scores.

One sweep over the key sub-blocks leaves the log-sum-exp of every row and key block in memory of the program's own,
which it reads back, mostly from the second cache, as soon as the sum of the row is known: a second sweep would cost as
much as the first. Keeping the blocks is left to a launch of its own (``select.py``): kept by these programs, few and
with many registers, they took 9 to 300 µs longer (docs/benchmarks/notes.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .arithmetic import dot
from .config import capability, shared_memory_limit
from .operands import PerHead, Side, of_head
from .prepare import LOG2E
from .recorded import launch
from .similarity import last_within, mixed

_CHUNK = 64  # key blocks that are normalised at a time
_MEMORY = 1 << 25  # bytes of log-sum-exps that a launch may hold: they should stay in the second cache


@triton.jit
def _bounds(
    rows, q_len, k_len, window, documents, p_filled,
    POOL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """First and last key sub-block that each query sub-block sees, last key block whose similarity it judges; [M]."""
    low = rows * 0
    high = low + tl.cdiv(k_len, POOL) - 1
    judged = low + tl.cdiv(k_len, BLOCK_K) - 1
    if CAUSAL:
        offset = k_len - q_len
        starts = rows * POOL
        last = tl.minimum(starts + POOL, q_len) - 1 + offset
        # A mean that reaches past the end of the query block would leak later tokens into its selection.
        end = tl.minimum((starts // BLOCK_Q + 1) * BLOCK_Q, q_len) + offset
        high = tl.minimum(tl.where(last < 0, -1, last // POOL), last_within(end, k_len, POOL))
        judged = last_within(end, k_len, BLOCK_K)
        if window is not None:
            low = tl.maximum(starts + offset - window + 1, 0) // POOL
    inside = rows < tl.cdiv(q_len, POOL)
    high = tl.where(inside, high, -1)
    if documents is not None:  # queries are the keys' own tokens there
        low = tl.maximum(low, tl.load(documents + rows * POOL // 128, mask=inside, other=0) // POOL)
        high = tl.where(tl.load(p_filled + rows, mask=inside, other=0) != 0, high, -1)
    return low, high, judged


@triton.jit
def _scores(
    q_high, q_low, p_k, p_filled, p_similarity, start, low, high, judged, threshold, lower, scale, fine_k,
    DPAD: tl.constexpr, N: tl.constexpr, PER_K: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] in base 2 of a tile of query rows with N key sub-blocks; -inf where a row does not see one.

    Row r sees the sub-blocks ``low[r]`` (0 where ``lower`` is None) to ``high[r]``, and judges the similarity of key
    blocks up to ``judged[r]``.
    """
    cols = start + tl.arange(0, N)
    p_means = p_k + cols[None, :] * (2 * DPAD) + tl.arange(0, DPAD)[:, None]  # [DPAD, N]
    inside = (cols < fine_k)[None, :]
    k_high = tl.load(p_means, mask=inside, other=0.0)
    k_low = tl.load(p_means + DPAD, mask=inside, other=0.0)
    scores = dot(q_high, k_high, None)
    scores = dot(q_high, k_low, scores)
    scores = dot(q_low, k_high, scores)
    seen = cols[None, :] <= high[:, None]
    if lower is not None:
        seen &= cols[None, :] >= low[:, None]
    if p_filled is not None:
        seen &= (tl.load(p_filled + cols, mask=cols < fine_k, other=0) != 0)[None, :]
    if p_similarity is not None:
        block = cols // PER_K  # [N]
        is_mixed = mixed(p_similarity + block, cols < fine_k, threshold)
        seen &= ~(is_mixed[None, :] & (block[None, :] <= judged[:, None]))
    return tl.where(seen, scores * scale, float("-inf"))


@triton.jit
def _sweep(
    p_q, p_k, p_filled, p_similarity, p_scratch, rows, begin, stop, low, high, judged, threshold, lower, scale, fine_q,
    fine_k, DPAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PER_K: tl.constexpr,
):  # fmt: skip
    """log2 of the exponentials of M rows summed over each key block, into ``p_scratch``; and over all, 0 for none."""
    q_high = tl.load(p_q, mask=(rows < fine_q)[:, None], other=0.0)  # [M, DPAD]
    q_low = tl.load(p_q + DPAD, mask=(rows < fine_q)[:, None], other=0.0)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(begin, stop, N):
        scores = _scores(
            q_high, q_low, p_k, p_filled, p_similarity, start, low, high, judged, threshold, lower, scale, fine_k,
            DPAD, N, PER_K,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        # A block that is nothing beside the largest score so far is nothing in the end.
        mass = tl.sum(tl.reshape(tl.exp2(scores - anchor[:, None]), [M, N // PER_K, PER_K]), 2)
        log_mass = tl.where(mass > 0, anchor[:, None] + tl.log2(mass), float("-inf"))
        log_mass = tl.where(mass >= 0, log_mass, float("inf"))  # scores that overflowed: such blocks are kept
        tl.store(p_scratch + (start // PER_K + tl.arange(0, N // PER_K))[None, :], log_mass)
        total = total * tl.exp2(peak - anchor) + tl.sum(mass, 1)
        peak = new_peak
    nonempty = total > 0
    return tl.where(nonempty, peak + tl.log2(tl.where(nonempty, total, 1.0)), 0.0), nonempty  # [M]


@triton.jit
def pooled_kernel(
    q_means, k_means, filled, k_similarity, sim_threshold, probs, scratch, tasks, heads, group, q_len, k_len, window,
    documents, scale, pitch,
    DPAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, POOL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Tile after tile of M sub-blocks of queries of one head; the programs share the tiles evenly.

    Args:
        q_means, k_means: bf16 [B, Hq, fine_q, 2, DPAD] and [B, Hkv, fine_k, 2, DPAD], each a sum of two numbers.
        filled: uint8 [B, fine_k], 0 for sub-blocks of padding; or None.
        k_similarity: float32 [B, Hkv, nk], or None; sim_threshold: PerHead.
        probs: [B, Hq, nq, nk]: to be written, the bits of float32 probabilities.
        scratch: float32 [programs, M, pitch].
        tasks: tiles of all heads.
        window: keys that a query sees under causality, or None.
        documents: int32, first row of the packed sequence of every 128 rows; or None.
        scale: factor on q·k, log2(e) included.
        M, N: query and key sub-blocks of a tile, whole blocks; CHUNK: key blocks.
    """
    PER_Q: tl.constexpr = BLOCK_Q // POOL
    PER_K: tl.constexpr = BLOCK_K // POOL
    R: tl.constexpr = M // PER_Q
    fine_q, fine_k = tl.cdiv(q_len, POOL), tl.cdiv(k_len, POOL)
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    tiles = tl.cdiv(fine_q, M)
    p_scratch = scratch + tl.cast(tl.program_id(0), tl.int64) * M * pitch + tl.arange(0, M)[:, None] * pitch
    lower = window if documents is None else documents
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        tile = task % tiles
        if CAUSAL:
            tile = tiles - 1 - tile  # the longest first
        head = tl.cast(task // tiles, tl.int64)
        b, h = head // heads, head % heads
        k_head = b * (heads // group) + h // group
        rows = tile * M + tl.arange(0, M)  # [M]
        p_q = q_means + (head * fine_q + rows)[:, None] * (2 * DPAD) + tl.arange(0, DPAD)[None, :]  # [M, DPAD]
        p_k = k_means + k_head * fine_k * (2 * DPAD)
        p_filled, p_similarity, threshold = None, None, 0.0
        if filled is not None:
            p_filled = filled + b * fine_k
        if k_similarity is not None:
            p_similarity, threshold = k_similarity + k_head * nk, of_head(sim_threshold, h)
        low, high, judged = _bounds(rows, q_len, k_len, window, documents, p_filled, POOL, BLOCK_Q, BLOCK_K, CAUSAL)
        begin, stop = 0, tl.max(high, 0) + 1
        if lower is not None:
            begin = tl.min(low, 0) // N * N
        log_sum, nonempty = _sweep(
            p_q, p_k, p_filled, p_similarity, p_scratch, rows, begin, stop, low, high, judged, threshold, lower, scale,
            fine_q, fine_k, DPAD, M, N, PER_K,
        )  # fmt: skip
        weight = 1.0 / tl.maximum(tl.sum(tl.reshape(nonempty.to(tl.float32), [R, PER_Q]), 1), 1.0)  # [R]
        tl.debug_barrier()  # what other threads stored is read now

        i = tile * R + tl.arange(0, R)
        p_probs = probs + (head * nq + i)[:, None] * nk
        # Every visible block of these rows gets a value, also those of which no sub-block is seen.
        last = nk
        if CAUSAL:
            last_row = tl.minimum(tl.minimum((tile + 1) * M, fine_q) * POOL, q_len) - 1
            last = tl.minimum(tl.maximum(last_row + k_len - q_len, -1) // BLOCK_K + 1, nk)
        written = (begin + tl.cdiv(tl.maximum(stop - begin, 0), N) * N) // PER_K
        for start in range(begin // PER_K, last, CHUNK):
            block = start + tl.arange(0, CHUNK)
            log_mass = tl.load(p_scratch + block[None, :], mask=(block < written)[None, :], other=float("-inf"))
            p = tl.sum(tl.reshape(tl.exp2(log_mass - log_sum[:, None]), [R, PER_Q, CHUNK]), 1) * weight[:, None]
            inside = (i < nq)[:, None] & (block < last)[None, :]
            tl.store(p_probs + block[None, :], p.to(tl.int32, bitcast=True), mask=inside)
        tl.debug_barrier()  # the next tile writes where this one was read


def _tiles(
    rows: int, dim: int, per_q: int, per_k: int, device: torch.device
) -> tuple[int, int, int, int, dict[str, int]]:
    """Rows, columns, warps, stages, other options, for so many rows in all and so many of them in a block.

    Measured on an H200 (docs/benchmarks/notes.md).
    """
    most = 64 if capability(device) >= (9, 0) else 32  # before Hopper the products' operands lie in registers
    m = max(per_q, min(most, 64 if rows >= 64 * 64 else 32 if rows >= 32 * 64 else 16))
    n = max(per_k, 32 if dim > 128 else 64 if dim > 64 else 128)
    stages = 2 if (m + 2 * n) * 4 * dim <= shared_memory_limit(device) - 2048 else 1
    options = {}
    if device.type == "cuda" and (m, n, dim) == (64, 64, 128) and rows > 64 * 2 * _processors(device):
        stages, options = 1, {"maxnreg": 168}  # three programs on a multiprocessor instead of two
    return m, n, 8 if m * n > 64 * 128 else 4, stages, options


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pooled_probabilities(
    q: Side,
    k: Side,
    probs: Tensor,
    q_len: int,
    k_len: int,
    *,
    pool: int,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    sim_threshold: float | Tensor | None = None,
    documents: Tensor | None = None,
) -> None:
    """Write the bits of float32 probabilities into ``probs``, int32 ``[B, Hq, nq, nk]``.

    Args:
        q: means of the queries; k: of the keys, with ``filled`` where the call has key padding, and with a
            ``sim_threshold`` with similarities.
        pool: tokens of a mean.
        documents: ``Call.document_start``; needs ``filled``, which serves both sides.
        others: as in ``Selector.select``.
    """
    means_q, means_k = q.means, k.means
    if means_q is None or means_k is None:
        raise ValueError("pooled_probabilities needs the means of both sides: prepare(..., pool_q=..., pool_k=...)")
    (batch, heads, fine_q, _, dim), device = means_q.shape, means_q.device
    per_k, nk = block_k // pool, cdiv(k_len, block_k)
    m, n, warps, stages, options = _tiles(batch * heads * fine_q, dim, block_q // pool, per_k, device)
    tasks, pitch = cdiv(fine_q, m) * batch * heads, cdiv(cdiv(k_len, pool), n) * (n // per_k)
    programs = min(tasks, max(_MEMORY // (4 * m * pitch), _processors(device)))
    launch(
        pooled_kernel, (programs,),
        means_q, means_k, k.filled, None if sim_threshold is None else k.similarity,
        PerHead.of(0.0 if sim_threshold is None else sim_threshold, device), probs,
        torch.empty(programs, m, pitch, dtype=torch.float32, device=device),
        tasks, heads, heads // means_k.shape[1], q_len, k_len, window if is_causal else None, documents, scale * LOG2E,
        pitch,
        DPAD=dim, M=m, N=n, CHUNK=min(_CHUNK, triton.next_power_of_2(nk)), POOL=pool, BLOCK_Q=block_q, BLOCK_K=block_k,
        CAUSAL=is_causal, num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
