"""Thresholds for another target, chosen from the trade-off that a tuned file keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .budget import Outcome, choose_for, counts_time
from .machine import Times, times
from .module import SparseAttention
from .tradeoff import LayerTradeoff, Target, Tradeoff
from .tuned import PV_OFF, Tuned


def choose_at_load(
    tuned: Mapping[str, Tuned],
    tradeoff: Tradeoff | None,
    target: Target,
    modules: Mapping[str, SparseAttention],
    info: Any,
) -> dict[str, Tuned]:
    """The states of all layers for a target.

    Args:
        tuned: as the file has them.
        tradeoff: the file's.
        modules: the layers of the model.
        info: the file's ``_metadata``, which knows selectors and precision.

    Raises:
        ValueError: when the file has no trade-off, or one of other layers, or the target is out of reach.
    """
    if tradeoff is None:
        raise ValueError(f"the file holds no trade-off that {target} could be chosen from: calibrate with this version")
    ours = [(path, phase, state.heads) for path, state in tuned.items() for phase in range(len(state.edges) + 1)]
    theirs = [(layer.path, layer.phase, layer.heads) for layer in tradeoff.layers]
    if sorted(ours) != sorted(theirs):
        first = sorted(set(ours) ^ set(theirs))[0] if set(ours) != set(theirs) else theirs[0]
        raise ValueError(f"the trade-off of the file is not that of its layers, first {first[0]!r}")
    expected = _times(tradeoff, modules, info) if counts_time(target, list(modules.values())) else None
    found = _states(tuned, tradeoff, target, choose_for(tradeoff, target, expected))
    for path, state in found.items():
        fixed = info.selector_of(path).fixed_heads
        if fixed is not None:  # no target makes them dense
            found[path] = dataclasses.replace(state, is_sparse=state.is_sparse | torch.tensor(fixed))
    return found


def _times(tradeoff: Tradeoff, modules: Mapping[str, SparseAttention], info: Any) -> list[Times] | None:
    """Expected times of the layers on the machine that the model is on; None where the cost model has no row."""
    found = []
    for layer in tradeoff.layers:
        module, selector = modules[layer.path], info.selector_of(layer.path)
        precision = info.precision_of(layer.path) or module.precision
        expected = layer.shape and times(layer.shape, module._device, precision, selector)
        if expected is None:
            return None
        found.append(expected)
    return found


def _states(tuned: Mapping[str, Tuned], tradeoff: Tradeoff, target: Target, found: Outcome) -> dict[str, Tuned]:
    phases: dict[str, dict[int, Tuned]] = {path: {} for path in tuned}
    for layer, chosen in zip(tradeoff.layers, found.chosen, strict=True):
        phases[layer.path][layer.phase] = _state(tuned[layer.path].at(layer.phase), layer, chosen)
    made = {path: _joined(tuned[path], parts) for path, parts in phases.items()}
    same = all(made[path].equals(tuned[path]) for path in made)
    facts: dict[str, Any] = {"checked": same and all(state.checked for state in tuned.values())}
    errors = {} if same else {"predicted": found.error if tradeoff.measure else None, "measured": None}
    facts["tradeoff"] = tradeoff.with_choice(found.chosen, target=target, **errors)
    return {path: dataclasses.replace(state, **facts) for path, state in made.items()}


def _joined(before: Tuned, parts: Mapping[int, Tuned]) -> Tuned:
    states = [parts[phase] for phase in range(len(parts))]
    return Tuned.joined(states, before.edges) if before.edges else states[0]


def _state(before: Tuned, layer: LayerTradeoff, chosen: Tensor) -> Tuned:
    """A layer's state, of one phase, with other candidates; PV skip stays where the candidate does."""
    sparse, threshold, sim, density = layer.thresholds_of(chosen)
    stays = (before.threshold == threshold) & (before.sim == sim) & (before.is_sparse == sparse)
    state = dataclasses.replace(before, is_sparse=sparse, threshold=threshold, sim=sim,
                                pv=torch.where(stays, before.pv, PV_OFF))  # fmt: skip
    if bool(stays.all()):  # its density was measured by the check
        return state
    return dataclasses.replace(state, expected_density=float(density.mean()))
