"""PeakMass: keeps the blocks on which any few queries put much of their mass, however little the others do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ..call import Call
from .mean_similarity import MeanSimilarity
from .pooled import pooled_rows


@dataclass
class PeakMass(MeanSimilarity):
    """Keeps a key block when some row of sub-block scores gives it at least ``1 - cdf_threshold`` of its mass.

    A sum over the whole query block, as in MeanSimilarity, hides a block that a few queries depend on; its largest
    row shows it. Sub-blocks are scored to second order (see :func:`spas_attn.selectors.pooled.pooled_rows`), which
    costs twice as much as means alone. Pays with small blocks: measured in docs/benchmarks/notes.md.

    Attributes:
        cdf_threshold: a float or a tensor ``[Hq]``; 1 keeps everything.
        pool: length of the sub-blocks in tokens. Default: 8.
    """

    pool: int = 8
    block_q: int = dataclasses.field(default=64, kw_only=True)
    block_k: int = dataclasses.field(default=64, kw_only=True)

    def rows(self, call: Call) -> Tensor:
        return pooled_rows(self, call, self.pool, second_order=True)

    def judge(self, probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        return (1.0 - probs.amax(-2)).clamp(min=0.0)
