"""FlexPrefill: query-aware or vertical-slash selection, decided per head (arXiv 2502.20766)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_mask import blockwise
from ..call import Call
from ..checks import PerHead, check_range, per_head
from .base import Selector
from .last_queries import LastQueries, first_distance, last_queries, over_diagonals
from .pooled import block_means, mean_row, pooled_rows, probabilities
from .ranking import MASSES, mass_before, mass_before_of_all, places


@dataclass
class FlexPrefill(Selector):
    """Keeps blocks until ``gamma`` of a head's mass is reached, by the pattern that fits the head on this prompt.

    The last ``block_q`` queries of the sequence stand for all of them. Where the mean of these queries, scored against
    the means of the key blocks, tells about the same as their true attention (a Jensen-Shannon distance below ``tau``),
    the head is query-aware: block means are scored, and all blocks of the head are ranked together, forced ones first.
    The others are vertical-slash: the true attention of the last queries is summed in columns of ``block_k`` keys and
    in bands of ``block_k`` distances, as many of each as reach ``gamma`` of the mass are chosen, and a block is kept
    that lies in a chosen column or is crossed by a chosen band.

    It looks at the end of the prompt by design: under causality, too, a later token may change what earlier queries
    attend to.

    Attributes:
        gamma: mass to keep, a float or a tensor ``[Hq]``; what crosses it is kept; 1 keeps everything.
        tau: largest distance of a query-aware head, a float or a tensor ``[Hq]``; 0 makes all heads vertical-slash.
        min_budget, max_budget: least and most keys of a query block, in tokens, in order of the level (of equal ones
            the first block first); forced blocks count, and are kept beyond ``max_budget`` too. A gamma of 1 knows no
            ``max_budget``, which may be None.
    """

    gamma: PerHead = 0.95
    tau: PerHead = 0.1
    min_budget: int = 1024
    max_budget: int | None = None
    tuned: ClassVar[str] = "gamma"
    selection_ms: ClassVar[float] = (
        4.4  # One H100, 8K to 32K tokens: 4.9 and 5.8 ms in all, where XAttention takes 0.5 and 0.9.
    )
    candidates: ClassVar[tuple[float, ...]] = MASSES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("gamma", self.gamma, 0, 1)
        check_range("tau", self.tau, 0, float("inf"))
        for name, budget in (("min_budget", self.min_budget), ("max_budget", self.max_budget)):
            if budget is None and name == "max_budget":
                continue
            if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
                raise ValueError(f"{name} must be a number of tokens, 0 or more, got {budget!r}")
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ValueError(f"max_budget must be at least min_budget {self.min_budget}, got {self.max_budget}")

    def levels(self, call: Call) -> Tensor:
        forced, visible = self.forced(call), self.visible(call)
        last = last_queries(call, self.block_q)
        probs = mean_row(probabilities(pooled_rows(self, call, min(self.block_q, self.block_k))))
        query_aware = mass_before_of_all(probs, forced, visible)
        tau = per_head(self.tau, call.q.shape[1], "tau", call.q.device)
        aware = self.distances(call, last, *block_means(call.k, self.block_k, call.key_mask)) < tau
        by_column, by_distance = self.lines(call, last)
        crossed = torch.minimum(by_column[:, :, None], over_diagonals(self, call, by_distance))
        aware = aware[..., None, None]
        # Masses before the last blocks of a large map round to 1; probabilities still tell them apart.
        order = torch.where(aware, probs, 1.0 - crossed)
        return self._within_budgets(torch.where(aware, query_aware, crossed), order, forced, visible)

    def distances(self, call: Call, last: LastQueries, means: Tensor, filled: Tensor | None) -> Tensor:
        """Jensen-Shannon distances (natural logarithm) of the true and the pooled attention of the last queries, by key
        block, float32 ``[B, Hq]``.

        Args:
            call, last: the call, and what its last ``block_q`` queries attend to.
            means: ``[B, Hkv, nk, D]`` of the key blocks.
            filled: key blocks that hold more than padding, bool ``[B, nk]``, or None for all.
        """
        start = torch.arange(means.shape[2], device=means.device) * self.block_k
        seen = torch.ones_like(start, dtype=torch.bool)[None]
        if call.is_causal:
            position = last.position[:, None]
            seen = start <= position
            if call.window is not None:
                seen = seen & (start + self.block_k > position - min(self.block_q, call.q_len) + 1 - call.window + 1)
        if filled is not None:
            seen = seen & filled
        seen = seen[:, None]
        with torch.autocast(means.device.type, enabled=False):
            scores = last.mean.unflatten(1, (-1, call.group)) @ means.transpose(-1, -2)
        scores = scores.flatten(1, 2) * call.scale
        pooled = scores.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1)
        true = blockwise(last.columns, self.block_k).sum(-1)
        middle = (true + pooled) / 2
        return ((_divergence(true, middle) + _divergence(pooled, middle)) / 2).clamp(min=0.0).sqrt()

    def lines(self, call: Call, last: LastQueries) -> tuple[Tensor, Tensor]:
        """The mass before each column ``[B, Hq, nk]``, and before the band of each distance ``[B, Hq, distances]``."""
        columns = blockwise(last.columns, self.block_k).sum(-1)
        # Bands begin at multiples of block_k, also among the negative distances that there are without causality.
        before = first_distance(call) % self.block_k
        count = last.diagonals.shape[-1]
        bands = blockwise(torch.nn.functional.pad(last.diagonals, (before, 0)), self.block_k).sum(-1)
        none = columns.new_zeros((), dtype=torch.bool)
        by_distance = mass_before(bands, none, ~none).repeat_interleave(self.block_k, -1)[..., before : before + count]
        return mass_before(columns, none, ~none), by_distance

    @property
    def budgets(self) -> tuple[int, int | None]:
        """Least and most blocks of a row."""
        most = None if self.max_budget is None else max(1, self.max_budget // self.block_k)
        return -(-self.min_budget // self.block_k), most

    def _within_budgets(self, levels: Tensor, order: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """Levels below every threshold for the first ``min_budget`` of a row by ``order``, 1 or more past the last."""
        least, most = self.budgets
        if not least and most is None:
            return levels
        place = places(order, forced, visible)
        if most is not None:
            levels = torch.where(place < most, levels, levels.clamp(min=1.0))
        return levels.masked_fill(place < least, -torch.inf)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the last dimension in nats; 0 · log 0 is 0."""
    return torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0).sum(-1)
