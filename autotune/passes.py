"""The passes of a calibration: what each counts of a call, what it concludes from the sums, and which pass follows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from spas_attn.call import Call

from .accumulate import Grid, PromptTally, Tally, add_check, add_curves, add_pv_curves
from .layer import NO_MEMORY, Layer
from .objective import Objective
from .phases import Phases, noise_of
from .sampling import Reservoir
from .timing import timed
from .tradeoff import KL

if TYPE_CHECKING:
    from .rerun import Rerun


@dataclass
class Work:
    """What all passes of one calibration share.

    Attributes:
        objective: how thresholds follow from the curves.
        phases: of denoising, each of which has a Layer of its own for every layer of the model.
        precisions: those that every layer chooses from, the most exact one first; none: the modules' own.
        sensitivity: how many of the fitted prompts the layers' sensitivities are measured on; 0 = none.
        fitted, checked: numbers of the prompts for the curves, and of those kept aside for PV pass and check.
        measured: the model's error with all layers sparse, of each comparison on prompts kept aside.
    """

    layers: list[Layer]
    grid: Grid
    rounds: int
    objective: Objective
    sensitivity: int = 0
    precisions: tuple[str, ...] = ()
    phases: Phases = field(default_factory=Phases)
    fitted: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives."""
        if self.world == 1:
            return [mine]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, mine)
        return gathered

    def chosen(self) -> Pass:
        """Choose thresholds from the curves; returns the pass that follows."""
        self.objective.choose(self.layers, self.grid)
        skips = any(layer.bounds[1] is not None for layer in self.layers)
        return PVPass(self) if skips else CheckPass(self, 1)


class Pass:
    """One pass over prompts: ``observe`` counts calls, ``conclude`` uses the sums and names the pass that follows.

    Attributes:
        name: as users read it.
        prompts: numbers of the prompts that it goes over.
        sums: what was counted, layer by layer; None where nothing was.
        open: the same of the prompt in progress.
        expected: whether the transformer's call in progress will be compared.
        compares: whether it looks at what the model gives (``compare``).
        samples: whether it looks at some query blocks of a call only, so that fewer are possible.
    """

    name: ClassVar[str]
    compares: ClassVar[bool] = False
    samples: ClassVar[bool] = True

    def __init__(self, work: Work) -> None:
        self.work, self.prompts = work, work.checked
        self.sums: list[Tally | None] = [None] * len(work.layers)
        self.open: list[PromptTally | None] = [None] * len(work.layers)
        self.expected = False

    def candidates(self, layer: Layer) -> int:
        """How many candidates are judged."""
        raise NotImplementedError

    def add(self, tally: PromptTally, layer: Layer, call: Call, blocks: list[int]) -> None:
        """Count one call."""
        raise NotImplementedError

    def conclude(self) -> Pass | None:
        """Use what all processes counted; returns the next pass, None when the calibration is finished."""
        raise NotImplementedError

    def observe(self, layer: Layer, call: Call, blocks: list[int]) -> None:
        """Count one call of the prompt in progress, looking at some query blocks."""
        found = self.looked_at(layer, call, blocks)
        tally = self.open[layer.index]
        if tally is None or found is None:
            self.open[layer.index] = tally or found
        else:
            tally.absorb(found)

    def looked_at(self, layer: Layer, call: Call, blocks: list[int]) -> PromptTally | None:
        """What one call counts. Where memory does not suffice fewer query blocks are looked at, and where that is no
        help the call is skipped: None.
        """
        while True:
            tally: PromptTally | None = PromptTally(call.q.shape[1], self.candidates(layer), call.q.device)
            try:
                self.add(tally, layer, call, blocks)  # type: ignore[arg-type]
                return tally
            except torch.OutOfMemoryError:  # what it holds is freed below, outside of the error's frames
                tally = None
            if call.q.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(blocks) < 2 or not self.samples:
                layer.skipped += 1
                layer.unseen[NO_MEMORY] += 1
                return None
            blocks = blocks[::2]

    def compare(self, layers: list[Layer], rerun: Rerun) -> None:
        """Look at one call of a transformer with these layers, which has just run dense and can be run again."""

    def count(self, layer: Layer, tally: Tally) -> None:
        """Add what a prompt, or another process, saw."""
        if (known := self.sums[layer.index]) is not None:
            known.merge(tally)
        self.sums[layer.index] = known or tally

    def close(self, prompt: int) -> None:
        """The prompt in progress is finished."""
        for layer in self.work.layers:
            if (tally := self.open[layer.index]) is not None:
                self.count(layer, tally.close(prompt))
        self.drop()

    def drop(self) -> None:
        """Forget the prompt in progress."""
        self.open = [None] * len(self.open)

    def totals(self) -> Iterator[tuple[Layer, Tally]]:
        """Every layer with what all processes counted; each process holds the sums afterwards."""
        if self.work.world > 1:
            self._merge_ranks()
        for layer in self.work.layers:
            total = self.sums[layer.index]
            if total is None:
                phase = f", phase {layer.phase}," if self.work.phases.count > 1 else ""
                raise RuntimeError(f"layer {layer.path!r}{phase} saw no prompt in the {self.name} pass")
            yield layer, total

    def _merge_ranks(self) -> None:
        layers = self.work.layers
        gathered = self.work.gather(
            [(self.sums[x.index], x.lengths, x.shape, x.check_backend, x.measured_ms) for x in layers]
        )
        for layer, parts in zip(layers, zip(*gathered, strict=True), strict=True):
            self.sums[layer.index] = None
            for tally, lengths, shape, backend, measured in parts:
                if tally is not None:
                    self.count(layer, tally)
                layer.saw(*(lengths or ()))
                layer.grow(shape)
                layer.check_backend = layer.check_backend or backend
                layer.measured_ms = layer.measured_ms or measured


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
        return SensitivityPass(self.work) if self.work.sensitivity and self.prompts else self.work.chosen()


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


class SensitivityPass(Pass):
    """The error of the model's output when one layer alone is sparse, over the square of the layer's own error in that
    very call.

    Squares of relative errors, and divergences, grow with the square of the layer's error.
    """

    name = "sensitivity"
    compares, samples = True, False

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.prompts = work.fitted[: work.sensitivity]
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
            return self.work.chosen()
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
        return self.work.chosen()


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
    """Errors of the real kernel; heads that miss a bound get tighter ones, and after the last round run dense."""

    name = "check"
    compares, samples = True, False

    def __init__(self, work: Work, number: int) -> None:
        super().__init__(work)
        self.number = number
        self.timed: set[int] = set()
        self.found: list[float] = []

    def candidates(self, layer: Layer) -> int:
        return 1 + max(1, len(self.work.precisions))

    def add(self, tally: PromptTally, layer: Layer, call: Call, blocks: list[int]) -> None:
        bound = layer.bounds[1] or layer.module.pv_l1
        call = call.replace(error_bound=bound)
        layer.serve()
        layer.check_backend = add_check(tally, layer.module, call, self.work.precisions)
        if layer.index not in self.timed:  # one call of this process speaks for all
            self.timed.add(layer.index)
            layer.measured_ms = timed(layer.module, call)

    def compare(self, layers: list[Layer], rerun: Rerun) -> None:
        current = self.work.phases.current(layers)
        self.found.append(rerun.error({layer.module: layer.in_force() for layer in current}))

    def conclude(self) -> Pass | None:
        last = self.number if self.number == self.work.rounds else 0
        names, grid, missed = self.work.precisions, self.work.grid, []
        for layer, total in self.totals():
            missed.append(layer.back_off(layer.choose_precision(total, names, grid) if names else total, last))
        self.work.measured = [error for found in self.work.gather(self.found) for error in found]
        if not any(bool(wrong.any()) for wrong in missed):
            return None
        self.work.objective.choose_again(self.work.layers, self.work.grid, missed, bool(last))
        # All are checked again after a miss: what they record belongs to the final thresholds.
        return None if last else CheckPass(self.work, self.number + 1)
