"""From the scores of a query block to its list of kept key blocks, without sorting.

The scores, of ``probabilities.py``, ``strided.py`` or ``row_scores.py``, lie in the memory of the lists. A program
takes one query block's row into registers, finds the score from which on blocks are kept, where it must by bisection of
its bits, and writes the ascending list over the row. The result is that of the torch selectors, up to ties.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from .key_scores import RowSums, mean_probability
from .operands import PerHead, of_head
from .probabilities import last_within
from .recorded import launch
from .similarity import mixed


@triton.jit
def _near(
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
    block, i, b, block_filled, documents, q_len, k_len, nk, window,
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
    if documents is not None:
        start = tl.load(documents + i * BLOCK_Q // 128)
        visible &= block * BLOCK_K >= start
        first = start // BLOCK_K
    return visible, first


@triton.jit
def _line_levels(
    columns, diagonals, head, i, block, nk, sizes, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Levels [NK] of the blocks of a row: the lower of what their column has and of the lowest diagonal across them."""
    STEP: tl.constexpr = min(BLOCK_Q, BLOCK_K)
    level = tl.load(columns + head * nk + block, mask=block < nk, other=float("inf"))
    place = (i * BLOCK_Q + (nk - 1 - block) * BLOCK_K) // STEP
    return tl.minimum(level, tl.load(diagonals + head * sizes + place, mask=block < nk, other=float("inf")))


@triton.jit
def _within_rule(
    bits, p, visible, forced, block, limit, line, is_aware, cut, least, most, RULE: tl.constexpr, NK: tl.constexpr,
):  # fmt: skip
    """The candidates of a row that the rule keeps; see ``_keep_kernel``."""
    candidate = visible & ~forced
    one = tl.full([NK], 1.0, tl.float32)
    if RULE == "mass":
        kept = _threshold(bits, p, tl.sum(tl.where(forced, p, 0.0), 0), limit)
    elif RULE == "rank":
        # Places of the ranking whose share of the visible blocks lies below the level.
        possible = tl.maximum(tl.sum(visible.to(tl.float32), 0), 1.0)
        share = tl.div_rn(block.to(tl.float32), one * possible)
        places = tl.sum((share < limit).to(tl.float32), 0)
        kept = _threshold(bits, one, tl.sum(forced.to(tl.float32), 0), places)
    elif RULE == "share":
        kept = 1.0 - p < limit
    else:
        kept = line < limit
        if cut is not None:
            kept = tl.where(is_aware, bits >= cut, kept)
        if most is not None:
            kept &= _threshold(bits, one, tl.sum(forced.to(tl.float32), 0), most * 1.0)
        if least is not None:
            kept |= _threshold(bits, one, tl.sum(forced.to(tl.float32), 0), least * 1.0)
    kept &= candidate
    if RULE != "rank":
        kept = tl.where(limit >= 1.0, visible, kept)
    return kept


@triton.jit
def _keep_kernel(
    counts, indices, block_filled, level, q_similarity, k_similarity, sim_threshold, columns, diagonals, sizes, aware,
    cuts, least, most, dense, last_row, documents, touched_q, touched_k,
    sums, heads, group, q_len, k_len, window, local, touched_local,
    PER_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, RULE: tl.constexpr,
    SINK: tl.constexpr, CAUSAL: tl.constexpr, LAST: tl.constexpr, TOUCHED_SINK: tl.constexpr,
):  # fmt: skip
    """One query block: from the probabilities in its row to the list of kept blocks in the same place.

    One function, because it is one row that it holds; everything is [NK], the key blocks of the row padded.

    Args:
        counts: int32 [B, Hq, nq], to be written; indices: int32 [B, Hq, nq, nk], both.
        block_filled: uint8 [B, nk], 0 for blocks of padding; or None.
        level: PerHead, what the levels of kept blocks lie below.
        RULE: what the level of a block is: "mass", the probability that stands before it; "rank", the share of blocks
            before it; "share", 1 less its score over the row's largest, where the row holds log2 of the scores;
            "lines", the lower of that of its column and of the diagonals that cross it.
        q_similarity, k_similarity: float32 [B, Hq, nq] and [B, Hkv, nk]; sim_threshold: PerHead; or None.
        columns, diagonals: levels float32 [B, Hq, nk] and [B, Hq, sizes], see ``_line_levels``; or None.
        aware: uint8 [B, Hq], 1 for heads that keep by probability from ``cuts`` on, int32 [B, Hq]; or None.
        least, most: blocks of a row, in order of the level; or None.
        dense: uint8 [Hq], 1 for heads that keep everything; or None.
        LAST: query blocks that keep everything, up to that of the query ``last_row``, int32 [B], None for the last.
        documents: int32, first row of the packed sequence of every 128 rows (``Call.document_start``); or None.
        touched_q, touched_k: uint8 [nq] and [nk], 1 for blocks that a second selector keeps; or None.
        sums: RowSums of PER_Q rows a query block, for the query blocks of this launch: the probabilities are taken from
            these; or None.
        window, local, touched_local: tokens; None without a window or a second selector.
    """
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    pid = tl.program_id(0)
    if sums is None:
        i, head = pid % nq, tl.cast(pid // nq, tl.int64)
    else:
        i, head = sums.first + pid % sums.blocks, tl.cast(pid // sums.blocks, tl.int64)
    b, h = head // heads, head % heads
    block = tl.arange(0, NK)
    visible, first = _visible(
        block, i, b, block_filled, documents, q_len, k_len, nk, window, BLOCK_Q, BLOCK_K, NK, CAUSAL
    )
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
    if sums is None:
        p = tl.load(p_row + block, mask=visible, other=0).to(tl.float32, bitcast=True)
    else:
        p = mean_probability(sums, head, i, block, q_len, k_len, window, documents, PER_Q, BLOCK_Q, BLOCK_K, NK, CAUSAL)
    if RULE == "share":
        top = tl.max(tl.where(visible, p, float("-inf")), 0)
        p = tl.where(visible & (p > float("-inf")), tl.exp2(p - top), 0.0)
    limit, line, is_aware, cut = of_head(level, h), None, None, None
    if RULE == "lines":
        line = _line_levels(columns, diagonals, head, i, block, nk, sizes, BLOCK_Q, BLOCK_K)
        rank = tl.where(visible, tl.maximum(1.0 - tl.maximum(line, 0.0), 0.0), 0.0)
        if aware is None:
            p = rank
        else:
            is_aware, cut = tl.load(aware + head) != 0, tl.load(cuts + head)
            p = tl.where(is_aware, p, rank)
    bits = tl.where(visible & ~forced, p.to(tl.int32, bitcast=True), -1)
    kept = _within_rule(bits, p, visible, forced, block, limit, line, is_aware, cut, least, most, RULE, NK)
    if dense is not None:
        kept = tl.where(tl.load(dense + h) != 0, visible, kept)
    if LAST > 0:
        last = q_len - 1
        if last_row is not None:
            last = tl.load(last_row + b)
        kept = tl.where(i > last // BLOCK_Q - LAST, visible, kept)
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
    """Which blocks of a row are kept.

    Attributes:
        kind: "mass", "rank", "share" or "lines", see ``_keep_kernel``.
        level: what the levels of kept blocks lie below, a float or float32 ``[Hq]`` (or ``[1]``).
        block_q, block_k, local: as in the selector; sink: how many first blocks are forced.
        sim_threshold: of the similarity filter, like ``level``; None = off.
        last_blocks: query blocks at the end that keep everything.
        least, most: blocks of a row, of "lines"; None for no such bound.
        dense: uint8 ``[Hq]``, 1 for heads that keep everything; None for none.
        tokens: a second selector keeps its own sink and local keys, and every block of ``touched_q``, ``touched_k``
            (uint8 ``[nq]``, ``[nk]`` or None).
        tokens_sink, tokens_local: of the second selector.
    """

    kind: str
    level: float | Tensor
    block_q: int
    block_k: int
    sink: int
    local: int
    sim_threshold: float | Tensor | None = None
    last_blocks: int = 0
    least: int | None = None
    most: int | None = None
    dense: Tensor | None = None
    tokens: bool = False
    tokens_sink: bool = False
    tokens_local: int = 0
    touched_q: Tensor | None = None
    touched_k: Tensor | None = None


@dataclass(frozen=True)
class Facts:
    """What the rule looks at beside the scores; None for what it does not need.

    Attributes:
        block_filled: uint8 ``[B, nk]``, 0 for blocks of padding.
        q_similarity, k_similarity: float32 ``[B, Hq, nq]`` and ``[B, Hkv, nk]``.
        columns, diagonals: levels float32 ``[B, Hq, nk]`` and ``[B, Hq, places]``, see ``_line_levels``.
        aware, cuts: uint8 and int32 ``[B, Hq]``, see ``_keep_kernel``.
        last_row: int32 ``[B]``, index of the last query that is no padding.
        documents: int32, ``Call.document_start``.
    """

    block_filled: Tensor | None = None
    q_similarity: Tensor | None = None
    k_similarity: Tensor | None = None
    columns: Tensor | None = None
    diagonals: Tensor | None = None
    aware: Tensor | None = None
    cuts: Tensor | None = None
    last_row: Tensor | None = None
    documents: Tensor | None = None


def keep_blocks(
    indices: Tensor,
    rule: Rule,
    facts: Facts,
    q_len: int,
    k_len: int,
    k_heads: int,
    *,
    is_causal: bool,
    window: int | None = None,
    sums: RowSums | None = None,
    per_q: int = 1,
    counts: Tensor | None = None,
) -> BlockMask:
    """The kept blocks of every row.

    Args:
        indices: int32 ``[B, Hq, nq, nk]``, the bits of float32 scores; becomes the lists of the mask.
        rule, facts: what is kept, and what that depends on beside the scores.
        q_len, k_len, k_heads: lengths in tokens, KV heads.
        is_causal, window: as in ``Selector.select``.
        sums: scores of ``per_q`` rows a query block, for some of the query blocks; ``indices`` then holds none.
        counts: int32 ``[B, Hq, nq]``, of the query blocks that are kept already; a new one by default.
    """
    (batch, heads, nq, nk), device = indices.shape, indices.device
    counts = torch.empty(batch, heads, nq, dtype=torch.int32, device=device) if counts is None else counts
    width = max(32, triton.next_power_of_2(nk))
    sim = PerHead.of(0.0 if rule.sim_threshold is None else rule.sim_threshold, device)
    launch(
        _keep_kernel, ((nq if sums is None else sums.blocks) * batch * heads,),
        counts, indices, facts.block_filled, PerHead.of(rule.level, device), facts.q_similarity, facts.k_similarity,
        sim, facts.columns, facts.diagonals, 0 if facts.diagonals is None else facts.diagonals.shape[-1], facts.aware,
        facts.cuts, rule.least, rule.most, rule.dense, facts.last_row, facts.documents,
        rule.touched_q, rule.touched_k, sums,
        heads, heads // k_heads, q_len, k_len, window if is_causal else None, rule.local,
        rule.tokens_local if rule.tokens else None,
        PER_Q=per_q, BLOCK_Q=rule.block_q, BLOCK_K=rule.block_k, NK=width, RULE=rule.kind, SINK=int(rule.sink),
        CAUSAL=is_causal, LAST=rule.last_blocks, TOUCHED_SINK=int(rule.tokens_sink),
        num_warps=1 if width <= 512 else width // 512,
    )  # fmt: skip
    return BlockMask(counts, indices, rule.block_q, rule.block_k, q_len, k_len, trusted=True)
