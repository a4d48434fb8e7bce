"""MaxShare: keeps the blocks whose score comes near the largest of their row (FlashPrefill, arXiv 2603.06199)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..checks import PerHead, check_range
from .base import Selector
from .pooled import check_pool, mean_row, pooled_rows, probabilities


@dataclass
class MaxShare(Selector):
    """Keeps a key block whose pooled probability reaches ``alpha`` times the largest of its row; nothing is sorted.

    Attributes:
        alpha: share of the largest probability, in [0, 1], a float or a tensor ``[Hq]``; 0 keeps everything.
        pool: length of the sub-blocks whose means are scored, a divisor of both block sizes.
    """

    alpha: PerHead = 0.1
    pool: int = 16
    local: int = dataclasses.field(default=128, kw_only=True)
    tuned: ClassVar[str] = "alpha"
    candidates: ClassVar[tuple[float, ...]] = tuple(1 - 2 ** (-step / 2) for step in range(1, 25))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self, self.pool)
        check_range("alpha", self.alpha, 0, 1)

    def levels(self, call: Call) -> Tensor:
        probs = mean_row(probabilities(pooled_rows(self, call, self.pool)))
        return 1.0 - probs / probs.amax(-1, keepdim=True).clamp(min=1e-30)

    @property
    def threshold(self) -> PerHead:
        return 1.0 - self.alpha

    def tuned_to(self, threshold: Tensor, sparse: Tensor) -> Selector:
        return dataclasses.replace(self, alpha=torch.where(sparse, 1.0 - threshold, 0.0))
