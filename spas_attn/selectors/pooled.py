"""Pooled scores: how much softmax mass each query block is expected to put on each key block.

Shared by the selectors that rank blocks (MeanSimilarity, TopK) and by the calibration, which needs the selection of
every threshold at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import cdiv
from .base import Inputs, Selector, blockwise

_FINE_SCORES = 1 << 26  # fine scores held at a time; bounds the memory of long sequences


@dataclass(frozen=True)
class Pooled:
    """What one call's selection is made from; thresholds are applied afterwards.

    Attributes:
        rows: float32 ``[B, Hq, nq, rows, nk]``: per row of sub-block scores, the log of the exponentials summed in
            each key block (-inf where nothing is visible). Logs, because a threshold may leave out the blocks that
            hold a row's maximum; sums relative to it would be rounded to nothing.
        q_similarity: ``[B, Hq, nq]``, k_similarity: ``[B, Hq, nk]``: mean pairwise cosine of the rows of a block.
        visible, forced: bool, broadcastable to ``[B, Hq, nq, nk]``.
        filterable: bool ``[nq, nk]``: key blocks whose similarity may be judged for this query block (under
            causality, blocks that end after the query block are not judged: their later tokens are unknown to it).
    """

    rows: Tensor
    q_similarity: Tensor
    k_similarity: Tensor
    visible: Tensor
    forced: Tensor
    filterable: Tensor

    def _prepare(self, sim_threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row probabilities ``[B, Hq, nq, rows, nk]`` under a similarity threshold, forced blocks, dense query rows."""
        threshold = sim_threshold.view(1, -1, 1)
        left_out = (self.k_similarity < threshold)[:, :, None, :] & self.filterable  # not self-similar key blocks
        rows = self.rows.masked_fill(left_out[:, :, :, None], -torch.inf)
        empty = (rows == -torch.inf).all(-1, keepdim=True)
        probs = rows.masked_fill_(empty, 0.0).softmax(-1).masked_fill_(empty, 0.0)
        return probs, (self.forced | left_out) & self.visible, (self.q_similarity < threshold)[..., None]

    def levels(self, sim_threshold: Tensor, *, by: str = "mass") -> Tensor:
        """The threshold from which on each block is kept: block kept ⇔ level < threshold.

        A block's level is, by the rule ``by``:
          "mass": the probability that stands before it when blocks are ranked by probability, forced ones first; so
            the block that crosses a cdf threshold is kept;
          "rank": the share of visible blocks that stands before it in the same ranking;
          "peak": 1 - the largest probability that any row of sub-block scores gives it.
        Forced blocks, the most probable one, and all blocks of query blocks that are not self-similar have level -1;
        invisible blocks have +inf.

        Args:
            sim_threshold: float32 ``[Hq]``; negative values switch the filter off.

        Returns:
            float32 ``[B, Hq, nq, nk]``.
        """
        rows, forced, dense_rows = self._prepare(sim_threshold)
        probs = rows.sum(-2) / (rows.sum(-1) > 0).sum(-1, keepdim=True).clamp(min=1)
        # Rank: forced (probability + 2), then by falling probability, invisible blocks last.
        key = (probs + 2.0 * forced).masked_fill(~self.visible, -1.0)
        key, order = torch.sort(key, dim=-1, descending=True, stable=True)
        position = torch.arange(key.shape[-1], device=key.device)
        if by == "mass":
            ranked = probs.gather(-1, order)
            level = (ranked.cumsum(-1) - ranked).clamp(min=0.0)
        elif by == "rank":
            visible = self.visible.sum(-1, keepdim=True).clamp(min=1)
            level = (position / visible).expand_as(key)
        else:
            level = (1.0 - rows.amax(-2)).clamp(min=0.0).gather(-1, order)
        level = level.masked_fill((position == 0) | (key >= 2.0), -1.0)
        level = torch.empty_like(level).scatter_(-1, order, level)
        return level.masked_fill(dense_rows, -1.0).masked_fill(~self.visible, torch.inf)


def pool(selector: Selector, inputs: Inputs, length: int, *, variance: bool = False) -> Pooled:
    """Score the means of sub-blocks of ``length`` tokens and sum them per block.

    With ``length`` equal to the block size these are the block means of SpargeAttn (arXiv 2502.18137); shorter
    sub-blocks see more of the structure inside a block (the idea of the strided scores of XAttention, arXiv
    2503.16428), at (1/length)² of the cost of QKᵀ. Everything is computed in float32.

    With ``variance`` a sub-block's score is log E exp(q·k) to second order, q·mean(k) + ½ Var(q·k), with the variance
    of the keys taken per channel: a mean alone underrates sub-blocks in which one key stands out.
    """
    with torch.autocast(inputs.q.device.type, enabled=False):  # selection is float32 wherever it runs
        return _pool(selector, inputs, length, variance)


def _pool(selector: Selector, inputs: Inputs, length: int, variance: bool) -> Pooled:
    q, k = inputs.q, inputs.k
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    length_q, length_k = min(length, selector.block_q), min(length, selector.block_k)
    key_mask = inputs.key_mask
    if not inputs.is_causal:
        # Smoothing (subtracting the mean key) leaves the softmax as it is and makes similarities tell more. Under
        # causality it is left out: the mean would carry later tokens into earlier blocks.
        k = k - _masked_mean(k, key_mask)
    visible = selector.visible(inputs)
    nq, nk = visible.shape[-2:]
    fine_q, _ = _means(q, length_q, None)
    fine_k, filled = _means(k, length_k, key_mask)
    if variance:
        squares, _ = _means(k.float().square(), length_k, key_mask)
        spread = (squares - fine_k.square()).clamp(min=0)
        fine_k = torch.cat([fine_k, 0.5 * inputs.scale * spread], -1)
        fine_q = torch.cat([fine_q, fine_q.square()], -1)
    per_block = selector.block_q // length_q
    rows = q.new_full((batch, heads, nq * per_block, nk), -torch.inf, dtype=torch.float32)
    chunk = max(1, _FINE_SCORES // (batch * heads * fine_k.shape[2]))
    for start in range(0, fine_q.shape[2], chunk):
        part = fine_q[:, :, start : start + chunk]
        count = part.shape[2]
        scores = part.reshape(batch, -1, group * count, part.shape[-1]) @ fine_k.transpose(-1, -2)
        scores = scores.view(batch, heads, count, -1) * inputs.scale
        seen = _fine_visible(selector, inputs, length_q, length_k, start, count)
        if filled is not None:
            seen = seen & filled[:, None, None]
        scores = scores.masked_fill_(~seen, -torch.inf)
        scores = blockwise(scores, selector.block_k // length_k, value=-torch.inf)
        rows[:, :, start : start + count] = scores.logsumexp(-1)
    return Pooled(
        rows.unflatten(2, (nq, per_block)),
        _self_similarity(q, selector.block_q, None),
        _self_similarity(k, selector.block_k, key_mask).repeat_interleave(group, 1),
        visible,
        selector.forced(inputs, visible),
        _ends_before(selector, inputs, nq, nk),
    )


def _fine_visible(selector: Selector, inputs: Inputs, length_q: int, length_k: int, start: int, count: int) -> Tensor:
    """Which key sub-blocks the query sub-blocks ``start`` … see, bool ``[count, fine nk]``."""
    q_len, k_len, offset = inputs.q.shape[2], inputs.k.shape[2], inputs.offset
    device = inputs.q.device
    starts_k = torch.arange(cdiv(k_len, length_k), device=device) * length_k
    if not inputs.is_causal:
        return torch.ones(count, len(starts_k), dtype=torch.bool, device=device)
    starts_q = (torch.arange(count, device=device) + start)[:, None] * length_q
    last_q = (starts_q + length_q).clamp(max=q_len) - 1
    block_end = ((starts_q // selector.block_q + 1) * selector.block_q).clamp(max=q_len) + offset
    ends_k = (starts_k + length_k).clamp(max=k_len)
    # A mean that reaches past the end of the query block would leak later tokens into its selection.
    seen = (starts_k <= last_q + offset) & (ends_k <= block_end)
    if inputs.window is not None:
        seen = seen & (ends_k > starts_q + offset - inputs.window + 1)
    return seen


def _ends_before(selector: Selector, inputs: Inputs, nq: int, nk: int) -> Tensor:
    """Key blocks that end no later than the query block does, bool ``[nq, nk]`` (all of them without causality)."""
    device = inputs.q.device
    if not inputs.is_causal:
        return torch.ones(nq, nk, dtype=torch.bool, device=device)
    ends_q = ((torch.arange(nq, device=device)[:, None] + 1) * selector.block_q).clamp(max=inputs.q.shape[2])
    ends_k = ((torch.arange(nk, device=device) + 1) * selector.block_k).clamp(max=inputs.k.shape[2])
    return ends_k <= ends_q + inputs.offset


def _masked_mean(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens, float32 ``[B, H, 1, D]``."""
    if key_mask is None:
        return x.mean(2, keepdim=True, dtype=torch.float32)
    weight = key_mask[:, None, :, None].float()
    return (x.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)


def _means(x: Tensor, block: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mean of the valid rows of every (sub-)block, float32 ``[B, H, n, D]``, and which blocks have a valid row.

    A ragged last block averages over its own rows only.
    """
    sums, counts, filled = _block_sums(x, block, key_mask)
    return sums / counts.clamp(min=1), filled


def _block_sums(x: Tensor, block: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    length = x.shape[2]
    if key_mask is None:
        counts = (length - torch.arange(0, length, block, device=x.device)).clamp(max=block)
        return _row_sums(x.float(), block), counts[:, None].float(), None
    weight = key_mask[:, None, :, None]
    counts = blockwise(key_mask.float(), block).sum(-1)
    return _row_sums(x.float().masked_fill(~weight, 0.0), block), counts[:, None, :, None], counts > 0


def _row_sums(x: Tensor, block: int) -> Tensor:
    batch, heads, length, dim = x.shape
    whole = length // block * block
    sums = x[:, :, :whole].unflatten(2, (-1, block)).sum(3) if whole else x.new_empty(batch, heads, 0, dim)
    return sums if whole == length else torch.cat([sums, x[:, :, whole:].sum(2, keepdim=True)], dim=2)


def _self_similarity(x: Tensor, block: int, key_mask: Tensor | None) -> Tensor:
    """Mean pairwise cosine of the rows of every block, float32 ``[B, H, n]``.

    It equals the squared norm of the mean of the unit rows, so it costs O(L·D) and is never negative.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    sums, counts, _ = _block_sums(unit, block, key_mask)
    return (sums / counts.clamp(min=1)).square().sum(-1)
