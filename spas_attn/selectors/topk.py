"""TopK: a fixed share of the visible key blocks, best pooled scores first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..call import Call
from ..checks import PerHead, check_range
from .base import Selector
from .pooled import check_pool, mean_row, pooled_rows, probabilities
from .ranking import share_before


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
    packs: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    tuned: ClassVar[str] = "keep"
    candidates: ClassVar[tuple[float, ...]] = tuple(percent / 100 for percent in (3, 5, 8, *range(10, 100, 5)))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self, self.pool)
        check_range("keep", self.keep, 0, 1, above=True)

    @property
    def expected_density(self) -> float | None:
        return float(self.keep) if isinstance(self.keep, (int, float)) else None

    def levels(self, call: Call) -> Tensor:
        probs = mean_row(probabilities(pooled_rows(self, call, self.pool)))
        return share_before(probs, self.forced(call), self.visible(call))
