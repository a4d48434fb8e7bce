"""The trade-off of a model: what every candidate of every head costs and errs. Targets choose from it; files keep it.

    calibration.tradeoff                            after a calibration
    autotune.load(path)["_metadata"]["tradeoff"]    in a file, read by Tradeoff.read

Shapes, for those who plot it (H heads, C candidates; the index C stands for a head that runs dense):

    tradeoff.layers             one LayerTradeoff per layer, in the model's order; with phases one per layer and phase
        .path, .phase           the layer's path in the model; 0, or the number of the phase (0 = most noise)
        .threshold, .sim        float32 [C], the candidates: thresholds of the selector, and similarity filters
        .density                float16 [H, C], share of the blocks that each keeps
        .error                  float16 [H, C], mean relative L1 error of selection alone
        .allowed                bool [H, C], whether it holds the bounds (guards) with confidence; all, without bounds
        .share                  float32 [H], the head's share of the layer's squared output, sums to 1
        .sensitivity            the model's error when this layer alone errs, over (error of the layer)²; None = 1
        .shape                  (B · Hq, Lq, Lk, D, causal) of the longest call
        .chosen                 int16 [H], the candidates in force
    tradeoff.measure            "KL" or "relative error": of the model's output; None without sensitivities
    tradeoff.target             the target that the thresholds in force were chosen for; None: bounds per head
    tradeoff.predicted          the model's error expected of them (None without sensitivities), and
    tradeoff.measured           as measured on prompts kept aside

``autotune.budget`` computes what a choice gives: ``curve(tradeoff)`` lists (sparsity, predicted error, speedup) of the
whole model from sparse to dense, ``outcome(tradeoff)`` is the point in force.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

KL, RELATIVE = "KL", "relative error"
Shape = tuple[int, int, int, int, bool]  # B · Hq, Lq, Lk, D, causal
_ARRAYS = {  # of a layer: dtype and dimensions
    "threshold": (torch.float32, "C"),
    "sim": (torch.float32, "C"),
    "density": (torch.float16, "HC"),
    "error": (torch.float16, "HC"),
    "allowed": (torch.bool, "HC"),
    "share": (torch.float32, "H"),
    "chosen": (torch.int16, "H"),
}


@dataclass(frozen=True)
class Target:
    """What one budget for the whole model has to reach.

    Attributes:
        name: "sparsity" (mean over layers and heads, at least), "speedup" (of all attention, expected by the cost model
            of this machine, at least) or "error" (predicted for the model's output, at most).
        value: above 0; a sparsity below 1, a speedup above 1.
    """

    name: str
    value: float

    @classmethod
    def of(cls, **targets: float | None) -> Target | None:
        """The one target among sparsity, speedup and error, None when there is none.

        Raises:
            ValueError: when there are several, or one is out of range.
            TypeError: when one is no number.
        """
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"only one of {', '.join(targets)} can be the target, got {given}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            low, high = {"sparsity": (0.0, 1.0), "speedup": (1.0, math.inf), "error": (0.0, math.inf)}[name]
            if not low < value < high:
                raise ValueError(f"{name} must be above {low:g} and below {high:g}, got {value}")
            return cls(name, float(value))
        return None

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"


@dataclass(frozen=True, eq=False)
class LayerTradeoff:
    """The candidates of one layer (in one phase); see the module's text for the shapes."""

    path: str
    threshold: Tensor
    sim: Tensor
    density: Tensor
    error: Tensor
    allowed: Tensor
    share: Tensor
    chosen: Tensor
    sensitivity: float | None = None
    shape: Shape | None = None
    phase: int = 0

    @property
    def heads(self) -> int:
        """H."""
        return len(self.share)

    @property
    def candidates(self) -> int:
        """C."""
        return len(self.threshold)

    def importance(self) -> Tensor:
        """What a head's squared error weighs in the model's predicted error, float64 ``[H]``."""
        return self.share.double() * (1.0 if self.sensitivity is None else self.sensitivity)

    def densities(self) -> Tensor:
        """``density`` with the dense candidate's, float64 ``[H, C + 1]``."""
        return torch.nn.functional.pad(self.density.double(), (0, 1), value=1.0)

    def errors(self) -> Tensor:
        """``error`` with the dense candidate's, float64 ``[H, C + 1]``."""
        return torch.nn.functional.pad(self.error.double(), (0, 1), value=0.0)

    def thresholds_of(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``is_sparse``, ``threshold``, ``sim`` and density ``[H]`` of chosen candidates."""
        dense = chosen.long() == self.candidates
        index = chosen.long().clamp(max=self.candidates - 1)
        density = self.densities().gather(1, chosen.long()[:, None])[:, 0]
        threshold = torch.where(dense, 1.0, self.threshold[index])
        return ~dense, threshold, torch.where(dense, -1.0, self.sim[index]), density


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """The candidates of all layers, and the choice among them that is in force."""

    layers: tuple[LayerTradeoff, ...]
    measure: str | None = None
    target: Target | None = None
    predicted: float | None = None
    measured: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a tuned file holds it: tensors and plain values."""
        fields = [f.name for f in dataclasses.fields(LayerTradeoff)]
        layers = [{name: getattr(layer, name) for name in fields} for layer in self.layers]
        target = None if self.target is None else [self.target.name, self.target.value]
        facts = {name: getattr(self, name) for name in ("measure", "predicted", "measured")}
        return {"layers": layers, "target": target, **facts}

    @classmethod
    def read(cls, content: Any) -> Tradeoff:
        """What :meth:`to_dict` gave; a ValueError that names what is wrong with it."""
        try:
            layers = tuple(_layer(entry) for entry in content["layers"])
            name, value = content["target"] or (None, None)
            target = None if name is None else Target.of(**{name: value})
            facts = {name: _number(name, content[name]) for name in ("predicted", "measured")}
            if content["measure"] not in (None, KL, RELATIVE):
                raise ValueError(f"measure must be {KL!r}, {RELATIVE!r} or None, got {content['measure']!r}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the trade-off is invalid: {type(error).__name__}: {error}") from error
        except ValueError as error:
            raise ValueError(f"the trade-off is invalid: {error}") from error
        return cls(layers, content["measure"], target, **facts)

    def with_choice(self, chosen: Iterable[Tensor], **changes: Any) -> Tradeoff:
        """A copy with other candidates in force, and other facts about them."""
        pairs = zip(self.layers, chosen, strict=True)
        layers = tuple(dataclasses.replace(layer, chosen=index.to(torch.int16)) for layer, index in pairs)
        return dataclasses.replace(self, layers=layers, **changes)


def _layer(entry: dict[str, Any]) -> LayerTradeoff:
    path = entry["path"]
    if not isinstance(path, str):
        raise ValueError(f"path must be text, got {path!r}")
    size = {"H": len(entry["share"]), "C": len(entry["threshold"])}
    for name, (dtype, dims) in _ARRAYS.items():
        array, shape = entry[name], [size[dim] for dim in dims]
        if not isinstance(array, Tensor) or array.dtype != dtype or list(array.shape) != shape:
            raise ValueError(f"{name} of layer {path!r} must be {dtype} {shape}, got {_described(array)}")
        if dtype.is_floating_point and not bool(torch.isfinite(array).all()):
            raise ValueError(f"{name} of layer {path!r} must be finite, got {array.tolist()}")
    if not bool(((entry["chosen"] >= 0) & (entry["chosen"] <= size["C"])).all()):
        raise ValueError(f"chosen of layer {path!r} must be in [0, {size['C']}], got {entry['chosen'].tolist()}")
    if not bool(((entry["density"] >= 0) & (entry["density"] <= 1) & (entry["error"] >= 0)).all()):
        raise ValueError(f"density of layer {path!r} must be in [0, 1], and error 0 or more")
    work = None if entry["shape"] is None else tuple(entry["shape"])
    if work is not None and not (len(work) == 5 and all(isinstance(x, int) and x >= 0 for x in work)):
        raise ValueError(f"shape of layer {path!r} must be (B · Hq, Lq, Lk, D, causal) or None, got {work!r}")
    phase = entry["phase"]
    if isinstance(phase, bool) or not isinstance(phase, int) or phase < 0:
        raise ValueError(f"phase of layer {path!r} must be a number from 0 on, got {phase!r}")
    facts = {"sensitivity": _number("sensitivity", entry["sensitivity"]), "shape": work, "phase": phase}
    return LayerTradeoff(path, **{name: entry[name] for name in _ARRAYS}, **facts)  # type: ignore[arg-type]


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number, 0 or more, or None, got {value!r}")
    return float(value)


def _described(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}" if isinstance(array, Tensor) else type(array).__name__
