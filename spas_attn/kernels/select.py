"""From the means of sub-blocks to a list of kept key blocks, without sorting and without holding fine scores.

Two kernels. The first goes over the key sub-blocks twice, once for the log-sum-exp of every row of sub-block scores and
once for the probabilities, which it sums per key block and averages over the rows of a query block. They go into the
memory of the index lists. The second takes one query block's row into registers, finds the probability from which on
blocks are kept by bisection of its bits, and writes the ascending list over the row.

The result is that of ``spas_attn.selectors.pooled``, up to ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask, cdiv
from .arithmetic import INTERPRETED, dot
from .config import capability, shared_memory_limit
from .prepare import LOG2E, Side


# fmt: off
@triton.jit
def _scores(
    q_high, q_low, k_means, filled, k_similarity, start, low, high, judged, threshold, scale, fine_k,
    DPAD: tl.constexpr, N: tl.constexpr, PER_K: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr,
    SIMILARITY: tl.constexpr, INTERPRET: tl.constexpr,
):
    """Scores in base 2 of a tile of query rows with N key sub-blocks; -inf where a row does not see one.

    Row r sees the sub-blocks ``low[r]`` to ``high[r]``, and may judge the similarity of key blocks up to ``judged[r]``.
    """
    # fmt: on
    cols = start + tl.arange(0, N)
    at = k_means + cols[None, :] * (2 * DPAD) + tl.arange(0, DPAD)[:, None]
    inside = (cols < fine_k)[None, :]
    k_high = tl.load(at, mask=inside, other=0.0)
    k_low = tl.load(at + DPAD, mask=inside, other=0.0)
    scores = dot(q_high, k_high, None, INTERPRET)
    scores = dot(q_high, k_low, scores, INTERPRET)
    scores = dot(q_low, k_high, scores, INTERPRET)
    seen = cols[None, :] <= high[:, None]
    if WINDOW:
        seen &= cols[None, :] >= low[:, None]
    if PADDING:
        seen &= (tl.load(filled + cols, mask=cols < fine_k, other=0) != 0)[None, :]
    if SIMILARITY:
        block = cols // PER_K
        mixed = tl.load(k_similarity + block, mask=cols < fine_k, other=1.0) < threshold
        seen &= ~(mixed[None, :] & (block[None, :] <= judged[:, None]))
    return tl.where(seen, scores * scale, float("-inf"))


@triton.jit
def _last_within(limit, length, SIZE: tl.constexpr):
    """Index of the last stretch of SIZE tokens that ends at ``limit`` or before; the ragged last one ends at length."""
    whole = tl.where(limit < 0, -1, limit // SIZE - 1)
    return tl.where(limit >= length, tl.cdiv(length, SIZE) - 1, whole)


# fmt: off
@triton.jit
def _bounds(
    rows, q_len, k_len, window,
    POOL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):
    """First and last key sub-block that each query sub-block sees, last key block whose similarity it judges."""
    # fmt: on
    low = rows * 0
    high = low + tl.cdiv(k_len, POOL) - 1
    judged = low + tl.cdiv(k_len, BLOCK_K) - 1
    if CAUSAL:
        offset = k_len - q_len
        starts = rows * POOL
        last = tl.minimum(starts + POOL, q_len) - 1 + offset
        # A mean that reaches past the end of the query block would leak later tokens into its selection.
        end = tl.minimum((starts // BLOCK_Q + 1) * BLOCK_Q, q_len) + offset
        high = tl.minimum(tl.where(last < 0, -1, last // POOL), _last_within(end, k_len, POOL))
        judged = _last_within(end, k_len, BLOCK_K)
        if WINDOW:
            low = tl.maximum(starts + offset - window + 1, 0) // POOL
    high = tl.where(rows < tl.cdiv(q_len, POOL), high, -1)
    return low, high, judged


# fmt: off
@triton.jit
def _probabilities_kernel(
    QMeans, KMeans, Filled, KSimilarity, SimThreshold, Probs,
    stride_threshold, heads, group, q_len, k_len, window, scale, sim_threshold,
    DPAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, POOL: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr,
    SIMILARITY: tl.constexpr, PER_HEAD: tl.constexpr, INTERPRET: tl.constexpr,
):
    """M rows of sub-block scores of one head: float32 probabilities of its query blocks, as bits, into Probs."""
    # fmt: on
    PER_Q: tl.constexpr = BLOCK_Q // POOL
    PER_K: tl.constexpr = BLOCK_K // POOL
    fine_q, fine_k = tl.cdiv(q_len, POOL), tl.cdiv(k_len, POOL)
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    tiles = tl.cdiv(fine_q, M)
    pid = tl.program_id(0)
    tile = pid % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    head = tl.cast(pid // tiles, tl.int64)
    b, h = head // heads, head % heads
    k_head = b * (heads // group) + h // group
    rows = tile * M + tl.arange(0, M)
    threshold = sim_threshold
    if SIMILARITY and PER_HEAD:
        threshold = tl.load(SimThreshold + h * stride_threshold)

    q_at = QMeans + (head * fine_q + rows)[:, None] * (2 * DPAD) + tl.arange(0, DPAD)[None, :]
    q_high = tl.load(q_at, mask=(rows < fine_q)[:, None], other=0.0)
    q_low = tl.load(q_at + DPAD, mask=(rows < fine_q)[:, None], other=0.0)
    k_means = KMeans + k_head * fine_k * (2 * DPAD)
    filled, k_similarity = Filled + b * fine_k, KSimilarity + k_head * nk

    low, high, judged = _bounds(rows, q_len, k_len, window, POOL, BLOCK_Q, BLOCK_K, CAUSAL, WINDOW)
    stop = tl.max(high, 0) + 1
    begin = 0
    if WINDOW:
        begin = tl.min(low, 0) // N * N

    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(begin, stop, N):
        scores = _scores(
            q_high, q_low, k_means, filled, k_similarity, start, low, high, judged, threshold, scale, fine_k,
            DPAD, N, PER_K, WINDOW, PADDING, SIMILARITY, INTERPRET,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(scores - anchor[:, None]), 1)
        peak = new_peak
    nonempty = total > 0
    log_sum = tl.where(nonempty, peak + tl.log2(tl.where(nonempty, total, 1.0)), 0.0)
    counted = tl.sum(tl.reshape(nonempty.to(tl.int32), [M // PER_Q, PER_Q]), 1)
    weight = 1.0 / tl.maximum(counted, 1).to(tl.float32)

    block_row = tile * (M // PER_Q) + tl.arange(0, M // PER_Q)
    to = Probs + (head * nq + block_row)[:, None] * nk + tl.arange(0, N // PER_K)[None, :]
    # Every visible block of these rows gets a value, also those of which no sub-block is seen.
    if CAUSAL:
        last_row = tl.minimum(tl.minimum((tile + 1) * M, fine_q) * POOL, q_len) - 1
        stop = tl.minimum(tl.maximum(last_row + k_len - q_len, -1) // BLOCK_K + 1, nk) * PER_K
    for start in range(begin, stop, N):
        scores = _scores(
            q_high, q_low, k_means, filled, k_similarity, start, low, high, judged, threshold, scale, fine_k,
            DPAD, N, PER_K, WINDOW, PADDING, SIMILARITY, INTERPRET,
        )  # fmt: skip
        p = tl.reshape(tl.exp2(scores - log_sum[:, None]), [M // PER_Q, PER_Q, N // PER_K, PER_K])
        p = tl.sum(tl.sum(p, 3), 1) * weight[:, None]
        first = start // PER_K
        inside = (block_row < nq)[:, None] & (first + tl.arange(0, N // PER_K) < nk)[None, :]
        tl.store(to + first, p.to(tl.int32, bitcast=True), mask=inside)


# fmt: off
@triton.jit
def _near(
    block, i, first, q_len, k_len, local,
    SINK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Key blocks that a selector keeps whatever the scores say: sink, diagonal and local keys of query block ``i``."""
    # fmt: on
    near = block < 0
    if CAUSAL:
        start_q = i * BLOCK_Q + k_len - q_len
        near |= (block * BLOCK_K < start_q + BLOCK_Q) & (block * BLOCK_K + BLOCK_K > start_q - local)
    if SINK:
        near |= block == first
    return near


# fmt: off
@triton.jit
def _threshold(bits, value, base, limit):
    """What is kept of one row by rank: the blocks before which, forced ones first, less than ``limit`` stands.

    Args:
        bits: float32 probabilities as integers, which order them alike; -1 for blocks that are no candidates.
        value: what a block adds to what stands before the next: its probability, or 1.
        base: what the forced blocks add.
    """
    # fmt: on
    # The least probability above which less than the limit stands: everything above it is kept, nothing below it.
    least, most = 0, 0x40000000  # 0.0 and 2.0
    for _ in range(31):
        middle = (least + most) // 2
        above = base + tl.sum(tl.where(bits > middle, value, 0.0), 0)
        below_limit = above < limit
        most = tl.where(below_limit, middle, most)
        least = tl.where(below_limit, least, middle + 1)
    above = base + tl.sum(tl.where(bits > most, value, 0.0), 0)
    tie = bits == most
    earlier = (tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)).to(tl.float32)
    return (bits > most) | (tie & (above + earlier * value < limit))


# fmt: off
@triton.jit
def _keep_kernel(
    Counts, Indices, BlockFilled, QSimilarity, KSimilarity, Level, SimThreshold, TouchedQ, TouchedK,
    stride_level, stride_threshold, heads, group, q_len, k_len, window, level, sim_threshold, local, tokens_local,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, RANK: tl.constexpr, SINK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, SIMILARITY: tl.constexpr,
    LEVEL_PER_HEAD: tl.constexpr, SIM_PER_HEAD: tl.constexpr,
    TOKENS: tl.constexpr, TOKENS_SINK: tl.constexpr, TOUCH_Q: tl.constexpr, TOUCH_K: tl.constexpr,
):
    """One query block: from the probabilities in its row of Indices to the list of kept blocks in the same place."""
    # fmt: on
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    pid = tl.program_id(0)
    i = pid % nq
    head = tl.cast(pid // nq, tl.int64)
    b, h = head // heads, head % heads
    k_head = b * (heads // group) + h // group
    block = tl.arange(0, NK)
    visible = block < nk
    first = 0
    if PADDING:
        visible &= tl.load(BlockFilled + b * nk + block, mask=visible, other=0) != 0
        first = tl.min(tl.where(visible, block, NK), 0)
    end_q = tl.minimum((i + 1) * BLOCK_Q, q_len) + k_len - q_len
    if CAUSAL:
        visible &= block * BLOCK_K < end_q
        if WINDOW:
            last_key = tl.minimum((block + 1) * BLOCK_K, k_len) - 1
            visible &= last_key > i * BLOCK_Q + k_len - q_len - window
    forced = _near(block, i, first, q_len, k_len, local, SINK, CAUSAL, BLOCK_Q, BLOCK_K)
    if SIMILARITY:
        if SIM_PER_HEAD:
            sim_threshold = tl.load(SimThreshold + h * stride_threshold)
        mixed = tl.load(KSimilarity + k_head * nk + block, mask=block < nk, other=1.0) < sim_threshold
        if CAUSAL:
            mixed &= block <= _last_within(end_q, k_len, BLOCK_K)
        forced |= mixed
    forced &= visible
    if LEVEL_PER_HEAD:
        level = tl.load(Level + h * stride_level)

    row = Indices + (head * nq + i) * nk
    p = tl.load(row + block, mask=visible, other=0).to(tl.float32, bitcast=True)
    value = p
    limit = level
    if RANK:
        value = tl.full([NK], 1.0, tl.float32)
        # Places of the ranking whose share of the visible blocks lies below the level.
        possible = tl.maximum(tl.sum(visible.to(tl.float32), 0), 1.0)
        share = tl.div_rn(block.to(tl.float32), tl.full([NK], 1.0, tl.float32) * possible)
        limit = tl.sum((share < level).to(tl.float32), 0)
    candidate = visible & ~forced
    bits = tl.where(candidate, p.to(tl.int32, bitcast=True), -1)
    kept = _threshold(bits, value, tl.sum(tl.where(forced, value, 0.0), 0), limit) & candidate
    if not RANK:
        kept = tl.where(level >= 1.0, visible, kept)
    if SIMILARITY:  # a query block that is not self-similar keeps everything
        kept = tl.where(tl.load(QSimilarity + head * nq + i) < sim_threshold, visible, kept)
    kept = (kept | forced) & visible
    # With nothing forced and nothing within the level, the most probable block is kept.
    best = tl.min(tl.where(visible & (bits == tl.max(bits, 0)), block, NK), 0)
    best = tl.where(tl.max(kept.to(tl.int32), 0) == 0, best, NK)
    kept |= block == best
    if TOKENS:
        kept |= _near(block, i, first, q_len, k_len, tokens_local, TOKENS_SINK, CAUSAL, BLOCK_Q, BLOCK_K) & visible
        if TOUCH_K:
            kept |= (tl.load(TouchedK + block, mask=block < nk, other=0) != 0) & visible
        if TOUCH_Q:
            kept = tl.where(tl.load(TouchedQ + i) != 0, visible, kept)
    tl.debug_barrier()  # every thread has read its part of the row
    place = tl.cumsum(kept.to(tl.int32), 0)
    count = tl.sum(kept.to(tl.int32), 0)
    tl.store(row + place - 1, block, mask=kept)
    tl.store(row + block, tl.zeros([NK], tl.int32), mask=(block >= count) & (block < nk))
    tl.store(Counts + head * nq + i, count)


@dataclass(frozen=True)
class Rule:
    """What the kernels need to know of a selector.

    Attributes:
        level: cdf threshold, or with ``by_rank`` the share of blocks to keep; a float or float32 ``[Hq]`` (or ``[1]``).
        sim_threshold: the same for the similarity filter; None = off.
        by_rank: TopK.
        pool, block_q, block_k, sink, local: as in the selector.
        tokens: a second selector keeps its own sink and local keys, and every block of ``touched_q``, ``touched_k``
            (uint8 ``[nq]``, ``[nk]`` or None).
        tokens_sink, tokens_local: of the second selector.
    """

    level: float | Tensor
    sim_threshold: float | Tensor | None
    by_rank: bool
    pool: int
    block_q: int
    block_k: int
    sink: bool
    local: int
    tokens: bool = False
    tokens_sink: bool = False
    tokens_local: int = 0
    touched_q: Tensor | None = None
    touched_k: Tensor | None = None


def _tiles(programs: int, dim: int, rule: Rule, device: torch.device) -> tuple[int, int, int, int]:
    """Rows, columns, warps and stages of the scores kernel; ``programs``: rows of sub-block scores in all."""
    most = 64 if capability(device) >= (9, 0) else 32  # before Hopper the products' operands lie in registers
    m = max(rule.block_q // rule.pool, min(most, 64 if programs >= 64 * 256 else 32 if programs >= 32 * 256 else 16))
    n = max(rule.block_k // rule.pool, 32 if dim > 128 else 64 if dim > 64 else 128)
    stages = 2 if (m + 2 * n) * 4 * dim <= shared_memory_limit(device) - 2048 else 1
    return m, n, 8 if m * n > 64 * 128 else 4, stages


def _pointer(value: float | Tensor | None, other: Tensor) -> tuple[Tensor, int, float]:
    """(tensor, stride, number) of a threshold: a float goes by value, without a copy to the device."""
    if isinstance(value, Tensor):
        value = value.to(other.device, torch.float32)
        return value, value.stride(0) if value.dim() and value.shape[0] > 1 else 0, 0.0
    return other, 0, float(value or 0.0)


def select_blocks(
    q: Side,
    k: Side,
    rule: Rule,
    q_len: int,
    k_len: int,
    *,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    config: tuple[int, int, int, int] | None = None,
) -> BlockMask:
    """Select blocks from prepared means.

    Args:
        q: means (and with a similarity filter similarities) of the queries; k: of the keys, with ``filled`` where the
            call has key padding.
        rule: what to keep.
        q_len, k_len: lengths in tokens.
        is_causal, scale, window: as in ``Selector.select``.
        config: rows, columns, warps and stages of the scores kernel; chosen by size by default.
    """
    means_q, means_k = q.means, k.means
    if means_q is None or means_k is None:
        raise ValueError("select_blocks needs the means of both sides: prepare(..., pool=...)")
    batch, heads, fine_q, _, dim = means_q.shape
    group = heads // means_k.shape[1]
    nq, nk = cdiv(q_len, rule.block_q), cdiv(k_len, rule.block_k)
    counts = torch.empty(batch, heads, nq, dtype=torch.int32, device=means_q.device)
    indices = torch.empty(batch, heads, nq, nk, dtype=torch.int32, device=means_q.device)
    padding, by_similarity = k.filled is not None, rule.sim_threshold is not None
    sim, stride_sim, sim_number = _pointer(rule.sim_threshold, counts)
    level, stride_level, level_number = _pointer(rule.level, counts)
    m, n, warps, stages = config or _tiles(batch * heads * fine_q, dim, rule, means_q.device)
    windowed = is_causal and window is not None
    # fmt: off
    _probabilities_kernel[(cdiv(fine_q, m) * batch * heads,)](
        means_q, means_k, k.filled if padding else counts, k.similarity if by_similarity else counts, sim, indices,
        stride_sim, heads, group, q_len, k_len, window or 0, scale * LOG2E, sim_number,
        DPAD=dim, M=m, N=n, POOL=rule.pool, BLOCK_Q=rule.block_q, BLOCK_K=rule.block_k, CAUSAL=is_causal,
        WINDOW=windowed, PADDING=padding, SIMILARITY=by_similarity, PER_HEAD=sim is not counts,
        INTERPRET=INTERPRETED, num_warps=warps, num_stages=stages,
    )
    width = max(32, triton.next_power_of_2(nk))
    _keep_kernel[(nq * batch * heads,)](
        counts, indices, k.block_filled if padding else counts,
        *((q.similarity, k.similarity) if by_similarity else (counts, counts)), level, sim,
        counts if rule.touched_q is None else rule.touched_q, counts if rule.touched_k is None else rule.touched_k,
        stride_level, stride_sim, heads, group, q_len, k_len, window or 0, level_number, sim_number,
        rule.local, rule.tokens_local,
        BLOCK_Q=rule.block_q, BLOCK_K=rule.block_k, NK=width, RANK=rule.by_rank, SINK=rule.sink, CAUSAL=is_causal,
        WINDOW=windowed, PADDING=padding, SIMILARITY=by_similarity,
        LEVEL_PER_HEAD=level is not counts, SIM_PER_HEAD=sim is not counts,
        TOKENS=rule.tokens, TOKENS_SINK=rule.tokens_sink, TOUCH_Q=rule.touched_q is not None,
        TOUCH_K=rule.touched_k is not None, num_warps=1 if width <= 512 else width // 512,
    )
    # fmt: on
    return BlockMask(counts, indices, rule.block_q, rule.block_k, q_len, k_len, trusted=True)
