"""Running a patched model for comparison: dense for a while, and with its densities recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .module import Mode, SparseAttention, sparse_modules


@contextlib.contextmanager
def dense(model: Any) -> Iterator[None]:
    """Run a tuned model or pipeline on its original attention for a while."""
    modules = sparse_modules(model).values()
    before: list[Mode] = [module.mode for module in modules]
    for module in modules:
        module.mode = "dense"
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.mode = mode


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
