"""Levels from a ranking of the blocks of a row: what stands before each block, forced blocks first."""

from __future__ import annotations

import torch
from torch import Tensor


def mass_before(probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The probability that stands before each block when blocks are ranked by probability, forced ones first.

    With it as a level, the block that crosses a cdf threshold is kept.

    Args:
        probs: ``[B, Hq, nq, nk]``.
        forced, visible: bool, broadcastable to it.
    """
    _, order = _ranked(probs, forced, visible)
    ranked = probs.gather(-1, order)
    return torch.empty_like(probs).scatter_(-1, order, (ranked.cumsum(-1) - ranked).clamp_(min=0.0))


def share_before(probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The share of a row's visible blocks that stands before each block in the same ranking."""
    key, order = _ranked(probs, forced, visible)
    position = torch.arange(key.shape[-1], device=key.device)
    share = position / visible.sum(-1, keepdim=True).clamp(min=1)
    return torch.empty_like(probs).scatter_(-1, order, share.expand_as(key))


def _ranked(probs: Tensor, forced: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Sort keys, falling, and the order: forced (probability + 2), by falling probability, invisible blocks last."""
    key = (probs + 2.0 * forced).masked_fill(~visible, -1.0)
    return torch.sort(key, dim=-1, descending=True, stable=True)
