"""MeanSimilarity: the selection of SpargeAttn (arXiv 2502.18137), with scores as fine as wanted."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from .base import Inputs, PerHead, Selector, check_pool, per_head
from .pooled import Pooled, pool


@dataclass
class MeanSimilarity(Selector):
    """Keeps the most probable key blocks until their mass reaches ``cdf_threshold``.

    Block probabilities come from the means of sub-blocks of ``pool`` tokens. Blocks whose rows are not similar to
    each other are badly described by means: such key blocks are kept for every query block, and such query blocks
    keep everything.

    Attributes:
        cdf_threshold: mass to keep, a float or a tensor ``[Hq]``; the block that crosses it is kept; 1 keeps all.
        sim_threshold: least self-similarity (mean pairwise cosine) of a block that is judged by its means, a float
            or a tensor ``[Hq]``; below 0 = no filter.
        pool: length of the sub-blocks in tokens, a divisor of both block sizes; the block's own length (128) is the
            original's method. Default: 16.
    """

    cdf_threshold: PerHead = 0.97
    sim_threshold: PerHead = -1.0
    pool: int = 16
    local: int = dataclasses.field(default=128, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self)
        if isinstance(self.cdf_threshold, (int, float)) and not 0 <= self.cdf_threshold <= 1:
            raise ValueError(f"cdf_threshold must be in [0, 1], got {self.cdf_threshold}")
        if isinstance(self.sim_threshold, (int, float)) and math.isnan(self.sim_threshold):
            raise ValueError("sim_threshold must be a number, got nan")

    def pooled(self, inputs: Inputs) -> Pooled:
        """Scores of one call, before any threshold."""
        return pool(self, inputs, self.pool)

    def kept_blocks(self, inputs: Inputs) -> Tensor:
        heads, device = inputs.q.shape[1], inputs.q.device
        cdf = per_head(self.cdf_threshold, heads, "cdf_threshold", device)
        sim = per_head(self.sim_threshold, heads, "sim_threshold", device)
        return within(self.levels(self.pooled(inputs), sim), cdf[:, None, None])

    def levels(self, pooled: Pooled, sim_threshold: Tensor) -> Tensor:
        """The cdf threshold from which on each block is kept, ``[B, Hq, nq, nk]``; ``sim_threshold`` is ``[Hq]``."""
        return pooled.levels(sim_threshold)


def within(levels: Tensor, cdf: Tensor) -> Tensor:
    """Blocks that a cdf threshold keeps; 1 or more keeps every visible block, whatever rounding the sums had."""
    return (levels < cdf) | ((cdf >= 1.0) & levels.isfinite())
