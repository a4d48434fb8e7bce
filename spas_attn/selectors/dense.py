"""Dense: keeps every visible block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..call import Call
from .base import Selector


@dataclass
class Dense(Selector):
    """Keeps every visible block: exact attention."""

    packs: ClassVar[bool] = True

    @property
    def expected_density(self) -> float:
        return 1.0

    def levels(self, call: Call) -> Tensor:
        return torch.full((1, 1, 1, 1), -torch.inf, device=call.q.device)
