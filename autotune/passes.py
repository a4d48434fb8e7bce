"""The passes of a calibration: what each counts of a call, what it concludes from the sums, and which pass follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.distributed as dist

from spas_attn.call import Call

from .accumulate import Grid, PromptTally, Tally, add_check, add_curves, add_pv_curves
from .choose import Layer
from .sampling import Reservoir


@dataclass
class Work:
    """What all passes of one calibration share.

    Attributes:
        fitted, checked: numbers of the prompts for the curves, and of those kept aside for PV pass and check.
    """

    layers: list[Layer]
    grid: Grid
    rounds: int
    fitted: list[int] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()


class Pass:
    """One pass over prompts: ``observe`` counts calls, ``conclude`` uses the sums and names the pass that follows.

    Attributes:
        name: as users read it.
        prompts: numbers of the prompts that it goes over.
        sums: what was counted, layer by layer; None where nothing was.
        open: the same of the prompt in progress.
    """

    name: ClassVar[str]

    def __init__(self, work: Work) -> None:
        self.work, self.prompts = work, work.checked
        self.sums: list[Tally | None] = [None] * len(work.layers)
        self.open: list[PromptTally | None] = [None] * len(work.layers)

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
        tally = self.open[layer.index] or PromptTally(call.q.shape[1], self.candidates(layer), call.q.device)
        self.open[layer.index] = tally
        self.add(tally, layer, call, blocks)

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
                raise RuntimeError(f"layer {layer.path!r} saw no prompt in the {self.name} pass")
            yield layer, total

    def _merge_ranks(self) -> None:
        gathered: list[Any] = [None] * self.work.world
        mine = [(self.sums[layer.index], layer.lengths, layer.check_backend) for layer in self.work.layers]
        dist.all_gather_object(gathered, mine)
        for layer, parts in zip(self.work.layers, zip(*gathered, strict=True), strict=True):
            self.sums[layer.index] = None
            for tally, lengths, backend in parts:
                if tally is not None:
                    self.count(layer, tally)
                layer.saw(*(lengths or ()))
                layer.check_backend = layer.check_backend or backend


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
            layer.choose_first(total, self.work.grid)
        return PVPass(self.work)


class FreePass(CurvePass):
    """The curves without a loop over prompts: every call is a sample of its own, and a reservoir keeps some."""

    name = "free"

    def __init__(self, work: Work, budget: int, seed: int) -> None:
        super().__init__(work)
        self.reservoirs = [Reservoir(budget // len(work.layers), seed + layer.index) for layer in work.layers]

    def observe(self, layer: Layer, call: Call, blocks: list[int]) -> None:
        reservoir = self.reservoirs[layer.index]
        number = reservoir.seen * self.work.world + self.work.rank
        tally = PromptTally(call.q.shape[1], self.candidates(layer), call.q.device)
        self.add(tally, layer, call, blocks)
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
        add_pv_curves(tally, layer.module, call, self.work.grid, blocks)

    def conclude(self) -> Pass:
        for layer, total in self.totals():
            layer.choose_pv(total, self.work.grid)
        return CheckPass(self.work, 1)


class CheckPass(Pass):
    """Errors of the real kernel; heads that miss a bound get tighter ones, and after the last round run dense."""

    name = "check"

    def __init__(self, work: Work, number: int) -> None:
        super().__init__(work)
        self.number = number

    def candidates(self, layer: Layer) -> int:
        return 2

    def add(self, tally: PromptTally, layer: Layer, call: Call, blocks: list[int]) -> None:
        layer.check_backend = add_check(tally, layer.module, call.replace(error_bound=layer.bounds[1]))

    def conclude(self) -> Pass | None:
        last = self.number if self.number == self.work.rounds else 0
        missed = [layer.back_off(total, self.work.grid, last) for layer, total in self.totals()]
        # All are checked again after a miss: what they record belongs to the final thresholds.
        return CheckPass(self.work, self.number + 1) if any(missed) and not last else None
