"""The passes of a calibration: what each counts of a call, what it concludes from the sums, and which pass follows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from spas_attn.call import Call

from .accumulate import PromptTally, Tally, add_check, add_curves, add_pv_curves
from .layer import Layer, choose_precision
from .phases import Phases, noise_of
from .rerun import Rerun
from .sampling import Reservoir
from .sensitivity import SensitivityPass
from .timing import timed
from .work import Pass, Work


def chosen(work: Work) -> Pass:
    """Choose thresholds from the curves; returns the pass that follows."""
    work.objective.choose(work.layers, work.grid)
    skips = any(layer.bounds[1] is not None for layer in work.layers)
    return PVPass(work) if skips else CheckPass(work, 1)


class LevelsPass(Pass):
    """At which noise levels a model runs, from one prompt: where its phases meet, equally many steps in each."""

    name = "levels"

    def __init__(self, work: Work, phases: Phases, curves: CurvePass) -> None:
        super().__init__(work)
        self.prompts, self.phases, self.curves = work.fitted[:1], phases, curves
        self.found: dict[str, list[float]] = {}

    def observe(self, layer: Layer, call: Call, blocks: list[int]) -> None:
        """Only the level is noted."""
        self.found.setdefault(layer.path, []).append(noise_of(layer))

    def conclude(self) -> Pass:
        for found in self.work.gather(self.found):
            for path, levels in found.items():
                self.phases.divide(path, levels)
        return self.curves


class CurvePass(Pass):
    """Errors and densities of every candidate threshold."""

    name = "curves"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.prompts = work.fitted

    def candidates(self, layer: Layer) -> int:
        return len(self.work.grid.pairs(layer.module.selector))

    def add(self, tally: PromptTally, layer: Layer, call: Call, blocks: list[int]) -> None:
        add_curves(tally, layer.module, call, self.work.grid, blocks)

    def conclude(self) -> Pass:
        for layer, total in self.totals():
            layer.begin(total)
        # Without a loop over prompts there is no prompt to run again.
        return SensitivityPass(self.work, chosen) if self.work.sensitivity and self.prompts else chosen(self.work)


class FreePass(CurvePass):
    """The curves without a loop over prompts: every call is a sample of its own, and a reservoir keeps some."""

    name = "free"

    def __init__(self, work: Work, budget: int, seed: int) -> None:
        super().__init__(work)
        self.reservoirs = [Reservoir(budget // len(work.layers), seed + layer.index) for layer in work.layers]

    def observe(self, layer: Layer, call: Call, blocks: list[int]) -> None:
        reservoir = self.reservoirs[layer.index]
        number = reservoir.seen * self.work.world + self.work.rank
        tally = self.looked_at(layer, call, blocks)
        if tally is None:
            return
        self.count(layer, tally.close(number))
        reservoir.offer(number, call, layer.module.selector, blocks)

    def replay(self, into: Pass) -> None:
        """Show another pass the calls that were kept, each as a prompt of its own."""
        for layer, reservoir in zip(self.work.layers, self.reservoirs, strict=True):
            for number, parts in reservoir.calls:
                for call, blocks in parts:
                    into.observe(layer, call, blocks)
                into.close(number)


class PVPass(Pass):
    """Errors of the chosen selection under every PV threshold."""

    name = "pv"

    def candidates(self, layer: Layer) -> int:
        return len(self.work.grid.pv)

    def add(self, tally: PromptTally, layer: Layer, call: Call, blocks: list[int]) -> None:
        layer.serve()
        add_pv_curves(tally, layer.module, call, self.work.grid, blocks)

    def conclude(self) -> Pass:
        for layer, total in self.totals():
            if layer.bounds[1] is not None:
                layer.choose_pv(total, self.work.grid)
        return CheckPass(self.work, 1)


class CheckPass(Pass):
    """Errors of the real kernel; heads that miss a bound get tighter ones, and after the last round run dense.

    Args:
        number: of the round, from 1.
        known: what rounds before have counted of layers whose thresholds have not changed since, None of others.
    """

    name = "check"
    compares, samples = True, False

    def __init__(self, work: Work, number: int, known: Sequence[Tally | None] = ()) -> None:
        super().__init__(work)
        self.number = number
        self.known = [tally is not None for tally in known] or [False] * len(work.layers)
        if work.rank == 0:  # the sum over ranks has it once
            self.sums = list(known) or self.sums
        for layer in work.layers:
            layer.measured_ms = layer.measured_ms if self.known[layer.index] else None
        self.timed: set[int] = set()
        self.found: list[float] = []

    def candidates(self, layer: Layer) -> int:
        return 1 + max(1, len(self.work.precisions))

    def add(self, tally: PromptTally, layer: Layer, call: Call, blocks: list[int]) -> None:
        if self.known[layer.index]:
            return
        bound = layer.bounds[1] or layer.module.pv_l1
        call = call.replace(error_bound=bound)
        layer.serve()
        layer.check_backend = add_check(tally, layer.module, call, self.work.precisions)
        if layer.index not in self.timed and self._times(layer):  # one call of one process speaks for all
            self.timed.add(layer.index)
            layer.measured_ms = timed(layer.module, call)

    def _times(self, layer: Layer) -> bool:
        """Whether this process is the one that times a layer: those that have prompts share the layers out."""
        ranks = sorted({prompt % self.work.world for prompt in self.prompts}) or [self.work.rank]
        return ranks[layer.index % len(ranks)] == self.work.rank

    def count(self, layer: Layer, tally: Tally) -> None:
        if not self.known[layer.index] or self.sums[layer.index] is None:
            super().count(layer, tally)

    def compare(self, layers: list[Layer], rerun: Rerun) -> None:
        current = self.work.phases.current(layers)
        self.found.append(rerun.error({layer.module: layer.in_force() for layer in current}))

    def conclude(self) -> Pass | None:
        last = self.number if self.number == self.work.rounds else 0
        grid, missed = self.work.grid, []
        totals, before = list(self.totals()), [layer.in_force() for layer in self.work.layers]
        for layer, check in zip(self.work.layers, self._checks(totals), strict=True):
            missed.append(layer.back_off(check, last))
        self.work.measured = [error for found in self.work.gather(self.found) for error in found]
        if not any(bool(wrong.any()) for wrong in missed):
            return None
        self.work.objective.choose_again(self.work.layers, grid, missed, bool(last))
        # What is recorded belongs to the final thresholds: layers whose thresholds changed are checked again.
        same = [layer.in_force().equals(old) for layer, old in zip(self.work.layers, before, strict=True)]
        known = [total if same[layer.index] else None for layer, total in totals]
        return None if last else CheckPass(self.work, self.number + 1, known)

    def _checks(self, totals: Sequence[tuple[Layer, Tally]]) -> list[Tally]:
        """What was counted of every layer, in the precision that its module takes where there is a choice."""
        if not self.work.precisions:
            return [total for _, total in totals]
        found: list[Tally] = []
        for _, group in itertools.groupby(totals, key=lambda pair: pair[0].path):
            units, checks = zip(*group, strict=True)
            found += choose_precision(units, checks, self.work.precisions, self.work.grid)
        return found
