"""Error curves of many selectors from one pass over some inputs, and thresholds chosen from them for a sparsity."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotune.accumulate import ALL_HEADS, BINS, HIGHEST, LOWEST, PromptTally, Tally
from autotune.choose import mean_error, tail_error
from autotune.module import sparse_modules
from autotune.partials import query_groups
from autotune.sampling import Sampler
from autotune.tuned import PV_OFF, Tuned
from spas_attn.call import Call
from spas_attn.selectors import Selector
from spas_attn.selectors.base import keeps

_STEPS = 60  # of a bisection


@dataclass(frozen=True)
class Curves:
    """What every candidate threshold of a selector costs and saves, by layer and head.

    Attributes:
        thresholds: the candidates ``[C]``.
        error: mean relative error of the head's output, float64 ``[layers, H, C]``.
        tail: its 99.5th percentile over queries, float64 ``[layers, H, C]``.
        squared: its mean square over queries, float64 ``[layers, H, C]``.
        density: share of the blocks kept, float64 ``[layers, H, C]``.
        share: the head's share of its layer's output, float64 ``[layers, H]``.
    """

    thresholds: Tensor
    error: Tensor
    tail: Tensor
    squared: Tensor
    density: Tensor
    share: Tensor

    def best(self, cost: Tensor) -> Tensor:
        """The candidate of least cost ``[layers, H, C]`` per head; C where keeping everything is better (cost 1)."""
        return _or_else(cost, 1.0).argmin(-1)

    def kept(self, chosen: Tensor) -> Tensor:
        """Density of a choice ``[layers, H]``."""
        return self.of(chosen, self.density, 1.0)

    def errors(self, chosen: Tensor) -> Tensor:
        """Mean error of a choice ``[layers, H]``."""
        return self.of(chosen, self.error, 0.0)

    @staticmethod
    def of(chosen: Tensor, values: Tensor, everything: float) -> Tensor:
        """Values of a choice ``[layers, H]``, given those of the candidates and that of keeping everything."""
        return _or_else(values, everything).gather(-1, chosen[..., None])[..., 0]

    def squares(self, of_queries: bool) -> Tensor:
        """Error² of every candidate: the mean of the queries' squares, or the square of their mean."""
        return self.squared if of_queries else self.error.square()

    def uniform(self, sparsity: float, l1: float = 1.0, tail: float = math.inf) -> Tensor:
        """One pair of bounds for every head, in the ratio of ``l1`` and ``tail``, that gives a mean sparsity.

        Returns:
            the choice ``[layers, H]``.
        """
        excess = torch.maximum(self.error / l1, self.tail / tail)
        return self._search(lambda x: self.best(self.density.masked_fill(excess > 10**x, torch.inf)), sparsity)

    def budget(self, sparsity: float, weights: Tensor | None = None, *, of_queries: bool = False) -> Tensor:
        """One budget for the model: per head least density + λ · weight · error², λ by the mean sparsity.

        Args:
            sparsity: mean over heads.
            weights: ``[layers, H]``; None for 1.
            of_queries: error² is the mean of the queries' squared errors, not the square of their mean.
        """
        squared = self.squares(of_queries)
        squared = squared if weights is None else squared * weights[..., None]
        return self._search(lambda x: self.best(self.density + 10**-x * squared), sparsity)

    def _search(self, choose: Callable[[float], Tensor], sparsity: float) -> Tensor:
        """The choice whose density comes nearest; what ``choose`` gives must get sparser with its argument."""
        low, high = -9.0, 9.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if 1 - float(self.kept(choose(middle)).mean()) < sparsity else (low, middle)
        return min((choose(low), choose(high)), key=lambda found: abs(1 - float(self.kept(found).mean()) - sparsity))


def _or_else(values: Tensor, everything: float) -> Tensor:
    """Values of the candidates ``[layers, H, C]``, with that of keeping everything as one more."""
    return torch.cat([values, torch.full_like(values[..., :1], everything)], -1)


def collect(
    model: nn.Module,
    selectors: Mapping[str, tuple[Selector, Sequence[float]]],
    run: Callable[[Any], Any],
    items: Sequence[Any],
    query_blocks_per_call: int,
    every: int = 1,
    edges: Sequence[float] = (),
) -> dict[str, Curves]:
    """Curves of selectors with their candidate thresholds, all from one run of each item.

    Exact outputs and the part of every block in them are computed once for all selectors of a size of blocks.

    Args:
        model: patched.
        selectors: by name.
        run: runs an item.
        items: what is run.
        query_blocks_per_call: looked at, at random.
        every: every n-th call of a layer in an item is looked at.
        edges: noise levels, falling, at which the phases of a diffusion model meet: what is ``[layers, …]`` in the
            curves then holds all layers in the first phase, then all in the second, and so on.
    """
    modules, sampler = sparse_modules(model), Sampler(query_blocks_per_call, 0)
    groups: dict[tuple[int, int], dict[str, tuple[Selector, Sequence[float]]]] = {}
    for name, (selector, candidates) in selectors.items():
        groups.setdefault((selector.block_q, selector.block_k), {})[name] = selector, candidates
    tallies: dict[tuple[Any, ...], PromptTally] = {}

    calls: Counter[tuple[int, int]] = Counter()

    def observe(layer: int, number: int, call: Call | str, noise: float | None) -> None:
        phase = sum(noise < edge for edge in edges) if edges and noise is not None else 0
        place = calls[layer, number]
        calls[layer, number] += 1
        if isinstance(call, str) or place % every != every // 2:
            return
        for size, group in groups.items():
            tally = tallies.get((size, phase, layer))
            if tally is None:
                count = sum(len(candidates) for _, candidates in group.values())
                tally = tallies[size, phase, layer] = PromptTally(call.q.shape[1], count, call.q.device)
            add(tally, group, call, sampler.blocks(call, size[0], layer, number, place))

    for number, item in enumerate(items):
        for layer, module in enumerate(modules.values()):
            module.mode = "tune"
            module.observer = lambda call, layer=layer, number=number, module=module: observe(
                layer, number, call, module.seen_noise
            )
        run(item)
    for module in modules.values():
        module.mode, module.observer = "dense", None
    found: dict[str, Curves] = {}
    for size, group in groups.items():
        places = [(size, phase, layer) for phase in range(len(edges) + 1) for layer in range(len(modules))]
        layers = [tallies[place].close(0) for place in places]
        figures = [
            torch.stack([of(tally) for tally in layers]) for of in (mean_error, tail_error, mean_square, Tally.density)
        ]
        norm = torch.stack([tally.total()[0] for tally in layers])
        share = norm / norm.sum(-1, keepdim=True)
        sizes = [len(candidates) for _, candidates in group.values()]
        parts = zip(*(figure.split(sizes, -1) for figure in figures), strict=True)
        for (name, (_, candidates)), some in zip(group.items(), parts, strict=True):
            found[name] = Curves(torch.tensor(candidates, dtype=torch.float64), *some, share)
    return found


def mean_square(tally: Tally) -> Tensor:
    """Mean of one query's squared relative error, float64 ``[H, candidates]``, from the histograms' bins."""
    middles = 10 ** ((torch.arange(BINS, dtype=torch.float64) + 0.5) * (math.log10(HIGHEST / LOWEST) / BINS)) * LOWEST
    return (tally.histogram * middles.square()).sum(-1) / max(1, int(tally.queries[0]))


@torch.no_grad()
def add(
    tally: PromptTally, group: Mapping[str, tuple[Selector, Sequence[float]]], call: Call, blocks: list[int]
) -> None:
    """Errors of every candidate (below 1) of selectors of one size of blocks on some query blocks; densities on all."""
    some = next(iter(group.values()))[0]
    levels = [selector.final_levels(call) for selector, _ in group.values()]
    thresholds = [torch.tensor(candidates, device=call.q.device) for _, candidates in group.values()]
    heads, kept = call.q.shape[1], []
    for level, values in zip(levels, thresholds, strict=True):
        ranked = level.transpose(0, 1).flatten(1).sort(-1).values
        kept.append(torch.searchsorted(ranked, values.expand(heads, -1).contiguous()))
    tally.add_blocks(ALL_HEADS, torch.cat(kept, 1), some.visible(call).sum((0, 2, 3)).expand(heads))
    for part in query_groups(call, some.block_q, some.block_k, blocks):
        pairs = zip(levels, thresholds, strict=True)
        masks = torch.cat([keeps(part.rows_of(level)[:, :, None], values[:, None]) for level, values in pairs], 2)
        tally.add_errors(part.heads, *part.partials.errors(masks), part.partials.valid)


def install(
    model: nn.Module,
    curves: Curves,
    chosen: Tensor,
    layers: Sequence[int] | None = None,
    edges: Sequence[float] = (),
) -> None:
    """Run a patched model with a choice ``[layers, H]``; only some layers sparse where they are named.

    Args:
        edges: as in :func:`collect`.
    """
    values = torch.cat([curves.thresholds, torch.ones(1, dtype=torch.float64)])[chosen]
    modules = sparse_modules(model)
    for layer, module in enumerate(modules.values()):
        phases = []
        for place in range(layer, len(chosen), len(modules)):
            sparse = chosen[place] < len(curves.thresholds)
            if layers is not None and layer not in layers:
                sparse = torch.zeros_like(sparse)
            one, density = torch.ones(len(sparse)), float(curves.kept(chosen)[place].mean())
            threshold = torch.where(sparse, values[place], 1.0)
            phases.append(Tuned(sparse, threshold, -one, PV_OFF * one, expected_density=density))
        module.set_thresholds(Tuned.joined(phases, tuple(edges)) if edges else phases[0])
