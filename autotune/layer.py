"""What a calibration knows of one layer, and how it chooses the layer's thresholds from it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .curves import PromptTally, Tally
from .module import BUFFERS, PV_OFF, SparseAttention, Thresholds
from .observe import Grid, Reservoir
from .search import choose, mean_error, tail_error, within_bounds

MARGIN = 0.9  # a head that misses its bound aims this far below it the next time
_STATE = (
    *BUFFERS,
    "mode",
    "l1",
    "pv_l1",
    "tail",
    "expected_density",
    "lengths",
    "_all_dense",
    "_filters",
    "_skips",
    "_served",
    "_warned_length",
)


class Layer:
    """What the calibration knows of one layer.

    Attributes:
        curves, pv, check: what each pass counted.
        open: of the prompt in progress; calls: how many calls it made.
        lengths: smallest and largest number of keys.
        reasons: per head, why it runs dense.
        tighter: ``[H]``, factor on the bounds of heads that missed them; 0 = runs dense.
    """

    def __init__(self, index: int, path: str, module: SparseAttention, budget: int, seed: int) -> None:
        self.index, self.path, self.module = index, path, module
        self.reservoir = Reservoir(budget, seed + index)
        self.check_backend = ""
        self.reasons: list[str] = []
        self.tighter: Tensor | None = None
        self._before: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Drop everything seen so far."""
        self.curves: Tally | None = None
        self.pv: Tally | None = None
        self.check: Tally | None = None
        self.open: PromptTally | None = None
        self.calls = 0
        self.lengths: tuple[int, int] | None = None
        self.reservoir = Reservoir(self.reservoir.budget, self.reservoir.seed)

    def saw(self, k_len: int) -> None:
        """Remember the number of keys."""
        shortest, longest = self.lengths or (k_len, k_len)
        self.lengths = (min(shortest, k_len), max(longest, k_len))

    def add(self, phase: str, tally: Tally) -> None:
        """Count what a prompt, or another process, saw in a pass."""
        known = getattr(self, phase)
        if known is None:
            setattr(self, phase, tally)
        else:
            known.merge(tally)

    def close(self, phase: str, prompt: int) -> None:
        """Count the prompt in progress, which is finished."""
        assert self.open is not None
        self.add(phase, self.open.close(prompt))
        self.open = None

    def resume(self, tally: Tally, lengths: tuple[int, int] | None, *, counts: bool) -> None:
        """Take over curves of an interrupted run; ``counts`` is False where another process counts them."""
        for length in lengths or ():
            self.saw(length)
        if self.module.is_sparse is None:
            self.module.set_heads(tally.heads)
        if counts:
            self.add("curves", tally)

    def remember_module(self) -> None:
        """Keep the module's state for :meth:`restore_module`."""
        self._before = {name: getattr(self.module, name) for name in _STATE}

    def restore_module(self) -> None:
        """Undo everything that the calibration did to the module."""
        for name, value in self._before.items():
            setattr(self.module, name, value)

    def choose_first(self, grid: Grid) -> None:
        """Thresholds from the curves, without PV skip."""
        assert self.curves is not None
        heads = self.curves.heads
        self.tighter = torch.ones(heads, dtype=torch.float64)
        self.reasons = [""] * heads
        self._choose(grid, torch.full((heads,), PV_OFF))

    def choose_pv(self, grid: Grid) -> None:
        """The PV threshold that skips most within ``pv_l1`` and ``tail``."""
        assert self.pv is not None
        mean = torch.full((self.pv.heads,), self.module.pv_l1, dtype=torch.float64)
        tail = None if self.module.tail is None else torch.full_like(mean, self.module.tail)
        good = within_bounds(self.pv, mean, tail)
        lowest = torch.where(good, torch.tensor(grid.pv), PV_OFF).amin(1)
        self._choose(grid, lowest)

    def back_off(self, grid: Grid, last_after: int | None) -> bool:
        """Tighten the bounds of sparse heads that missed one in the check; says whether there were any.

        Args:
            grid: candidate thresholds.
            last_after: None, or in the last round how many there were: then such heads become dense instead.
        """
        assert self.check is not None and self.tighter is not None
        values = self.module.thresholds()
        excess = mean_error(self.check)[:, 1] / self.module.pv_l1
        if self.module.tail is not None:
            excess = torch.maximum(excess, tail_error(self.check)[:, 1] / self.module.tail)
        excess = excess.nan_to_num(nan=torch.inf)
        wrong = (excess > 1) & values.is_sparse.cpu()
        if not bool(wrong.any()):
            return False
        factor = MARGIN / excess if last_after is None else torch.zeros_like(excess)
        self.tighter = torch.where(wrong, self.tighter * factor, self.tighter)
        if last_after is not None:
            for head in wrong.nonzero()[:, 0].tolist():
                self.reasons[head] = f"missed a bound {last_after} times in the check with the real kernel"
        self._choose(grid, torch.where(wrong, PV_OFF, values.pvthreshd.cpu()))
        return True

    def _choose(self, grid: Grid, pv: Tensor) -> None:
        """Thresholds of least density within the (possibly tightened) bounds."""
        curves, module = self.curves, self.module
        assert curves is not None and self.tighter is not None
        tail = None if module.tail is None else module.tail * self.tighter
        choice = choose(curves, module.l1 * self.tighter, tail)
        pairs = torch.tensor([grid.pair(int(i)) for i in choice.index], dtype=torch.float64)
        sparse = choice.found & (self.tighter > 0)
        for head in (~sparse).nonzero()[:, 0].tolist():
            self.reasons[head] = self.reasons[head] or "no candidate threshold holds the bounds"
        density = torch.where(sparse, curves.density().gather(1, choice.index[:, None])[:, 0], 1.0)
        values = Thresholds(
            sparse,
            torch.where(sparse, pairs[:, 1], 1.0).float(),
            torch.where(sparse, pairs[:, 0], -1.0).float(),
            torch.where(sparse, pv.double(), PV_OFF).float(),
        )
        module.set_thresholds(values, expected_density=float(density.mean()), lengths=self.lengths)
        module.mode = "tune"

    def record_density(self) -> None:
        """Tell the module which density the check measured, for the choice of the backend."""
        assert self.check is not None
        sparse = self.module.thresholds().is_sparse.cpu()
        density = torch.where(sparse, self.check.density()[:, 1], 1.0)
        self.module.expected_density = float(density.mean())


def merge_ranks(layers: list[Layer], phase: str, world: int) -> None:
    """Add up what all processes saw in a pass; each holds the sum afterwards."""
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, [(getattr(layer, phase), layer.lengths, layer.check_backend) for layer in layers])
    for layer, parts in zip(layers, zip(*gathered, strict=True), strict=True):
        setattr(layer, phase, None)
        for tally, lengths, backend in parts:
            if tally is not None:
                layer.add(phase, tally)
            for length in lengths or ():
                layer.saw(length)
            layer.check_backend = layer.check_backend or backend
        total = getattr(layer, phase)
        if total is None:
            raise RuntimeError(f"layer {layer.path!r} saw no prompt in the {phase} pass")
        if layer.module.is_sparse is None:
            layer.module.set_heads(total.heads)
