"""What the passes of a calibration share, and what every pass is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist

from spas_attn.call import Call

from .accumulate import Grid, PromptTally, Tally
from .layer import NO_MEMORY, Layer
from .objective import Objective
from .phases import Phases
from .roll_call import RollCall

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
        roll_call: between the processes, while the calibration runs; None for one process.
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
    roll_call: RollCall | None = None

    def __post_init__(self) -> None:
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def gather(self, mine: Any) -> list[Any]:
        """What every process gives."""
        if self.world == 1:
            return [mine]
        if self.roll_call is not None:
            self.roll_call.meet()
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, mine)
        return gathered


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
