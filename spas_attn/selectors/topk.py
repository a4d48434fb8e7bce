"""TopK: a fixed share of the visible key blocks, best pooled scores first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Inputs, PerHead, Selector, check_pool, per_head
from .pooled import pool


@dataclass
class TopK(Selector):
    """Keeps, for every query block, the share ``keep`` of its visible key blocks, rounded up, forced ones included.

    Attributes:
        keep: share of the visible key blocks, in (0, 1], a float or a tensor ``[Hq]``.
        pool: length of the sub-blocks whose means are scored, a divisor of both block sizes.
    """

    keep: PerHead = 0.5
    pool: int = 16
    local: int = dataclasses.field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self)
        if isinstance(self.keep, (int, float)) and not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")

    @property
    def expected_density(self) -> float | None:
        return float(self.keep) if isinstance(self.keep, (int, float)) else None

    def kept_blocks(self, inputs: Inputs) -> Tensor:
        heads, device = inputs.q.shape[1], inputs.q.device
        keep = per_head(self.keep, heads, "keep", device)
        levels = pool(self, inputs, self.pool).levels(torch.full_like(keep, -1.0), by="rank")
        return levels < keep[:, None, None]
