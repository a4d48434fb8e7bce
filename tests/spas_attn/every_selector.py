"""The one table of selectors that every test of all selectors runs through: a new selector is one line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spas_attn import Call
from spas_attn.selectors import Dense, MaxShare, MeanSimilarity, PeakMass, Selector, Streaming, Tokens, TopK


@dataclass
class Nearest(Selector):
    """A selector of a user's own: keeps the key blocks within a share ``reach`` of the sequence."""

    reach: float | Tensor = 0.5
    tuned: ClassVar[str] = "reach"
    candidates: ClassVar[tuple[float, ...]] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def levels(self, call: Call) -> Tensor:
        starts_q = torch.arange(0, call.q_len, self.block_q, device=call.q.device) + call.offset
        starts_k = torch.arange(0, call.k_len, self.block_k, device=call.q.device)
        return ((starts_q[:, None] - starts_k).abs() / call.k_len)[None, None]


SIZES: dict[str, Any] = {"block_q": 64, "block_k": 64}
SELECTORS: dict[str, Selector] = {
    "MeanSimilarity": MeanSimilarity(0.7, pool=8, local=64, **SIZES),
    "MeanSimilarity, filtered": MeanSimilarity(0.6, 0.4, pool=64, local=0, block_q=64, block_k=128),
    "PeakMass": PeakMass(0.8, pool=16),
    "TopK": TopK(0.4, pool=16, local=0, block_q=128, block_k=64),
    "MaxShare": MaxShare(0.5, local=0, **SIZES),
    "Streaming": Streaming(64, 100, **SIZES),
    "Tokens": Tokens(((0, 70), (-100, -50)), queries=False, **SIZES),
    "Dense": Dense(**SIZES),
    "Streaming | TopK": Streaming(20, 0, sink=False, **SIZES) | TopK(0.2, local=0, **SIZES),
    "a user's own": Nearest(**SIZES),
}
every = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS.keys())
