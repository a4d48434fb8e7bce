"""The one table of selectors that every test of all selectors runs through: a new selector is one line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spas_attn import Call
from spas_attn.selectors import (
    ByHead,
    Dense,
    ExactKeys,
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    PeakMass,
    RowShare,
    Selector,
    Streaming,
    Tokens,
    TopK,
    XAttention,
)


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
MIXED = ("vertical_slash", "a_shape", "block_sparse", "vertical_slash")
SELECTORS: dict[str, Selector] = {
    "MeanSimilarity": MeanSimilarity(0.7, pool=8, local=64, **SIZES),
    "MeanSimilarity, filtered": MeanSimilarity(0.6, 0.4, pool=64, local=0, block_q=64, block_k=128),
    "PeakMass": PeakMass(0.8, pool=16),
    "TopK": TopK(0.4, pool=16, local=0, block_q=128, block_k=64),
    "ExactKeys": ExactKeys(0.7, local=0, **SIZES),
    "ExactKeys, a sample": ExactKeys(0.8, pool=64, queries="sample", block_q=128, block_k=64),
    "ExactKeys, peaks": ExactKeys(0.85, pool=16, queries="sample", rank="peak", local=0, **SIZES),
    "XAttention": XAttention(0.7, stride=8, **SIZES),
    "XAttention, stride 16": XAttention(0.8, local=100, block_q=128, block_k=64),
    "FlashPrefill": FlashPrefill(0.5, sink_blocks=1, last_blocks=1, local=0, **SIZES),
    "FlexPrefill": FlexPrefill(0.6, tau=0.25, min_budget=100, max_budget=300, **SIZES),
    "FlexPrefill, vertical-slash": FlexPrefill(0.4, tau=0.0, min_budget=0, block_q=64, block_k=128),
    "MInference": MInference(vertical_size=30, slash_size=60, **SIZES),
    "MInference, a table": MInference(MIXED, adaptive_budget=0.2, block_q=128, block_k=64),
    "RowShare of XAttention": RowShare(XAttention(stride=8, **SIZES), 0.4),
    "Streaming": Streaming(64, 100, **SIZES),
    "ByHead": ByHead((True, True, False, False), Streaming(64, 100, **SIZES), ExactKeys(0.7, local=0, **SIZES)),
    "Tokens": Tokens(((0, 70), (-100, -50)), queries=False, **SIZES),
    "Dense": Dense(**SIZES),
    "Streaming | TopK": Streaming(20, 0, sink=False, **SIZES) | TopK(0.2, local=0, **SIZES),
    "a user's own": Nearest(**SIZES),
}
LOOKS_AT_THE_END = (FlexPrefill, MInference)  # of the prompt, by design
every = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS.keys())
