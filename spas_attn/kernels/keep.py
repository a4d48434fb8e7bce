"""From the scores of query blocks to their lists of kept key blocks, without sorting, as a part of kernels.

The scores lie in the memory of the lists. A program takes the rows of some query blocks into registers, finds in each
the score from which on blocks are kept, where it must by bisection of its bits, and writes the ascending list over the
row. The result is that of the torch selectors, up to ties.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .key_scores import probability
from .operands import PerHead, of_head
from .similarity import last_within, mixed


class Keeping(NamedTuple):
    """What rows are kept by, as kernels take it; see ``Rule`` and ``Facts``.

    Attributes:
        level: PerHead, what the levels of kept blocks lie below.
        block_filled: uint8 [B, nk], 0 for blocks of padding; or None.
        q_similarity, k_similarity: float32 [B, Hq, nq] and [B, Hkv, nk]; sim_threshold: PerHead; or None.
        columns, diagonals: levels float32 [B, Hq, nk] and [B, Hq, sizes], see ``_line_levels``; or None.
        aware: uint8 [B, Hq], 1 for heads that keep by probability from ``cuts`` on, int32 [B, Hq]; or None.
        least, most: blocks of a row, in order of the level; or None.
        dense: uint8 [Hq], 1 for heads that keep everything; or None.
        last_row: int32 [B], of the last query block that may keep everything; None for that of the last query.
        documents: int32, first row of the packed sequence of every 128 rows (``Call.document_start``); or None.
        touched_q, touched_k: uint8 [nq] and [nk], 1 for blocks that a second selector keeps; or None.
        window, local, touched_local: tokens; None without a window or a second selector.
    """

    level: PerHead
    block_filled: Tensor | None
    q_similarity: Tensor | None
    k_similarity: Tensor | None
    sim_threshold: PerHead
    columns: Tensor | None
    diagonals: Tensor | None
    sizes: int
    aware: Tensor | None
    cuts: Tensor | None
    least: int | None
    most: int | None
    dense: Tensor | None
    last_row: Tensor | None
    documents: Tensor | None
    touched_q: Tensor | None
    touched_k: Tensor | None
    window: int | None
    local: int
    touched_local: int | None


@triton.jit
def _total(x):
    """Sums of rows, [R, 1]; of booleans, how many are true."""
    return tl.sum(x.to(tl.int32) if x.dtype == tl.int1 else x, 1, keep_dims=True)


@triton.jit
def near_blocks(
    block, i, first, q_len, k_len, local,
    SINK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Key blocks that a selector keeps whatever the scores say: SINK first ones, diagonal and local keys of ``i``."""
    near = (block >= first) & (block < first + SINK)
    if CAUSAL:
        start_q = i * BLOCK_Q + k_len - q_len
        near |= (block * BLOCK_K < start_q + BLOCK_Q) & (block * BLOCK_K + BLOCK_K > start_q - local)
    return near


@triton.jit
def _halve(bits, value, base, limit, least, most):
    """One step of the bisection in ``_threshold``."""
    middle = (least + most) // 2
    below_limit = base + _total(tl.where(bits > middle, value, 0.0)) < limit
    return tl.where(below_limit, least, middle + 1), tl.where(below_limit, middle, most)


@triton.jit
def _largest(x):
    """The largest of all, a scalar."""
    return tl.max(tl.max(x, 1), 0)


@triton.jit
def _threshold(bits, value, base, limit, lowest):
    """What is kept of rows by rank: the blocks before which, forced ones first, less than ``limit`` stands.

    Args:
        bits: float32 probabilities as integers, which order them alike; -1 for blocks that are no candidates; [R, NK].
        value: what a block adds to what stands before the next: its probability, or 1.
        base: what the forced blocks add, [R, 1].
        lowest: a probability, 0 or more, that the least one kept does not lie below, [R, 1].
    """
    # The least probability above which less than the limit stands: everything above it is kept, nothing below it. The
    # last steps tell apart what agrees in all but 13 bits; where that is one block at most they are left out.
    least = lowest.to(tl.int32, bitcast=True)
    # Probabilities are 1 at most: what is above 2 has overflowed and is kept.
    most = tl.maximum(tl.minimum(tl.max(bits, 1, keep_dims=True), 0x40000000), least)
    steps = tl.log2((_largest(most - least) + 1).to(tl.float32)).to(tl.int32) + 1
    coarse = tl.maximum(steps - 13, 0)
    for _ in range(coarse):
        least, most = _halve(bits, value, base, limit, least, most)
    several = _largest(_total((bits >= least) & (bits <= most))) > 1
    for _ in range(tl.where(several, steps - coarse, 0)):
        least, most = _halve(bits, value, base, limit, least, most)
    last = tl.max(tl.where((bits >= least) & (bits <= most), bits, -1), 1, keep_dims=True)
    most = tl.where(last >= 0, last, most)
    above = base + _total(tl.where(bits > most, value, 0.0))
    tie = bits == most
    kept = (bits > most) | (tie & (above < limit))
    if _largest(_total(tie)) > 1:
        earlier = (tl.cumsum(tie.to(tl.int32), 1) - tie.to(tl.int32)).to(tl.float32)
        kept = (bits > most) | (tie & (above + earlier * value < limit))
    return kept


@triton.jit
def visible_blocks(
    block, i, b, block_filled, documents, q_len, k_len, nk, window,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Which blocks some query of block ``i`` sees, bool [R, NK], and the first that holds more than padding."""
    inside = i * BLOCK_Q < q_len  # [R, 1]
    visible = (block < nk) & inside
    first = 0
    if block_filled is not None:
        visible &= tl.load(block_filled + b * nk + block, mask=block < nk, other=0) != 0
        first = tl.min(tl.where(visible, block, NK), 1, keep_dims=True)
    if CAUSAL:
        offset = k_len - q_len
        visible &= block * BLOCK_K < tl.minimum((i + 1) * BLOCK_Q, q_len) + offset
        if window is not None:
            last_key = tl.minimum((block + 1) * BLOCK_K, k_len) - 1
            visible &= last_key > i * BLOCK_Q + offset - window
    if documents is not None:
        start = tl.load(documents + i * BLOCK_Q // 128, mask=inside, other=0)
        visible &= block * BLOCK_K >= start
        first = start // BLOCK_K
    return visible, first


@triton.jit
def _line_levels(by, head, i, block, nk, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Levels [R, NK] of the blocks of a row: the lower of what their column has and of the lowest diagonal across."""
    STEP: tl.constexpr = min(BLOCK_Q, BLOCK_K)
    level = tl.load(by.columns + head * nk + block, mask=block < nk, other=float("inf"))
    place = (i * BLOCK_Q + (nk - 1 - block) * BLOCK_K) // STEP
    return tl.minimum(level, tl.load(by.diagonals + head * by.sizes + place, mask=block < nk, other=float("inf")))


@triton.jit
def _within_rule(bits, p, visible, forced, block, limit, line, is_aware, cut, by, RULE: tl.constexpr):
    """The candidates of rows that the rule keeps; see ``keep_rows``."""
    candidate = visible & ~forced
    one = tl.where(visible, 1.0, 1.0)
    none = _total(visible) * 0.0
    if RULE == "mass":
        # What is not above the least one kept, NK times that at most, is the rest of the mass.
        rest = _total(tl.where(visible, p, 0.0)) - limit - 1e-5
        kept = _threshold(bits, p, _total(tl.where(forced, p, 0.0)), limit, tl.maximum(rest, 0.0) / bits.shape[1])
    elif RULE == "rank":
        # Places of the ranking whose share of the visible blocks lies below the level.
        possible = tl.maximum(_total(visible).to(tl.float32), 1.0)
        share = tl.div_rn(block.to(tl.float32) * one, one * possible)
        places = _total(share < limit).to(tl.float32)
        kept = _threshold(bits, one, _total(forced).to(tl.float32), places, none)
    elif RULE == "share" or RULE == "peak":
        kept = 1.0 - p < limit
    else:
        kept = line < limit
        if cut is not None:
            kept = tl.where(is_aware, bits >= cut, kept)
        if by.most is not None:
            kept &= _threshold(bits, one, _total(forced).to(tl.float32), by.most * 1.0, none)
        if by.least is not None:
            kept |= _threshold(bits, one, _total(forced).to(tl.float32), by.least * 1.0, none)
    kept &= candidate
    if RULE != "rank":
        kept = tl.where(limit >= 1.0, visible, kept)
    return kept


@triton.jit
def keep_rows(
    counts, indices, sums, by, i, head, heads, group, q_len, k_len,
    PER_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, RULE: tl.constexpr,
    SINK: tl.constexpr, CAUSAL: tl.constexpr, LAST: tl.constexpr, TOUCHED_SINK: tl.constexpr,
):  # fmt: skip
    """Some query blocks of a head: from the probabilities in their rows to the lists of kept blocks in the same place.

    One function, because it is these rows that it holds; everything is [R, NK], the key blocks of a row padded.

    Args:
        counts: int32 [B, Hq, nq], to be written; indices: int32 [B, Hq, nq, nk], both.
        sums: RowSums of PER_Q rows a query block: the probabilities are taken from these (R is 1 then); or None.
        by: Keeping.
        i: numbers of the query blocks, [R, 1]; those behind the last one are left out.
        RULE: what the level of a block is: "mass", the probability that stands before it; "rank", the share of blocks
            before it; "share", 1 less its score over the row's largest, where the row holds log2 of the scores;
            "peak", 1 less its probability; "lines", the lower of that of its column and of the diagonals that cross it.
        LAST: query blocks that keep everything, up to that of the query ``by.last_row``.
    """
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    b, h = head // heads, head % heads
    inside = i < nq
    block = tl.arange(0, NK)[None, :]
    visible, first = visible_blocks(
        block, i, b, by.block_filled, by.documents, q_len, k_len, nk, by.window, BLOCK_Q, BLOCK_K, NK, CAUSAL
    )
    forced = near_blocks(block, i, first, q_len, k_len, by.local, SINK, CAUSAL, BLOCK_Q, BLOCK_K)
    if by.k_similarity is not None:
        threshold = of_head(by.sim_threshold, h)
        k_head = b * (heads // group) + h // group
        is_mixed = mixed(by.k_similarity + k_head * nk + block, block < nk, threshold)
        if CAUSAL:
            end_q = tl.minimum((i + 1) * BLOCK_Q, q_len) + k_len - q_len
            is_mixed = is_mixed & (block <= last_within(end_q, k_len, BLOCK_K))
        forced = forced | is_mixed
    forced = forced & visible

    p_row = indices + (head * nq + i) * nk  # [R, 1]
    if sums is None:
        p = tl.load(p_row + block, mask=visible, other=0).to(tl.float32, bitcast=True)
    else:
        only = tl.sum(tl.sum(i, 1), 0)
        p = probability(
            sums, head, only, block, q_len, k_len, by.window, by.documents, RULE == "peak", PER_Q, BLOCK_Q, BLOCK_K,
            NK, CAUSAL,
        )  # fmt: skip
    if RULE == "share":
        top = tl.max(tl.where(visible, p, float("-inf")), 1, keep_dims=True)
        p = tl.where(visible & (p > float("-inf")), tl.exp2(p - top), 0.0)
    limit, line, is_aware, cut = of_head(by.level, h), None, None, None
    if RULE == "lines":
        line = _line_levels(by, head, i, block, nk, BLOCK_Q, BLOCK_K)
        rank = tl.where(visible, tl.maximum(1.0 - tl.maximum(line, 0.0), 0.0), 0.0)
        if by.aware is None:
            p = rank
        else:
            is_aware, cut = tl.load(by.aware + head) != 0, tl.load(by.cuts + head)
            p = tl.where(is_aware, p, rank)
    bits = tl.where(visible & ~forced, p.to(tl.int32, bitcast=True), -1)
    kept = _within_rule(bits, p, visible, forced, block, limit, line, is_aware, cut, by, RULE)
    if by.dense is not None:
        kept = tl.where(tl.load(by.dense + h) != 0, visible, kept)
    if LAST > 0:
        last = q_len - 1
        if by.last_row is not None:
            last = tl.load(by.last_row + b)
        kept = tl.where(i > last // BLOCK_Q - LAST, visible, kept)
    if by.q_similarity is not None:
        kept = tl.where(mixed(by.q_similarity + head * nq + i, inside, threshold), visible, kept)
    kept = (kept | forced) & visible
    # With nothing forced and nothing within the level, the most probable block is kept.
    top = tl.max(bits, 1, keep_dims=True)
    best = tl.min(tl.where(visible & (bits == top), block, NK), 1, keep_dims=True)
    best = tl.where(_total(kept) == 0, best, NK)
    kept = kept | (block == best)
    if by.touched_local is not None:
        kept |= visible & near_blocks(
            block, i, first, q_len, k_len, by.touched_local, TOUCHED_SINK, CAUSAL, BLOCK_Q, BLOCK_K
        )
        if by.touched_k is not None:
            kept |= visible & (tl.load(by.touched_k + block, mask=block < nk, other=0) != 0)
        if by.touched_q is not None:
            kept = tl.where(tl.load(by.touched_q + i, mask=inside, other=0) != 0, visible, kept)
    tl.debug_barrier()  # every thread has read its part of the rows
    place = tl.cumsum(kept.to(tl.int32), 1)
    count = _total(kept)  # [R, 1]
    tl.store(p_row + place - 1, place * 0 + block, mask=kept)
    tl.store(p_row + block, place * 0, mask=(block >= count) & (block < nk) & inside)
    tl.store(counts + head * nq + i, count, mask=inside)
