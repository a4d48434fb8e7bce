"""From the means of sub-blocks to a list of kept key blocks, without sorting.

Two kernels. The first writes probabilities into the memory of the lists (``probabilities.py``). The second takes one
query block's row into registers, finds the probability from which on blocks are kept by bisection of its bits, and
writes the ascending list over the row. The result is that of the torch selectors, up to ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask, cdiv
from .config import capability, shared_memory_limit
from .operands import PerHead, of_head
from .prepare import LOG2E, Side
from .probabilities import last_within, probabilities_kernel
from .similarity import mixed


@triton.jit
def _near(
    block, i, first, q_len, k_len, local,
    SINK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Key blocks that a selector keeps whatever the scores say: sink, diagonal and local keys of query block ``i``."""
    near = block < 0
    if CAUSAL:
        start_q = i * BLOCK_Q + k_len - q_len
        near |= (block * BLOCK_K < start_q + BLOCK_Q) & (block * BLOCK_K + BLOCK_K > start_q - local)
    if SINK:
        near |= block == first
    return near


@triton.jit
def _threshold(bits, value, base, limit):
    """What is kept of one row by rank: the blocks before which, forced ones first, less than ``limit`` stands.

    Args:
        bits: float32 probabilities as integers, which order them alike; -1 for blocks that are no candidates.
        value: what a block adds to what stands before the next: its probability, or 1.
        base: what the forced blocks add.
    """
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


@triton.jit
def _visible(
    block, i, b, block_filled, q_len, k_len, nk, window,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Which blocks some query of block ``i`` sees, bool [NK], and the first that holds more than padding."""
    visible = block < nk
    first = 0
    if block_filled is not None:
        visible &= tl.load(block_filled + b * nk + block, mask=visible, other=0) != 0
        first = tl.min(tl.where(visible, block, NK), 0)
    if CAUSAL:
        offset = k_len - q_len
        visible &= block * BLOCK_K < tl.minimum((i + 1) * BLOCK_Q, q_len) + offset
        if window is not None:
            last_key = tl.minimum((block + 1) * BLOCK_K, k_len) - 1
            visible &= last_key > i * BLOCK_Q + offset - window
    return visible, first


@triton.jit
def _keep_kernel(
    counts, indices, block_filled, level, q_similarity, k_similarity, sim_threshold, touched_q, touched_k,
    heads, group, q_len, k_len, window, local, touched_local,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, BY_RANK: tl.constexpr, SINK: tl.constexpr,
    CAUSAL: tl.constexpr, TOUCHED_SINK: tl.constexpr,
):  # fmt: skip
    """One query block: from the probabilities in its row to the list of kept blocks in the same place.

    One function, because it is one row that it holds; everything is [NK], the key blocks of the row padded.

    Args:
        counts: int32 [B, Hq, nq], to be written; indices: int32 [B, Hq, nq, nk], both.
        block_filled: uint8 [B, nk], 0 for blocks of padding; or None.
        level: PerHead, cdf threshold or with BY_RANK the share of blocks to keep.
        q_similarity, k_similarity: float32 [B, Hq, nq] and [B, Hkv, nk]; sim_threshold: PerHead; or None.
        touched_q, touched_k: uint8 [nq] and [nk], 1 for blocks that a second selector keeps; or None.
        window, local, touched_local: tokens; None without a window or a second selector.
    """
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    pid = tl.program_id(0)
    i = pid % nq
    head = tl.cast(pid // nq, tl.int64)
    b, h = head // heads, head % heads
    block = tl.arange(0, NK)
    visible, first = _visible(block, i, b, block_filled, q_len, k_len, nk, window, BLOCK_Q, BLOCK_K, NK, CAUSAL)
    forced = _near(block, i, first, q_len, k_len, local, SINK, CAUSAL, BLOCK_Q, BLOCK_K)
    if k_similarity is not None:
        threshold = of_head(sim_threshold, h)
        k_head = b * (heads // group) + h // group
        is_mixed = mixed(k_similarity + k_head * nk + block, block < nk, threshold)
        if CAUSAL:
            end_q = tl.minimum((i + 1) * BLOCK_Q, q_len) + k_len - q_len
            is_mixed &= block <= last_within(end_q, k_len, BLOCK_K)
        forced |= is_mixed
    forced &= visible

    p_row = indices + (head * nq + i) * nk
    p = tl.load(p_row + block, mask=visible, other=0).to(tl.float32, bitcast=True)
    value, limit = p, of_head(level, h)
    if BY_RANK:
        value = tl.full([NK], 1.0, tl.float32)
        # Places of the ranking whose share of the visible blocks lies below the level.
        possible = tl.maximum(tl.sum(visible.to(tl.float32), 0), 1.0)
        share = tl.div_rn(block.to(tl.float32), tl.full([NK], 1.0, tl.float32) * possible)
        limit = tl.sum((share < limit).to(tl.float32), 0)
    candidate = visible & ~forced
    bits = tl.where(candidate, p.to(tl.int32, bitcast=True), -1)
    kept = _threshold(bits, value, tl.sum(tl.where(forced, value, 0.0), 0), limit) & candidate
    if not BY_RANK:
        kept = tl.where(limit >= 1.0, visible, kept)
    if q_similarity is not None:
        kept = tl.where(mixed(q_similarity + head * nq + i, True, threshold), visible, kept)
    kept = (kept | forced) & visible
    # With nothing forced and nothing within the level, the most probable block is kept.
    best = tl.min(tl.where(visible & (bits == tl.max(bits, 0)), block, NK), 0)
    best = tl.where(tl.max(kept.to(tl.int32), 0) == 0, best, NK)
    kept |= block == best
    if touched_local is not None:
        kept |= visible & _near(block, i, first, q_len, k_len, touched_local, TOUCHED_SINK, CAUSAL, BLOCK_Q, BLOCK_K)
        if touched_k is not None:
            kept |= visible & (tl.load(touched_k + block, mask=block < nk, other=0) != 0)
        if touched_q is not None:
            kept = tl.where(tl.load(touched_q + i) != 0, visible, kept)
    tl.debug_barrier()  # every thread has read its part of the row
    place = tl.cumsum(kept.to(tl.int32), 0)
    count = tl.sum(kept.to(tl.int32), 0)
    tl.store(p_row + place - 1, block, mask=kept)
    tl.store(p_row + block, tl.zeros([NK], tl.int32), mask=(block >= count) & (block < nk))
    tl.store(counts + head * nq + i, count)


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
) -> BlockMask:
    """Select blocks from prepared means.

    Args:
        q: means (and with a similarity filter similarities) of the queries; k: of the keys, with ``filled`` where the
            call has key padding.
        rule: what to keep.
        q_len, k_len: lengths in tokens.
        is_causal, scale, window: as in ``Selector.select``.
    """
    means_q, means_k = q.means, k.means
    if means_q is None or means_k is None:
        raise ValueError("select_blocks needs the means of both sides: prepare(..., pool=...)")
    (batch, heads, fine_q, _, dim), device = means_q.shape, means_q.device
    group = heads // means_k.shape[1]
    nq, nk = cdiv(q_len, rule.block_q), cdiv(k_len, rule.block_k)
    counts = torch.empty(batch, heads, nq, dtype=torch.int32, device=device)
    indices = torch.empty(batch, heads, nq, nk, dtype=torch.int32, device=device)
    sim = rule.sim_threshold
    q_similarity, k_similarity = (None, None) if sim is None else (q.similarity, k.similarity)
    sim_threshold = PerHead.of(0.0 if sim is None else sim, device)
    window = window if is_causal else None
    m, n, warps, stages = _tiles(batch * heads * fine_q, dim, rule, device)
    probabilities_kernel[(cdiv(fine_q, m) * batch * heads,)](
        means_q, means_k, k.filled, k_similarity, sim_threshold, indices, heads, group, q_len, k_len, window,
        scale * LOG2E,
        DPAD=dim, M=m, N=n, POOL=rule.pool, BLOCK_Q=rule.block_q, BLOCK_K=rule.block_k, CAUSAL=is_causal,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    width = max(32, triton.next_power_of_2(nk))
    _keep_kernel[(nq * batch * heads,)](
        counts, indices, k.block_filled, PerHead.of(rule.level, device), q_similarity, k_similarity, sim_threshold,
        rule.touched_q, rule.touched_k,
        heads, group, q_len, k_len, window, rule.local, rule.tokens_local if rule.tokens else None,
        BLOCK_Q=rule.block_q, BLOCK_K=rule.block_k, NK=width, BY_RANK=rule.by_rank, SINK=rule.sink, CAUSAL=is_causal,
        TOUCHED_SINK=rule.tokens_sink, num_warps=1 if width <= 512 else width // 512,
    )  # fmt: skip
    return BlockMask(counts, indices, rule.block_q, rule.block_k, q_len, k_len, trusted=True)
