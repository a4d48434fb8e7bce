"""How thresholds follow from the curves: bounds for every head, or one budget for the model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spas_attn.call import PRECISIONS

from .accumulate import Grid
from .budget import Outcome, choose_for, counts_time, no_times, outcome, sparsest
from .layer import DENSE_IS_FASTER, NOT_WORTH_IT, Layer, check_layers
from .machine import Times, times
from .module import DEFAULT_L1, DEFAULT_PV_L1, SparseAttention
from .tradeoff import Target, Tradeoff
from .tuned import PV_OFF, Bounds, check_bounds


@dataclass
class Objective:
    """Bounds for every head: the candidate of least density that holds them.

    Attributes:
        measure: of the model's error, see :class:`autotune.tradeoff.Tradeoff`; None without sensitivities.
    """

    measure: str | None = None

    def check(self, model: Any, layers: list[Layer]) -> None:
        """Reject what is known to be impossible before anything runs."""
        check_layers(model, layers)

    def choose(self, layers: Sequence[Layer], grid: Grid) -> None:
        """Put thresholds in force, without PV skip."""
        for layer in layers:
            layer.choose_within(grid, _no_skip(layer))

    def choose_again(self, layers: Sequence[Layer], grid: Grid, missed: Sequence[Tensor], last: bool) -> None:
        """Change what is in force after some heads ``[H]`` missed their bounds, which have been tightened (or, the last
        time, opened to dense attention alone). They lose their PV skip.
        """
        for layer, wrong in zip(layers, missed, strict=True):
            if bool(wrong.any()):
                layer.choose_within(grid, torch.where(wrong, PV_OFF, layer.in_force().pv.cpu()))

    def tradeoff(self, layers: Sequence[Layer], grid: Grid, measured: Sequence[float]) -> Tradeoff:
        """The candidates of all layers, with those in force."""
        found = Tradeoff(tuple(layer.tradeoff(grid) for layer in layers), self.measure)
        return _with_errors(found, measured)


@dataclass
class Budget(Objective):
    """One budget for the model.

    Attributes:
        target: what it has to reach.
        equal_shares: every head of a layer weighs the same, instead of by its output.
    """

    target: Target = field(kw_only=True)
    equal_shares: bool = False

    def check(self, model: Any, layers: list[Layer]) -> None:
        super().check(model, layers)
        device = layers[0].module._device
        may_move = device.type == "cpu" and torch.cuda.is_available()  # offloaded weights come to the GPU for a call
        if self.target.name == "speedup" and not may_move and not any(map(is_timed, layers)):
            raise ValueError(no_times(self.target))

    def choose(self, layers: Sequence[Layer], grid: Grid) -> None:
        found, why = self._solve(layers, grid)
        for layer, chosen in zip(layers, found.chosen, strict=True):
            layer.take(chosen, grid, _no_skip(layer), why[layer.index])

    def choose_again(self, layers: Sequence[Layer], grid: Grid, missed: Sequence[Tensor], last: bool) -> None:
        """The target is reached by the other heads; except the last time, when nothing is checked any more."""
        before = [layer.chosen for layer in layers]
        if last:
            chosen = [torch.where(w, layer.curves.candidates, layer.chosen)  # type: ignore[union-attr]
                      for w, layer in zip(missed, layers, strict=True)]  # fmt: skip
            why = [NOT_WORTH_IT] * len(layers)
        else:
            found, why = self._solve(layers, grid)
            chosen = found.chosen
        for layer, old, new in zip(layers, before, chosen, strict=True):
            layer.take(new, grid, torch.where(old == new, layer.in_force().pv.cpu(), PV_OFF), why[layer.index])

    def tradeoff(self, layers: Sequence[Layer], grid: Grid, measured: Sequence[float]) -> Tradeoff:
        found = self._candidates(layers, grid)
        return _with_errors(dataclasses.replace(found, target=self.target), measured)

    def _candidates(self, layers: Sequence[Layer], grid: Grid) -> Tradeoff:
        found = tuple(layer.tradeoff(grid, equal_shares=self.equal_shares) for layer in layers)
        return Tradeoff(found, self.measure)

    def _solve(self, layers: Sequence[Layer], grid: Grid) -> tuple[Outcome, list[str]]:
        """The choice for the target, and why heads are dense in each layer."""
        candidates, expected = self._candidates(layers, grid), layer_times(layers)
        if not counts_time(self.target, [layer.module for layer in layers]):
            expected = None
        try:
            found = choose_for(candidates, self.target, expected)
        except ValueError as error:
            if "out of reach" not in str(error):
                raise
            # Hours of calibration are not thrown away for a number: what comes nearest is taken.
            warnings.warn(f"{error}; taking these", RuntimeWarning, stacklevel=2)
            found = sparsest(candidates, expected)
        why = [DENSE_IS_FASTER if expected and bool((c == layer.curves.candidates).all()) else NOT_WORTH_IT  # type: ignore[union-attr]
               for c, layer in zip(found.chosen, layers, strict=True)]  # fmt: skip
        return found, why


def is_timed(layer: Layer) -> bool:
    """Whether the cost model can say anything of a layer that has not been called yet."""
    module = layer.module
    shapes = [(1, 1024, 1024, module.head_dim or 64, causal) for causal in (True, False)]
    return any(times(shape, module._device, module.precision, module.selector) for shape in shapes)


def layer_times(layers: Sequence[Layer]) -> list[Times] | None:
    """Expected times of every layer on the machine that it is calibrated on; None where the cost model has no row."""
    found = []
    for layer in layers:
        module = layer.module
        expected = None if layer.shape is None else times(
            layer.shape, layer.device or module._device, module.precision, module.selector
        )  # fmt: skip
        if expected is None:
            return None
        found.append(expected)
    return found


def _with_errors(tradeoff: Tradeoff, measured: Sequence[float]) -> Tradeoff:
    """With the error that the choice in force is predicted to have, and that it had."""
    if tradeoff.measure is None:
        return tradeoff
    mean = sum(measured) / len(measured) if measured else None
    return dataclasses.replace(tradeoff, predicted=outcome(tradeoff).error, measured=mean)


def _no_skip(layer: Layer) -> Tensor:
    assert layer.curves is not None
    return torch.full((layer.curves.heads,), PV_OFF)


def objective_of(name: str, target: Target | None, share: bool) -> Objective:
    """The objective of a name, with its target; a ValueError on what does not go together."""
    if name not in ("bounds", "budget"):
        raise ValueError(f"objective must be 'bounds' or 'budget', got {name!r}")
    if not isinstance(share, bool):
        raise TypeError(f"share must be True or False, got {share!r}")
    if name == "budget":
        if target is None:
            raise ValueError("objective='budget' needs a target: sparsity=, speedup= or error=")
        return Budget(target=target, equal_shares=not share)
    if target is not None:
        raise ValueError(f"{target} is a target of objective='budget', got objective={name!r}")
    return Objective()


def prompts_for_sensitivity(count: int | None, objective: Objective) -> int:
    """On how many prompts sensitivities are measured; None = as usual for the objective."""
    if count is None:
        return int(isinstance(objective, Budget))
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"sensitivity must be a number of prompts, 0 or more, got {count!r}")
    if not count and isinstance(objective, Budget) and objective.target.name == "error":
        raise ValueError(f"{objective.target} is predicted from measured sensitivities: sensitivity must be 1 or more")
    return count


def precisions_of(names: Sequence[str] | None) -> tuple[str, ...]:
    """Precisions to choose from, the most exact one first; none where none are named."""
    if names is None:
        return ()
    known = [name for name in PRECISIONS if name != "auto"]
    if isinstance(names, str) or not names or not set(names) <= set(known):
        raise ValueError(f"precisions must be a list of some of {known}, got {names!r}")
    return tuple(name for name in known if name in names)


def bounds_of(
    module: SparseAttention, l1: float | None, pv_l1: float | None, tail: float | str | None, objective: Objective
) -> Bounds:
    """The bounds of a layer; of a budget those that are named."""
    if isinstance(objective, Budget):
        if l1 is not None and pv_l1 is None:
            pv_l1 = l1 * DEFAULT_PV_L1 / DEFAULT_L1
        if l1 is None and pv_l1 is not None:
            raise ValueError(f"pv_l1={pv_l1} guards what l1 bounds and more: with a budget give both, or l1 alone")
        bounds = (l1, pv_l1, None if isinstance(tail, str) else tail)
        check_bounds(*bounds, guards=True)
        return bounds
    bounds = (
        module.l1 if l1 is None else l1,
        module.pv_l1 if pv_l1 is None else pv_l1,
        module.tail if isinstance(tail, str) else tail,
    )
    check_bounds(*bounds)
    return bounds
