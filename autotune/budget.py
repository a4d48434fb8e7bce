"""One budget for the whole model: for every head the candidate that minimises cost + λ · importance · error².

The cost of a candidate is the share of blocks it keeps, or the milliseconds that the cost model of this machine
expects; importance is the head's share of its layer's squared output, times the layer's measured sensitivity
(``LayerTradeoff.importance``). Errors of heads and layers are taken as independent, so that their squares add up:

    predicted error² or KL = Σ over layers and heads of importance · error²

One λ for all heads makes the sum least for what is spent, and it is found from a target: a sparsity, a speedup, or the
predicted error itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .machine import Times
from .module import SparseAttention
from .tradeoff import RELATIVE, LayerTradeoff, Target, Tradeoff

_STEPS = 64  # halvings of the range of log λ
_FACTOR = 1e9  # λ is looked for between 1/_FACTOR and _FACTOR times the typical ratio of cost to error²


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a choice of candidates gives.

    Attributes:
        chosen: int64 ``[H]`` of every layer; the number of candidates = dense.
        strength: λ, 0 for the sparsest choice, infinite where every head is dense.
        sparsity: mean over layers and heads.
        error: predicted for the model's output, in the unit of ``Tradeoff.measure`` where sensitivities were measured;
            without them in a unit of its own (the mean over layers of their squared errors, and its root).
        speedup: of all attention, None without times.
    """

    chosen: list[Tensor]
    strength: float
    sparsity: float
    error: float
    speedup: float | None


def outcome(tradeoff: Tradeoff, times: Sequence[Times] | None = None) -> Outcome:
    """What the choice in force gives."""
    return _Problem(tradeoff, times).outcome([layer.chosen.long() for layer in tradeoff.layers], math.nan)


def choose_for(tradeoff: Tradeoff, target: Target, times: Sequence[Times] | None = None) -> Outcome:
    """The choice of least predicted error that reaches a target, or of least cost for a target of error.

    Args:
        tradeoff: candidates; those that are not allowed are left out.
        times: of the layers, by which a speedup is reached and an error target saves most; without them the share of
            blocks is the cost.

    Raises:
        ValueError: when the target is out of reach, or what it needs is not known; the message says what is.
    """
    if target.name == "error" and tradeoff.measure is None:
        raise ValueError(
            f"{target}: the model's error can be predicted from measured sensitivities only, and there are none: "
            "calibrate with objective='budget', sensitivity=1 or more and a loop over prompts"
        )
    if target.name == "speedup" and times is None:
        raise ValueError(no_times(target))
    problem = _Problem(tradeoff, None if target.name == "sparsity" else times)
    best, good = _search(problem, target)
    if not good:
        found = getattr(best, target.name)
        raise ValueError(f"{target} is out of reach: the sparsest candidates that hold the bounds give {found:.3g}")
    # A sparsity counts blocks alone, so its choice was made without times.
    return best if problem.times is times else _Problem(tradeoff, times).outcome(best.chosen, best.strength)


def no_times(target: Target) -> str:
    """Why a speedup cannot be a target here."""
    return (
        f"{target}: a speedup is reached by the cost model, which has no row for this machine (python -m "
        "spas_attn.measure makes one on a GPU; move a model that runs there first); give sparsity= or error="
    )


def counts_time(target: Target, modules: Sequence[SparseAttention]) -> bool:
    """Whether milliseconds are the cost for a target: not for a sparsity, which counts blocks, nor for an error where a
    backend is named, so that sparse kernels run even where dense attention is faster.
    """
    return target.name == "speedup" or (target.name == "error" and all(m.backend == "auto" for m in modules))


def sparsest(tradeoff: Tradeoff, times: Sequence[Times] | None = None) -> Outcome:
    """The choice of least cost among the candidates that are allowed."""
    problem = _Problem(tradeoff, times)
    return problem.outcome(problem.choose(0.0), 0.0)


def curve(tradeoff: Tradeoff, times: Sequence[Times] | None = None, points: int = 40) -> list[Outcome]:
    """Choices of the whole model from the sparsest that is allowed to dense, in the order of λ."""
    problem = _Problem(tradeoff, times)
    between = points - 2
    strengths = [problem.ratio() * 10 ** (6 * i / max(1, between - 1) - 2.5) for i in range(between)]
    found = [problem.outcome(problem.choose(strength), strength) for strength in (0.0, *strengths)]
    return [*found, problem.outcome(problem.dense(), math.inf)]


def _search(problem: _Problem, target: Target) -> tuple[Outcome, bool]:
    """The choice nearest to a target on its good side, and whether there is one."""

    def good(found: Outcome) -> bool:
        value = getattr(found, target.name)
        return bool(value <= target.value if target.name == "error" else value >= target.value)

    def at(strength: float) -> Outcome:
        return problem.outcome(problem.choose(strength), strength)

    sparse, dense = at(0.0), problem.outcome(problem.dense(), math.inf)
    wants_dense = target.name == "error"  # which end is good for sure
    if wants_dense and good(sparse):
        return sparse, True
    if not wants_dense and not good(sparse):
        return sparse, False
    low, high = math.log(problem.ratio() / _FACTOR), math.log(problem.ratio() * _FACTOR)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = at(math.exp(middle))
        if good(found) != wants_dense:
            low, sparse = middle, found
        else:
            high, dense = middle, found
    start, end = (dense, sparse) if wants_dense else (sparse, dense)
    return _partly(problem, start, end, good), True


def _partly(problem: _Problem, start: Outcome, end: Outcome, good: Any) -> Outcome:
    """From a good choice as many heads as possible toward another one: heads alike change at the same λ, together."""
    differ = [(u, h) for u, pair in enumerate(zip(start.chosen, end.chosen, strict=True))
              for h in (pair[0] != pair[1]).nonzero()[:, 0].tolist()]  # fmt: skip

    def mixed(count: int) -> Outcome:
        chosen = [index.clone() for index in start.chosen]
        for u, h in differ[:count]:
            chosen[u][h] = end.chosen[u][h]
        return problem.outcome(chosen, start.strength)

    few, many = 0, len(differ)  # the first is good, the second is not
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if good(mixed(middle)) else (few, middle)
    return mixed(few)


class _Problem:
    """All candidates in arrays ``[layers, heads, candidates + 1]``, padded; the last candidate of a layer is dense."""

    def __init__(self, tradeoff: Tradeoff, times: Sequence[Times] | None) -> None:
        layers = tradeoff.layers
        self.layers, self.times, self.measure = layers, times, tradeoff.measure
        heads, size = max(x.heads for x in layers), max(x.candidates for x in layers) + 1
        shape = (len(layers), heads, size)
        self.density = torch.ones(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.closed = torch.ones(shape, dtype=torch.bool)
        self.weight = torch.zeros(shape[:2], dtype=torch.float64)  # in the mean density
        # Every layer counts the same in the mean over layers; without sensitivities also in the error.
        errors = 1.0 if self.measure else 1 / len(layers)
        for u, layer in enumerate(layers):
            h, c = layer.heads, layer.candidates + 1
            self.density[u, :h, :c] = layer.densities()
            self.squares[u, :h, :c] = layer.importance()[:, None] * layer.errors().square() * errors
            # A candidate that keeps everything is a dense head.
            closed = ~layer.allowed | (layer.density >= 1)
            self.closed[u, :h, :c] = torch.nn.functional.pad(closed, (0, 1), value=False)
            self.weight[u, :h] = 1 / (h * len(layers))
        if times is None:
            cost = self.weight[..., None] * self.density
        else:
            per_head = [t.blocks / layer.heads for t, layer in zip(times, layers, strict=True)]
            cost = torch.tensor(per_head, dtype=torch.float64)[:, None, None] * self.density
        self.cost = cost.masked_fill(self.closed, math.inf)

    def ratio(self) -> float:
        """A typical cost over a typical squared error."""
        open_squares = self.squares[~self.closed & (self.squares > 0)]
        typical = float(open_squares.median()) if len(open_squares) else 1.0
        return max(float(self.cost[~self.closed].mean()), 1e-12) / typical

    def choose(self, strength: float) -> list[Tensor]:
        """The best candidates for a λ; ties go to the smaller error."""
        value = self.cost + (strength + 1e-12 * self.ratio()) * self.squares
        best, index = value.min(-1)
        chosen = [index[u, : layer.heads] for u, layer in enumerate(self.layers)]
        if self.times is None:
            return chosen
        # With times, a layer that gains nothing over dense attention is left dense as a whole.
        for u, (layer, of) in enumerate(zip(self.layers, self.times, strict=True)):
            if of.dense <= of.fixed + float(best[u, : layer.heads].sum()):
                chosen[u] = torch.full_like(chosen[u], layer.candidates)
        return chosen

    def dense(self) -> list[Tensor]:
        """Every head dense."""
        return [torch.full((layer.heads,), layer.candidates) for layer in self.layers]

    def outcome(self, chosen: list[Tensor], strength: float) -> Outcome:
        """What a choice gives."""
        index = torch.zeros(self.weight.shape, dtype=torch.long)
        for u, layer in enumerate(self.layers):
            index[u, : layer.heads] = chosen[u]
        density = self.density.gather(-1, index[..., None])[..., 0]
        squares = float(self.squares.gather(-1, index[..., None])[..., 0].sum())
        error = squares if self.measure not in (None, RELATIVE) else math.sqrt(squares)
        sparsity = float((self.weight * (1 - density)).sum())
        return Outcome(chosen, strength, sparsity, error, self._speedup(index, density))

    def _speedup(self, index: Tensor, density: Tensor) -> float | None:
        if self.times is None:
            return None
        served = 0.0
        for u, (layer, of) in enumerate(zip(self.layers, self.times, strict=True)):
            all_dense = bool((index[u, : layer.heads] == layer.candidates).all())
            served += of.dense if all_dense else of.sparse(float(density[u, : layer.heads].mean()))
        return sum(of.dense for of in self.times) / served


def layer_error(layer: LayerTradeoff, chosen: Tensor) -> float:
    """The layer's own relative error under a choice ``[H]``: the root of Σ share · error²."""
    errors = layer.errors().gather(1, chosen.long()[:, None])[:, 0]
    return float((layer.share.double() * errors.square()).sum().sqrt())
