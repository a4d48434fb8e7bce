"""Union: keeps what either of two selectors keeps; written ``a | b``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Inputs, Selector


@dataclass
class Union(Selector):
    """Keeps what ``first`` or ``second`` keeps; both must use the same block sizes."""

    first: Selector
    second: Selector

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            a, b = getattr(self.first, name), getattr(self.second, name)
            if a != b:
                raise ValueError(f"selectors joined by | need one {name}, got {a} and {b}")
            setattr(self, name, a)

    @property
    def expected_density(self) -> float | None:
        first, second = self.first.expected_density, self.second.expected_density
        return None if first is None or second is None else max(first, second)

    def kept_blocks(self, inputs: Inputs) -> Tensor:
        return self.first.kept_blocks(inputs) | self.second.kept_blocks(inputs)
