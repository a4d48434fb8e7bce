"""Which blocks a rule keeps, given their scores: what the rule is, and the launch that keeps them.

The scores lie in the memory of the lists (``probabilities.py``, ``strided.py``, ``row_scores.py``) or are normalised as
they are read (``key_scores.py``); ``keep.py`` says how a row becomes a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from .keep import Keeping, keep_rows
from .key_scores import RowSums
from .operands import PerHead
from .recorded import launch


@triton.jit
def _keep_kernel(
    counts, indices, sums, by, heads, group, q_len, k_len,
    PER_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, RULE: tl.constexpr,
    SINK: tl.constexpr, CAUSAL: tl.constexpr, LAST: tl.constexpr, TOUCHED_SINK: tl.constexpr,
):  # fmt: skip
    """One query block: ``keep_rows`` of it. With ``sums``, one of those that these are for."""
    pid = tl.program_id(0)
    if sums is None:
        nq = tl.cdiv(q_len, BLOCK_Q)
        i, head = pid % nq, tl.cast(pid // nq, tl.int64)
    else:
        i, head = sums.first + pid % sums.blocks, tl.cast(pid // sums.blocks, tl.int64)
    keep_rows(
        counts, indices, sums, by, i + tl.zeros([1, 1], tl.int32), head, heads, group, q_len, k_len,
        PER_Q, BLOCK_Q, BLOCK_K, NK, RULE, SINK, CAUSAL, LAST, TOUCHED_SINK,
    )  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Which blocks of a row are kept.

    Attributes:
        kind: "mass", "rank", "share", "peak" or "lines", see ``keep_rows``.
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
        aware, cuts: uint8 and int32 ``[B, Hq]``, see ``Keeping``.
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
    by = Keeping(
        PerHead.of(rule.level, device), facts.block_filled, facts.q_similarity, facts.k_similarity, sim, facts.columns,
        facts.diagonals, 0 if facts.diagonals is None else facts.diagonals.shape[-1], facts.aware, facts.cuts,
        rule.least, rule.most, rule.dense, facts.last_row, facts.documents, rule.touched_q, rule.touched_k,
        window if is_causal else None, rule.local, rule.tokens_local if rule.tokens else None,
    )  # fmt: skip
    launch(
        _keep_kernel, ((nq if sums is None else sums.blocks) * batch * heads,),
        counts, indices, sums, by, heads, heads // k_heads, q_len, k_len,
        PER_Q=per_q, BLOCK_Q=rule.block_q, BLOCK_K=rule.block_k, NK=width, RULE=rule.kind, SINK=int(rule.sink),
        CAUSAL=is_causal, LAST=rule.last_blocks, TOUCHED_SINK=int(rule.tokens_sink),
        num_warps=1 if width <= 512 else width // 512,
    )  # fmt: skip
    return BlockMask(counts, indices, rule.block_q, rule.block_k, q_len, k_len, trusted=True)
