"""Levels from a ranking of the blocks of a row: what stands before each block, forced blocks first."""

from __future__ import annotations

import torch
from torch import Tensor

# Thresholds that a calibration tries of rules that keep blocks up to a mass.
MASSES = (
    0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.74, 0.78, 0.81, 0.84, 0.87, 0.89, 0.91, 0.925, 0.94, 0.95, 0.96,
    0.97, 0.975, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999, 0.9995,
)  # fmt: skip


def mass_before(probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The probability that stands before each block when blocks are ranked by probability, forced ones first.

    With it as a level, the block that crosses a cdf threshold is kept.

    Args:
        probs: ``[B, Hq, nq, nk]``.
        forced, visible: bool, broadcastable to it.
    """
    order = _ranked(probs, forced, visible)
    ranked = probs.gather(-1, order)
    return torch.empty_like(probs).scatter_(-1, order, (ranked.cumsum(-1) - ranked).clamp_(min=0.0))


def places(values: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The place of each block of a row in the ranking of :func:`mass_before`, float32, from 0; ties by position.

    Args:
        values: at most 1, ``[..., nk]``; the largest come first.
        forced, visible: bool, broadcastable to it.
    """
    order = _ranked(values, forced, visible)
    position = torch.arange(order.shape[-1], device=order.device, dtype=torch.float32)
    return torch.empty_like(values).scatter_(-1, order, position.expand_as(values))


def share_before(probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The share of a row's visible blocks that stands before each block in the same ranking."""
    return places(probs, forced, visible) / visible.sum(-1, keepdim=True).clamp(min=1)


def mass_before_of_all(probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The share of a head's mass that stands before each block in one ranking of all its blocks, as ``probs``.

    Args:
        probs: ``[B, Hq, nq, nk]``.
        forced, visible: bool, broadcastable to it; forced blocks come first.
    """
    shape = probs.shape
    probs, forced, visible = (x.expand(shape).flatten(2) for x in (probs, forced, visible))
    order = _ranked(probs, forced, visible)
    # In float64: a million small blocks would be lost beside a sum of thousands of rows.
    ranked = probs.gather(-1, order).masked_fill_(~visible.gather(-1, order), 0.0)
    sums = ranked.cumsum(-1, dtype=torch.float64)
    before = ((sums - ranked) / sums[..., -1:].clamp(min=1e-30)).clamp_(min=0.0).float()
    return torch.empty_like(probs).scatter_(-1, order, before).view(shape)


def _ranked(probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The order: forced blocks (probability + 2), by falling probability, invisible blocks last; ties by position."""
    key = (probs + 2.0 * forced).masked_fill(~visible, -1.0)
    return torch.sort(key, dim=-1, descending=True, stable=True).indices
