"""Ways to run a patched model: dense for a while, with its densities recorded, in tune mode."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import report
from .calibration import Calibration
from .module import Mode, SparseAttention, sparse_modules

_tuning: weakref.WeakKeyDictionary[Any, Calibration] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def dense(model: Any) -> Iterator[None]:
    """Run a tuned model or pipeline, or one with gates, on its original attention for a while."""
    modules = sparse_modules(model).values()
    gates: list[Any] = [module.gates for module in modules if module.gates is not None]
    before: list[Mode] = [module.mode for module in modules]
    acting = [gate.active for gate in gates]
    for module in modules:
        module.mode = "dense"
    for gate in gates:
        gate.active = False
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.mode = mode
        for gate, active in zip(gates, acting, strict=True):
            gate.active = active


class Densities:
    """The share of blocks that was computed, as :func:`record_density` records it.

    Calls with fewer queries than a block (decode) do not count; other calls that ran dense count as 1.
    """

    def __init__(self, modules: dict[str, SparseAttention]) -> None:
        self._modules = modules
        self._final: dict[str, float] | None = None

    @property
    def per_layer(self) -> dict[str, float]:
        """Mean over calls and heads, since the beginning or :meth:`clear`, by path; of layers that were called."""
        if self._final is not None:
            return self._final
        sums = {path: module.recorded.tolist() for path, module in self._modules.items()}
        return {path: total / calls for path, (total, calls) in sums.items() if calls}

    @property
    def mean(self) -> float:
        """Mean of ``per_layer``; NaN when no layer was called."""
        found = self.per_layer.values()
        return sum(found) / len(found) if found else float("nan")

    def clear(self) -> None:
        """Forget what was recorded so far."""
        for module in self._modules.values():
            module.recorded, module.last_density = torch.zeros_like(module.recorded), None


@contextlib.contextmanager
def record_density(model: Any) -> Iterator[Densities]:
    """Record the densities of a model's or pipeline's calls, for ``per_layer`` and ``mean`` of what it yields."""
    modules = sparse_modules(model)
    densities = Densities(modules)
    densities.clear()
    for module in modules.values():
        module.record_density = True
    try:
        yield densities
    finally:
        densities._final = densities.per_layer
        for module in modules.values():
            module.record_density = False


def enable_tune_mode(
    model: Any, enabled: bool = True, *, verbose: bool = False, printer: Callable[[str], None] = print
) -> Calibration:
    """Tune without a loop over prompts: switch on, run the model as usual, switch off.

    Switching off chooses and checks the thresholds, on a bounded sample of the calls seen (2 GiB of host memory).

    Returns:
        The calibration; after switching off it has its statistics and can be saved.
    """
    if enabled:
        if model in _tuning:
            raise RuntimeError("tune mode is already on for this model")
        _tuning[model] = Calibration(model).__enter__()
        return _tuning[model]
    if model not in _tuning:
        raise RuntimeError("tune mode is not on for this model: enable_tune_mode(model, True) first")
    calibration = _tuning.pop(model)
    calibration.__exit__(None, None, None)
    if verbose:
        printer(report.table(calibration.statistics))
    return calibration
