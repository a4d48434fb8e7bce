"""Tuned: the tuned state of one layer, one frozen value, so that keeping and restoring it is one assignment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from spas_attn.checks import per_head
from spas_attn.selectors import Selector
from spas_attn.selectors.by_head import for_heads

from .tradeoff import Tradeoff

Bounds = tuple[float | None, float | None, float | None]  # l1, pv_l1, tail; l1 and pv_l1 are None for a budget without
PV_OFF = 50.0  # log2 of a probability ratio; far below float32 resolution, so nothing is skipped
# What a tuned file, and users of the original, call the fields of Tuned.
FILE_KEYS = {"is_sparse": "is_sparse", "cdfthreshd": "threshold", "simthreshd1": "sim", "pvthreshd": "pv"}


def check_bounds(l1: float | None, pv_l1: float | None, tail: float | None, *, guards: bool = False) -> None:
    """Reject invalid bounds; valid are 0 < l1 < pv_l1, and tail > 0 or None; as guards of a budget l1 and pv_l1 may be
    None together.
    """
    if guards and l1 is None and pv_l1 is None:
        l1, pv_l1 = 1.0, 2.0  # nothing to check
    for name, bound in (("l1", l1), ("pv_l1", pv_l1), ("tail", 1.0 if tail is None else tail)):
        if isinstance(bound, bool) or not isinstance(bound, Real):
            raise TypeError(f"{name} must be a number (a relative error){' or None' * (name == 'tail')}, got {bound!r}")
    assert l1 is not None and pv_l1 is not None  # else there was a TypeError
    if not l1 > 0:
        raise ValueError(f"l1 must be above 0 (a relative error), got {l1}")
    if not pv_l1 > l1:
        raise ValueError(
            f"pv_l1 bounds selection, PV skip and quantisation together: it must exceed l1={l1}, got {pv_l1}"
        )
    if tail is not None and not tail > 0:
        raise ValueError(f"tail must be above 0 (a relative error of one query) or None for off, got {tail}")


@dataclass(frozen=True, eq=False)
class Tuned:
    """The tuned state of one layer. Whatever follows from it is computed here, once, and never asked of the device.

    Attributes:
        is_sparse: bool ``[heads]``; the other heads keep every block. With phases all tensors are ``[phases, heads]``.
        threshold: float32 ``[heads]``, what the selector's levels are compared with.
        sim: float32 ``[heads]``, similarity filter; 0 or less is off.
        pv: float32 ``[heads]``, PV skip; ``PV_OFF`` or more is off.
        expected_density: mean share of kept blocks, for the choice of the backend; None when unknown.
        lengths: fewest and most keys that were calibrated, None when unknown.
        bounds: l1, pv_l1 and tail that the thresholds were checked against, None when they were not.
        calibrated: False for a selector's own thresholds, which nothing was measured for.
        checked: False for thresholds that were chosen from a trade-off afterwards: their errors are those of the
            calibration's curves, and the real kernel was not checked with them.
        tradeoff: the whole model's, from which they were chosen, for files; None when unknown.
        edges: noise levels at which the phases of a diffusion model meet, falling; empty without phases.
        densities: of the phases, as ``expected_density``.
        part: which heads of how many these are, where it is not all of them.
        all_dense, filters, skips: no head is sparse; some sparse head has a similarity filter; some has PV skip.

    Raises:
        ValueError: when a tensor is not ``[heads]``, or ``[phases, heads]``, or not finite.
    """

    is_sparse: Tensor
    threshold: Tensor
    sim: Tensor
    pv: Tensor
    expected_density: float | None = None
    lengths: tuple[int, int] | None = None
    bounds: Bounds | None = None
    calibrated: bool = True
    checked: bool = True
    tradeoff: Tradeoff | None = field(default=None, repr=False)
    edges: tuple[float, ...] = ()
    densities: tuple[float | None, ...] = ()
    part: tuple[tuple[int, ...], int] | None = None
    all_dense: bool = field(init=False)
    filters: bool = field(init=False)
    skips: bool = field(init=False)
    _served: dict[torch.device, tuple[Selector, Selector, Tensor]] = field(init=False, repr=False)
    _shares: dict[tuple[int, int], Tuned] = field(init=False, repr=False)
    _phases: dict[int, Tuned] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = {name: getattr(self, name).detach() for name in FILE_KEYS.values()}
        shape = [*([len(self.edges) + 1] if self.edges else []), *self.is_sparse.shape[-1:]]
        for name, value in values.items():
            if list(value.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
            if not bool(torch.isfinite(value.float()).all()):
                raise ValueError(f"{name} must be finite, got {value.tolist()}")
            dtype = torch.bool if name == "is_sparse" else torch.float32
            object.__setattr__(self, name, value.to(dtype, copy=True))
        sparse = self.is_sparse
        object.__setattr__(self, "all_dense", not bool(sparse.any()))
        object.__setattr__(self, "filters", bool((self.sim[sparse] > 0).any()))  # no similarity is negative
        object.__setattr__(self, "skips", bool((self.pv[sparse] < PV_OFF).any()))
        object.__setattr__(self, "_served", {})
        object.__setattr__(self, "_shares", {})
        object.__setattr__(self, "_phases", {})

    @classmethod
    def dense(cls, heads: int) -> Tuned:
        """The state in which every head keeps everything."""
        one = torch.ones(heads)
        return cls(torch.zeros(heads, dtype=torch.bool), one, -one, PV_OFF * one)

    @classmethod
    def own(cls, selector: Selector, heads: int) -> Tuned:
        """A selector's own thresholds, as the state of a layer with this many query heads; nothing is calibrated."""
        cpu = torch.device("cpu")
        dense = torch.zeros(heads, dtype=torch.bool) if selector.dense_heads is None else selector.dense_heads.cpu()
        threshold = per_head(selector.threshold, heads, selector.tuned, cpu)
        sim = per_head(getattr(selector, "sim_threshold", -1.0), heads, "sim_threshold", cpu)
        pv = torch.full((heads,), PV_OFF)
        return cls(~dense, threshold, sim, pv, expected_density=selector.expected_density, calibrated=False)

    @classmethod
    def joined(cls, phases: Sequence[Tuned], edges: tuple[float, ...]) -> Tuned:
        """The states of the phases as one; what else they say is the first one's, and the mean of the densities."""
        tensors: dict[str, Any] = {
            name: torch.stack([getattr(phase, name) for phase in phases]) for name in FILE_KEYS.values()
        }
        densities = tuple(phase.expected_density for phase in phases)
        known = [density for density in densities if density is not None]
        mean = sum(known) / len(known) if known else None
        more: dict[str, Any] = dict(edges=edges, densities=densities, expected_density=mean)
        return dataclasses.replace(phases[0], **tensors, **more)

    def equals(self, other: Tuned) -> bool:
        """Whether both have the same thresholds, to the bit."""
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in FILE_KEYS.values())

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.is_sparse.shape[-1]

    def phase_of(self, noise: float | None) -> int:
        """The phase of a noise level (1 = pure noise), 0 the noisiest.

        Raises:
            RuntimeError: when there are phases and the level is not known.
        """
        if not self.edges:
            return 0
        if noise is None:
            raise RuntimeError(
                "this layer has thresholds for each phase of denoising, and its call came without a noise level: its "
                "model does not tell one (only transformers of diffusers do)"
            )
        return sum(noise < edge for edge in self.edges)

    def at(self, phase: int) -> Tuned:
        """The state of one phase; itself without phases."""
        if not self.edges:
            return self
        known = self._phases.get(phase)
        if known is None:
            part: dict[str, Any] = {name: getattr(self, name)[phase] for name in FILE_KEYS.values()}
            part["expected_density"] = self.densities[phase] if self.densities else self.expected_density
            known = self._phases[phase] = dataclasses.replace(self, **part, edges=(), densities=())
        return known

    def at_noise(self, noise: float | Tensor | None) -> Tuned:
        """The state of a noise level; of one that only the device knows, itself."""
        return self if isinstance(noise, Tensor) else self.at(self.phase_of(noise))

    @property
    def origin(self) -> str:
        """Where the thresholds come from, and what of them was checked, in words."""
        if not self.calibrated:
            return "the selector's own thresholds; nothing was measured for them"
        bounds = [f"{n} {x:g}" for n, x in zip(("l1", "pv_l1", "tail"), self.bounds or (), strict=False) if x]
        held = f" ({', '.join(bounds)})" if bounds else ""
        if self.checked:
            return f"checked with the real kernel{held}" if self.bounds else "of unknown origin"
        return f"errors are those of the calibration's curves{held}; this choice was not checked with the real kernel"

    def to(self, device: torch.device) -> Tuned:
        """The same on another device."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in FILE_KEYS.values()})

    def share(self, rank: int, size: int) -> Tuned:
        """The state of the heads that one of ``size`` ranks holds, equal parts in order.

        Raises:
            ValueError: when the heads do not divide.
        """
        known = self._shares.get((rank, size))
        if known is None:
            heads = self.heads
            if heads % size or not 0 <= rank < size:
                raise ValueError(f"rank {rank} of {size} has no equal share of {heads} heads")
            own = range(rank * heads // size, (rank + 1) * heads // size)
            tensors = {name: getattr(self, name)[..., own.start : own.stop] for name in FILE_KEYS.values()}
            known = dataclasses.replace(self, **tensors, part=(tuple(own), heads))
            self._shares[rank, size] = known
        return known

    def serve(
        self, selector: Selector, device: torch.device, noise: float | Tensor | None = None
    ) -> tuple[Selector, Tensor]:
        """``selector`` with these thresholds, and the PV thresholds ``[heads]``, on ``device``; dense heads keep all.

        Made once for each device: a call must not wait for copies, nor launch kernels for a few numbers.

        Args:
            noise: with phases, the noise level of the call; under torch.compile a tensor on ``device``, so that a new
                level compiles nothing.
        """
        if torch.compiler.is_compiling():  # a traced graph must not depend on what is kept here
            return self._serve(selector, *self._values(device, noise))
        if self.edges:
            assert not isinstance(noise, Tensor)
            return self.at(self.phase_of(noise)).serve(selector, device)
        known = self._served.get(device)
        if known is None or known[0] is not selector:
            known = self._served[device] = (selector, *self._serve(selector, *self._values(device, None)))
        return known[1:]

    def _values(self, device: torch.device, noise: float | Tensor | None) -> list[Tensor]:
        """The four tensors ``[heads]`` on ``device``, of the phase of a noise level where there are phases."""
        values = [getattr(self, name).to(device) for name in FILE_KEYS.values()]
        if not self.edges:
            return values
        if not isinstance(noise, Tensor):
            return [value[self.phase_of(noise)] for value in values]
        phase = (noise < torch.tensor(self.edges, device=device)).sum()
        return [value.index_select(0, phase[None])[0] for value in values]

    def _serve(
        self, selector: Selector, sparse: Tensor, threshold: Tensor, sim: Tensor, pv: Tensor
    ) -> tuple[Selector, Tensor]:
        if self.part is not None:
            selector = for_heads(selector, *self.part)
        if hasattr(selector, "sim_threshold"):
            filters = torch.where(sparse, sim, -1.0) if self.filters else -1.0
            selector = dataclasses.replace(selector, sim_threshold=filters)  # type: ignore[call-arg]
        return selector.tuned_to(threshold, sparse), torch.where(sparse, pv, PV_OFF)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors on devices that a copy in another process may not have.
        return vars(self) | {"_served": {}, "_shares": {}, "_phases": {}}
