"""The pass that measures how much the model's output loses when one layer alone is sparse."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from spas_attn.call import Call

from .accumulate import PromptTally, add_check
from .layer import Layer
from .rerun import Rerun
from .tradeoff import KL
from .work import Pass, Work


class SensitivityPass(Pass):
    """The error of the model's output when one layer alone is sparse, over the square of the layer's own error in that
    very call.

    Squares of relative errors, and divergences, grow with the square of the layer's error. ``then`` chooses thresholds
    and names the pass that follows.
    """

    name = "sensitivity"
    compares, samples = True, False

    def __init__(self, work: Work, then: Callable[[Work], Pass]) -> None:
        super().__init__(work)
        self.prompts, self.then = work.fitted[: work.sensitivity], then
        self.probes = [layer.probe(work.grid) for layer in work.layers]
        self.shares = [layer.tradeoff(work.grid).share.double() for layer in work.layers]
        self.own = [0.0] * len(work.layers)  # squared, in the call in progress
        self.found = [(0.0, 0.0)] * len(work.layers)  # sums of the model's error (squared, if relative) and of own
        self.measure = ""

    def candidates(self, layer: Layer) -> int:
        return 2

    def add(self, tally: PromptTally, layer: Layer, call: Call, blocks: list[int]) -> None:
        self.own[layer.index] = 0.0
        if not self.expected or self.probes[layer.index].all_dense:
            return
        layer.module.tuned = self.probes[layer.index]
        add_check(tally, layer.module, call.replace(precision="native"))
        errors = (tally.sums[1] / tally.sums[0].clamp(min=1e-300)).cpu()
        self.own[layer.index] = float((self.shares[layer.index] * errors.square()).sum())

    def close(self, prompt: int) -> None:
        self.drop()

    def compare(self, layers: list[Layer], rerun: Rerun) -> None:
        for layer in self.work.phases.current(layers):
            if own := self.own[layer.index]:
                error = rerun.error({layer.module: self.probes[layer.index]})
                model, known = self.found[layer.index]
                self.found[layer.index] = (model + (error if rerun.measure == KL else error * error), known + own)
        self.measure = rerun.measure or self.measure

    def conclude(self) -> Pass:
        gathered = self.work.gather((self.measure, self.found))
        measure = self.work.objective.measure = next((measure for measure, _ in gathered if measure), None)
        if measure is None:
            warnings.warn(
                "the sensitivities of the layers could not be measured, and all count the same: no call of the model "
                "itself was seen (a part of it was called, or it went on from a cache)",
                RuntimeWarning,
                stacklevel=2,
            )
            return self.then(self.work)
        known: dict[str, list[float]] = {}
        for layer in self.work.layers:
            model, own = (sum(found[layer.index][i] for _, found in gathered) for i in (0, 1))
            layer.sensitivity = model / own if own else None
            if layer.sensitivity is not None:
                known.setdefault(layer.path, []).append(layer.sensitivity)
        everything = [value for values in known.values() for value in values] or [0.0]  # nothing errs at all
        for layer in self.work.layers:
            if layer.sensitivity is None:  # it did not err in these calls: as in its other phases, or as other layers
                values = known.get(layer.path, everything)
                layer.sensitivity = sum(values) / len(values)
        return self.then(self.work)
