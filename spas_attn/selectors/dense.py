"""Dense: keeps every visible block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Inputs, Selector


@dataclass
class Dense(Selector):
    """Keeps every visible block: exact attention."""

    @property
    def expected_density(self) -> float:
        return 1.0

    def kept_blocks(self, inputs: Inputs) -> Tensor:
        return self.visible(inputs)
