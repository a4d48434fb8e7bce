"""Phases of denoising: ranges of noise levels that have thresholds of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .layer import Layer


@dataclass
class Phases:
    """How the denoising steps of a calibration are divided.

    Attributes:
        count: how many phases there are.
        given: noise levels at which they meet, falling, where the user named them.
        edges: those of every layer, by path; two transformers of a pipeline see other levels.
    """

    count: int = 1
    given: tuple[float, ...] = ()
    edges: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, phases: int | Sequence[float]) -> Phases:
        """A number of phases, or the noise levels at which they meet, falling.

        Raises:
            ValueError: when it is neither.
        """
        if isinstance(phases, int) and not isinstance(phases, bool) and phases >= 1:
            return cls(phases)
        if isinstance(phases, (list, tuple)) and phases and all(type(edge) is float for edge in phases):
            inside = (1.0, *phases, 0.0)
            if all(high > low for high, low in zip(inside[:-1], inside[1:], strict=True)):
                return cls(len(phases) + 1, tuple(phases))
        raise ValueError(
            "phases must be a number from 1 on, or the noise levels at which they meet, falling, each in (0, 1), such "
            f"as (0.9, 0.6), got {phases!r}"
        )

    @property
    def unknown(self) -> bool:
        """Whether it has to be found out at which levels the model runs."""
        return self.count > 1 and not self.given

    def divide(self, path: str, levels: Sequence[float]) -> None:
        """Place the edges of a layer: phases get equally many of these levels, and meet halfway between two."""
        found = sorted(set(levels), reverse=True)
        if len(found) < self.count:
            raise RuntimeError(
                f"layer {path!r} was called at {len(found)} noise levels, fewer than phases={self.count}: run more "
                "steps, or observe more of them (every)"
            )
        borders = [round(i * len(found) / self.count) for i in range(1, self.count)]
        self.edges[path] = tuple((found[i - 1] + found[i]) / 2 for i in borders)

    def edges_of(self, layer: Layer) -> tuple[float, ...]:
        """The edges of a layer."""
        return self.given or self.edges.get(layer.path, ())

    def facts(self, layer: Layer) -> dict[str, Any]:
        """What the statistics say of a unit: its phase, and the noise levels (from, to) of it."""
        if self.count == 1:
            return {}
        edges = (1.0, *self.edges_of(layer), 0.0)
        return {"phase": layer.phase, "noise": [round(edges[layer.phase], 4), round(edges[layer.phase + 1], 4)]}

    def choose(self, units: Sequence[Layer]) -> Layer:
        """The one of a layer's units that its call in progress belongs to."""
        if len(units) == 1:
            return units[0]
        edges = self.edges_of(units[0])
        return units[sum(noise_of(units[0]) < edge for edge in edges) if edges else 0]

    def current(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those of the units of one transformer that its last call belongs to."""
        if self.count == 1:
            return list(layers)
        units: dict[str, list[Layer]] = {}
        for layer in layers:
            units.setdefault(layer.path, []).append(layer)
        return [self.choose(group) for group in units.values()]


def noise_of(layer: Layer) -> float:
    """The noise level of the call that a layer's observer was shown last.

    Raises:
        ValueError: when the model does not tell one.
    """
    noise = layer.module.seen_noise
    if noise is None:
        raise ValueError(
            f"phases need the noise level of every call, and layer {layer.path!r} was called without one: only "
            "transformers of diffusers, which are told a timestep, have phases"
        )
    return noise
