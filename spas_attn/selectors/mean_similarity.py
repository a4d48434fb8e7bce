"""MeanSimilarity: the selection of SpargeAttn (arXiv 2502.18137), with scores as fine as wanted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..checks import PerHead, check_range, per_head
from .base import Selector
from .pooled import block_sums, check_pool, mean_row, pooled_rows, probabilities, smoothed_keys
from .ranking import MASSES, mass_before


@dataclass
class MeanSimilarity(Selector):
    """Keeps the most probable key blocks until their mass reaches ``cdf_threshold``.

    Block probabilities come from the means of sub-blocks of ``pool`` tokens. With the similarity filter on, blocks
    whose rows are not similar to each other, which means describe badly, are not judged: such key blocks are kept for
    every query block, and such query blocks keep everything.

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
    packs: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    tuned: ClassVar[str] = "cdf_threshold"
    candidates: ClassVar[tuple[float, ...]] = MASSES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self, self.pool)
        check_range("cdf_threshold", self.cdf_threshold, 0, 1)
        check_range("sim_threshold", self.sim_threshold, -float("inf"), float("inf"))

    @property
    def fits_packing(self) -> bool:
        return self.packs and not self.filters  # the ends of sequences decide which similarities are judged

    def levels(self, call: Call) -> Tensor:
        rows, forced, visible = self.rows(call), self.forced(call), self.visible(call)
        if not self.filters:
            return self.judge(probabilities(rows), forced, visible)
        left_out, whole = self._unlike(call)
        probs = probabilities(rows.masked_fill(left_out[:, :, :, None], -torch.inf))
        forced = (forced | left_out) & visible
        return self.judge(probs, forced, visible).masked_fill(forced | whole, -torch.inf)

    def rows(self, call: Call) -> Tensor:
        """Scores of the rows of sub-blocks, see :func:`spas_attn.selectors.pooled.pooled_rows`."""
        return pooled_rows(self, call, self.pool)

    def judge(self, probs: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """Levels ``[B, Hq, nq, nk]`` from the probabilities ``[B, Hq, nq, rows, nk]``."""
        return mass_before(mean_row(probs), forced, visible)

    @property
    def filters(self) -> bool:
        """Whether the similarity filter may be on; a tensor's values are not read, that would wait for its device."""
        return not isinstance(self.sim_threshold, (int, float)) or self.sim_threshold > 0  # no similarity is negative

    def _unlike(self, call: Call) -> tuple[Tensor, Tensor]:
        """Blocks that are not self-similar: of keys, where a query block may judge them, bool ``[B, Hq, nq, nk]``, and
        of queries, ``[B, Hq, nq, 1]``.

        Under causality key blocks that end after the query block are not judged: their later tokens are unknown to it.
        """
        heads, device = call.q.shape[1], call.q.device
        threshold = per_head(self.sim_threshold, heads, "sim_threshold", device)[:, None]
        queries = _self_similarity(call.q, self.block_q, None) < threshold
        keys = _self_similarity(smoothed_keys(call), self.block_k, call.key_mask)
        mixed = keys.repeat_interleave(call.group, 1) < threshold
        if not call.is_causal:
            return mixed[:, :, None], queries[..., None]
        ends_q = ((torch.arange(queries.shape[-1], device=device)[:, None] + 1) * self.block_q).clamp(max=call.q_len)
        ends_k = ((torch.arange(mixed.shape[-1], device=device) + 1) * self.block_k).clamp(max=call.k_len)
        return mixed[:, :, None] & (ends_k <= ends_q + call.offset), queries[..., None]


def _self_similarity(x: Tensor, block: int, key_mask: Tensor | None) -> Tensor:
    """Mean pairwise cosine of the rows of every block, float32 ``[B, H, n]``.

    It equals the squared norm of the mean of the unit rows, so it costs O(L·D) and is never negative.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    sums, counts, _ = block_sums(unit, block, key_mask)
    return (sums / counts.clamp(min=1)).square().sum(-1)
