"""RowShare: a fixed share of every row's key blocks, in the order in which another selector ranks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..checks import PerHead, check_range
from .base import Selector


@dataclass
class RowShare(Selector):
    """Keeps, for every query block, the share ``keep`` of its visible key blocks, rounded up, best levels of ``ranked``
    first; the blocks that ``ranked`` forces come before all others and count.

    So methods with rules of their own are compared at one density, or given a sparsity. Of equal levels the first block
    comes first. Heads that ``ranked`` keeps dense stay dense.

    Attributes:
        ranked: the selector that ranks; its own threshold is not used.
        keep: share of the visible key blocks, in (0, 1], a float or a tensor ``[Hq]``.
    """

    ranked: Selector
    keep: PerHead = 0.5
    tuned: ClassVar[str] = "keep"
    candidates: ClassVar[tuple[float, ...]] = tuple(percent / 100 for percent in (3, 5, 8, *range(10, 100, 5)))

    def __post_init__(self) -> None:
        if not isinstance(self.ranked, Selector):
            raise TypeError(f"ranked must be a Selector, got {type(self.ranked).__name__}")
        if not self.sink or self.local:
            raise ValueError("sink and local belong to the selector that ranks")
        self.block_q, self.block_k = self.ranked.block_q, self.ranked.block_k
        if self.dense_heads is None:
            self.dense_heads = self.ranked.dense_heads
        super().__post_init__()
        check_range("keep", self.keep, 0, 1, above=True)

    @property
    def expected_density(self) -> float | None:
        return float(self.keep) if isinstance(self.keep, (int, float)) else None

    def forced(self, call: Call) -> Tensor:
        return self.ranked.forced(call)

    def levels(self, call: Call) -> Tensor:
        visible = self.visible(call)
        levels = self.ranked.levels(call).expand(*call.q.shape[:2], *visible.shape[-2:])
        # Forced blocks first, invisible ones last, whatever their levels are: finite levels lie between.
        bounded = levels.clamp(min=-3e38, max=3e38)
        bounded = bounded.masked_fill(self.forced(call), -torch.inf).masked_fill(~visible, torch.inf)
        order = bounded.argsort(dim=-1, stable=True)
        place = torch.arange(order.shape[-1], device=order.device, dtype=torch.float32)
        share = place / visible.sum(-1, keepdim=True).clamp(min=1)
        return torch.empty_like(bounded).scatter_(-1, order, share.expand_as(bounded))
