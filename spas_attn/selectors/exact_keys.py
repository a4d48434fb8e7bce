"""ExactKeys: blocks ranked by the mass that pooled queries put on the exact keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_mask import blockwise, cdiv
from ..call import Call
from ..checks import PerHead, check_choice, check_range
from . import pooled
from .base import Selector
from .ranking import mass_before

QUERIES = ("mean", "sample")
RANKS = ("mass", "peak")
# Thresholds that a calibration tries: equal steps of the logarithm of what is left out.
_FINE = tuple(1 - 10 ** -(step / 14) for step in range(2, 67))

_CPU_SCORES = 1 << 20  # held at a time on a CPU: they stay in its cache, and late keys are left out of early rows


@dataclass
class ExactKeys(Selector):
    """Keeps the most probable key blocks, judged by every key.

    One vector speaks for ``pool`` queries; the keys stay as they are, because a mean of keys loses the one that stands
    out. A block's score is the logsumexp of the vector's scores for the block's keys, at 1/pool of the cost of QKᵀ, and
    a row softmax over the blocks follows. On a published model this holds 4 to 12 points more sparsity at equal
    perplexity than means of keys (docs/benchmarks/smollm2.md).

    Attributes:
        cdf_threshold: a float or a tensor ``[Hq]``; 1 keeps all. Of "mass" what is to be kept; the block that crosses
            it is kept. Of "peak" every block is kept to which some row gives more than 1 - cdf_threshold; a published
            model leaves out 70% of the blocks with 0.99 to 0.997.
        pool: queries that one vector speaks for, a divisor of ``block_q``.
        queries: which vector: "mean" of the queries, or "sample", the last of them.
        rank: how the rows of a query block share it: "mass", blocks in the order of the mean over the rows, up to a
            mass; or "peak", each block by the row that gives it most. A peak spends blocks where the attention is, a
            mass the same on every query block.
    """

    cdf_threshold: PerHead = 0.97
    pool: int = 32
    queries: str = "mean"
    rank: str = "mass"
    local: int = dataclasses.field(default=128, kw_only=True)
    packs: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    tuned: ClassVar[str] = "cdf_threshold"
    candidates: ClassVar[tuple[float, ...]] = _FINE

    def __post_init__(self) -> None:
        super().__post_init__()
        pool = self.pool
        if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1 or self.block_q % pool:
            raise ValueError(f"pool must be a divisor of block_q ({self.block_q}), got {pool!r}")
        check_choice("queries", self.queries, QUERIES)
        check_choice("rank", self.rank, RANKS)
        check_range("cdf_threshold", self.cdf_threshold, 0, 1)

    def levels(self, call: Call) -> Tensor:
        probs = pooled.probabilities(self.rows(call))
        if self.rank == "peak":
            return (1.0 - probs.amax(-2)).clamp_(min=0.0)
        return mass_before(pooled.mean_row(probs), self.forced(call), self.visible(call))

    def rows(self, call: Call) -> Tensor:
        """Scores of the pooled queries for the key blocks: logs of sums of exponentials over keys.

        Under causality a row sees the keys up to its last query, which never lies past the end of its query block, and
        within the window of its first one.

        Returns:
            float32 ``[B, Hq, nq, rows, nk]``; -inf where nothing is visible, and in rows without a query.
        """
        batch, heads = call.q.shape[:2]
        vectors, filled = self.vectors(call)
        nq, nk = cdiv(call.q_len, self.block_q), cdiv(call.k_len, self.block_k)
        rows = call.q.new_full((batch, heads, nq * self.block_q // self.pool, nk), -torch.inf, dtype=torch.float32)
        limit = _CPU_SCORES if call.q.device.type == "cpu" else pooled._FINE_SCORES
        chunk = max(1, limit // (batch * heads * call.k_len))
        for start in range(0, vectors.shape[2], chunk):
            part = vectors[:, :, start : start + chunk]
            count, stop = part.shape[2], call.k_len
            if call.is_causal:
                stop = min(stop, (start + count) * self.pool + call.offset)
            with torch.autocast(call.q.device.type, enabled=False):
                keys = call.k[:, :, :stop].float().transpose(-1, -2)
                scores = part.reshape(batch, -1, call.group * count, part.shape[-1]) @ keys
            seen = self._seen(call, start, count, stop)
            if filled is not None:
                seen = seen & filled[:, start : start + count, None]
            scores = (scores.view(batch, heads, count, stop) * call.scale).masked_fill_(~seen[:, None], -torch.inf)
            sums = _log_sums(blockwise(scores, self.block_k, value=-torch.inf))
            rows[:, :, start : start + count, : sums.shape[-1]] = sums
        return rows.unflatten(2, (nq, -1))

    def vectors(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """What speaks for every stretch of queries, float32 ``[B, Hq, n, D]``, and which stretches hold a query.

        Queries that are padding themselves, which only causal calls tell, take no part.

        Returns:
            the vectors, and bool ``[B, n]`` or None for all.
        """
        valid = call.query_mask() if call.is_causal else None
        if self.queries == "mean":
            return pooled.block_means(call.q, self.pool, valid)
        ends = torch.arange(self.pool - 1, call.q_len + self.pool - 1, self.pool, device=call.q.device)
        if valid is None:
            return call.q.index_select(2, ends.clamp(max=call.q_len - 1)).float(), None
        filled = blockwise(valid, self.pool)  # [B, n, pool]
        last = ends - filled.flip(-1).to(torch.int8).argmax(-1)
        place = last.clamp(max=call.q_len - 1)[:, None, :, None].expand(-1, call.q.shape[1], -1, call.q.shape[3])
        return call.q.gather(2, place).float(), filled.any(-1)

    def _seen(self, call: Call, start: int, count: int, stop: int) -> Tensor:
        """Which of the first ``stop`` keys the rows ``start`` … see, bool, broadcastable to ``[B, count, stop]``."""
        device = call.q.device
        keys = torch.arange(stop, device=device)
        seen = torch.ones(1, 1, stop, dtype=torch.bool, device=device)
        if call.is_causal:
            first = torch.arange(start, start + count, device=device)[:, None] * self.pool
            last = (first + self.pool).clamp(max=call.q_len) - 1
            seen = (keys <= last + call.offset)[None]
            if call.window is not None:
                seen = seen & (keys > first + call.offset - call.window)
            if call.document_start is not None:
                seen = seen & (keys >= call.document_starts(1)[first])
        return seen if call.key_mask is None else seen & call.key_mask[:, None, :stop]


def _log_sums(scores: Tensor) -> Tensor:
    """``scores.logsumexp(-1)``, in the scores' own memory: half the time on a CPU."""
    peak = scores.amax(-1, keepdim=True).clamp_(min=-1e38)
    return scores.sub_(peak).exp_().sum(-1).log_().add_(peak.squeeze(-1))
