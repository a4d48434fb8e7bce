"""What a calibration knows of one layer, and how the layer's thresholds follow from it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from spas_attn.call import Call
from spas_attn.checks import HEAD_DIMS
from spas_attn.selectors import Selector

from .accumulate import Grid, Tally
from .choose import least, mean_error, tail_error, within_bounds
from .machine import times
from .module import DEFAULT_L1, DEFAULT_PV_L1, FULL_MASK, SCHEDULED, SHORT, SparseAttention
from .paths import transformers_of
from .tradeoff import LayerTradeoff, Shape
from .tuned import PV_OFF, Bounds, Tuned
from .ulysses import deepspeed_ranks

SKIPPED_STEP = "its step is not observed (every)"
NO_MEMORY = "there was no memory to look at it"
MARGIN = 0.9  # a head that misses its bound aims this far below it the next time
MISSED = "missed a bound"
NOTHING_HOLDS = "no candidate threshold holds the bounds"
NOT_WORTH_IT = "the budget is better spent on other heads"
DENSE_IS_FASTER = "dense attention of the whole layer is expected to be faster on this machine"
# A layer's sensitivity is measured with each head at the sparsest candidate of at most this mean error: enough for the
# model's answer to stand out from rounding, little enough for errors to act like small ones.
PROBE = 0.1


class Layer:
    """What a calibration knows of one layer, in one phase where there are several, and how it chooses the layer's
    thresholds from it.

    Attributes:
        phase: its number; 0 without phases.
        tuned: the thresholds chosen last, on the CPU.
        curves, check: what those passes counted.
        lengths: fewest and most keys, padding left out.
        shape: of the longest call, see :data:`autotune.tradeoff.Shape`.
        device: where its calls were, None before the first.
        calls: how many calls of the prompt in progress were looked at.
        unseen: calls of that prompt that were not looked at, by reason.
        skipped: calls of all prompts that memory did not suffice to look at.
        reasons: per head, why it runs dense.
        tighter: ``[H]``, factor on the bounds of heads that missed them; 0 = runs dense.
        chosen: int64 ``[H]``, the candidates in force; their number = dense.
        sensitivity: see :class:`autotune.tradeoff.LayerTradeoff`.
        precision: the chosen one, None for the module's own.
        check_backend: name of the backend that the check ran on.
        measured_ms: of one call of the check, dense and sparse; see :func:`autotune.timing.timed`.
    """

    def __init__(self, index: int, path: str, module: SparseAttention, bounds: Bounds, phase: int = 0) -> None:
        self.index, self.path, self.module, self.bounds, self.phase = index, path, module, bounds, phase
        self.tuned: Tuned | None = None
        self._served: tuple[Tuned | None, Tuned | None] | None = None  # as chosen, and on the module's device
        self.curves: Tally | None = None
        self.check: Tally | None = None
        self.lengths: tuple[int, int] | None = None
        self.shape: Shape | None = None
        self.device: torch.device | None = None
        self.calls = self.skipped = 0
        self.unseen: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.tighter = torch.ones(0, dtype=torch.float64)
        self.chosen = torch.zeros(0, dtype=torch.long)
        self.sensitivity: float | None = None
        self.precision: str | None = None
        self.check_backend = ""
        self.measured_ms: tuple[float, float] | None = None

    # -- what it has seen ---------------------------------------------------------------------------------------------

    def saw(self, *lengths: int) -> None:
        """Remember numbers of keys."""
        lengths = (*(self.lengths or ()), *lengths)
        self.lengths = (min(lengths), max(lengths)) if lengths else None

    def note(self, call: Call) -> None:
        """Remember the lengths and the shape of a call."""
        real = [call.k_len] if call.key_mask is None else call.key_mask.sum(-1).tolist()
        self.saw(*(length for length in real if length))
        self.device = call.q.device
        batch, heads, q_len, dim = call.q.shape
        self.grow((batch * heads, q_len, call.k_len, dim, call.is_causal))

    def grow(self, shape: Shape | None) -> None:
        """Remember a shape if it is that of the longest call so far."""
        if shape is not None and (self.shape is None or _work(shape) > _work(self.shape)):
            self.shape = shape

    def why_unseen(self, every: int, fallbacks: Iterable[str]) -> str:
        """Why no call of the prompt in progress was looked at.

        Args:
            every: which steps are observed.
            fallbacks: reasons for which calls of the model fell back to dense attention meanwhile.
        """
        block = self.module.selector.block_q
        texts = {
            SHORT: f"its calls had fewer than {block} queries, one block; use longer prompts",
            SCHEDULED: "its calls were dense by schedule; use fewer dense_steps or more steps",
            SKIPPED_STEP: f"every={every} left all of its calls out; use a smaller number or more steps",
            NO_MEMORY: f"{NO_MEMORY}; use shorter prompts",
            FULL_MASK: FULL_MASK,
        }
        found = [texts[reason] for reason in self.unseen if reason != SHORT or len(self.unseen) == 1]
        found = found or [f"calls ran dense: {reason}" for reason in fallbacks]
        if not found and self.path.startswith("transformer_2."):
            found = ["no step of this run reached the second transformer; use more steps"]
        return "; ".join(found) or (
            f"its attention was never called: the model was not run, its input was shorter than {block} tokens, or its "
            "attention implementation or processor was changed after patch() (modify_model.verify(model) tells)"
        )

    # -- choices ------------------------------------------------------------------------------------------------------

    def begin(self, curves: Tally) -> None:
        """Take what the curves counted; nothing is chosen yet."""
        self.curves = curves
        self.tighter = torch.ones(curves.heads, dtype=torch.float64)
        self.reasons = [""] * curves.heads

    def allowed(self) -> Tensor:
        """Candidates within the (possibly tightened) bounds, bool ``[H, candidates]``."""
        assert self.curves is not None
        l1, _, tail = self.bounds
        limits = [None if bound is None else bound * self.tighter for bound in (l1, tail)]
        return within_bounds(self.curves, *limits) & (self.tighter > 0)[:, None]

    def tradeoff(self, grid: Grid, *, equal_shares: bool = False) -> LayerTradeoff:
        """Its candidates, for a budget and for the file; with ``equal_shares`` every head counts the same."""
        curves = self.curves
        assert curves is not None
        sim, threshold = torch.tensor(grid.pairs(self.module.selector), dtype=torch.float32).T
        output = curves.total()[0]  # Σ|exact| of each head
        share = torch.ones_like(output) if equal_shares else output.square()
        error = mean_error(curves).nan_to_num(nan=10.0).clamp(max=1e4).half()
        chosen = self.chosen if len(self.chosen) else torch.full((curves.heads,), curves.candidates)
        return LayerTradeoff(
            self.path, threshold.contiguous(), sim.contiguous(), curves.density().half(), error, self.allowed(),
            (share / share.sum().clamp(min=1e-300)).float(), chosen.to(torch.int16), self.sensitivity, self.shape,
            self.phase,
        )  # fmt: skip

    def probe(self, grid: Grid) -> Tuned:
        """The state at which its sensitivity is measured."""
        assert self.curves is not None
        error = mean_error(self.curves).nan_to_num(nan=torch.inf)
        good = error <= error.amin(1, keepdim=True).clamp(min=PROBE)  # where none is that good, the best one
        index, found = least(self.curves, good)
        chosen = torch.where(found, index, self.curves.candidates)
        return self._tuned(chosen, grid, torch.full((len(chosen),), PV_OFF))

    def choose_within(self, grid: Grid, pv: Tensor) -> None:
        """Thresholds of least density within the bounds."""
        assert self.curves is not None
        index, found = least(self.curves, self.allowed())
        self.take(torch.where(found, index, self.curves.candidates), grid, pv, NOTHING_HOLDS)

    def take(self, chosen: Tensor, grid: Grid, pv: Tensor, why_dense: str) -> None:
        """Candidates ``[H]`` in force, their number = dense, with PV thresholds; the reason is that of dense heads."""
        assert self.curves is not None
        none_allowed = ~self.allowed().any(1)
        for head in ((chosen == self.curves.candidates) & ~self.fixed()).nonzero()[:, 0].tolist():
            if not self.reasons[head].startswith(MISSED):
                self.reasons[head] = NOTHING_HOLDS if none_allowed[head] else why_dense
        self.chosen, self.tuned = chosen, self._tuned(chosen, grid, pv)

    def _tuned(self, chosen: Tensor, grid: Grid, pv: Tensor) -> Tuned:
        assert self.curves is not None
        candidates = self.curves.candidates
        sparse, index = (chosen < candidates) | self.fixed(), chosen.clamp(max=candidates - 1)
        sim, threshold = torch.tensor(grid.pairs(self.module.selector), dtype=torch.float64)[index].T
        density = torch.where(sparse, self.curves.density().gather(1, index[:, None])[:, 0], 1.0)
        return Tuned(
            sparse,
            torch.where(sparse, threshold, 1.0),
            torch.where(sparse, sim, -1.0),
            torch.where(sparse, pv.double(), PV_OFF),
            expected_density=float(density.mean()),
            lengths=self.lengths,
            bounds=self.bounds,
        )

    def choose_pv(self, curves: Tally, grid: Grid) -> None:
        """The PV threshold that skips most within ``pv_l1`` and ``tail``."""
        _, pv_l1, tail = self.bounds
        assert pv_l1 is not None
        mean = torch.full((curves.heads,), pv_l1, dtype=torch.float64)
        good = within_bounds(curves, mean, None if tail is None else torch.full_like(mean, tail))
        pv = torch.where(good, torch.tensor(grid.pv), PV_OFF).amin(1)
        self.tuned = dataclasses.replace(self.in_force(), pv=torch.where(self.is_sparse(), pv, PV_OFF))

    def expected_ms(self, precision: str) -> float:
        """Milliseconds that a call at the thresholds in force takes; infinite where the cost model has no row."""
        module, density = self.module, self.in_force().expected_density
        found = self.shape and times(self.shape, self.device or module._device, precision, module.selector)
        return found.sparse(1.0 if density is None else density) if found else math.inf

    def holds(self, check: Tally, grid: Grid) -> bool:
        """Whether everything (candidate 1) is within the bounds of all sparse heads.

        Without a bound on everything, quantisation may raise the layer's error by a sixth, as the usual bounds do
        (``pv_l1`` over ``l1``).
        """
        _, pv_l1, tail = self.bounds
        sparse, mean = self.is_sparse() & ~self.fixed(), mean_error(check)
        good = mean[:, 1].isfinite()
        if pv_l1 is not None:
            good &= mean[:, 1] <= pv_l1
        if tail is not None:
            good &= tail_error(check)[:, 1] <= tail
        if not bool((good | ~sparse).all()):
            return False
        if pv_l1 is not None:
            return True
        share = self.tradeoff(grid).share.double()
        selection, everything = ((share * mean[:, i].square())[sparse].sum().sqrt() for i in (0, 1))
        return bool(everything <= selection * DEFAULT_PV_L1 / DEFAULT_L1)

    def back_off(self, check: Tally, last: int) -> Tensor:
        """Tighten the bounds of sparse heads that missed one in the check; says which did, bool ``[H]``.

        In the last round, whose number ``last`` is then (else 0), such heads are to become dense instead.
        """
        self.check = check
        _, pv_l1, tail = self.bounds
        mean = mean_error(check)[:, 1]
        excess = mean / pv_l1 if pv_l1 is not None else torch.zeros_like(mean)
        if tail is not None:
            excess = torch.maximum(excess, tail_error(check)[:, 1] / tail)
        excess = excess.masked_fill(~mean.isfinite(), torch.inf).nan_to_num(nan=torch.inf)
        wrong = (excess > 1) & self.is_sparse() & ~self.fixed()
        factor = torch.zeros_like(excess) if last else MARGIN / excess
        self.tighter = torch.where(wrong, self.tighter * factor, self.tighter)
        for head in wrong.nonzero()[:, 0].tolist() if last else []:
            self.reasons[head] = f"{MISSED} {last} times in the check with the real kernel"
        return wrong

    def is_sparse(self) -> Tensor:
        """Sparse heads of the choice in force, bool ``[H]``, on the CPU."""
        return self.in_force().is_sparse.cpu()

    def fixed(self) -> Tensor:
        """Heads whose rule stays as it is, whatever its error, bool ``[H]``: no bound makes them dense."""
        return fixed_heads(self.module.selector, len(self.tighter))

    def in_force(self) -> Tuned:
        """The thresholds chosen last."""
        assert self.tuned is not None
        return self.tuned

    def serve(self) -> None:
        """Let the module use them."""
        if self._served is None or self._served[0] is not self.tuned:
            self.module.tuned = self.tuned
            self._served = (self.tuned, self.module.tuned)
        elif self.module.tuned is not self._served[1]:  # another phase was served meanwhile
            self.module.tuned = self._served[1]

    def finish(self, **facts: Any) -> Tuned:
        """The thresholds with the density that the check measured, for the choice of the backend, and with other facts
        about them. The module takes bounds and precision.
        """
        assert self.check is not None
        module = self.module
        density = torch.where(self.is_sparse(), self.check.density()[:, 1], 1.0)
        l1, pv_l1, tail = self.bounds
        if l1 is not None and pv_l1 is not None:
            module.l1, module.pv_l1, module.tail = l1, pv_l1, tail
        module.precision = self.precision or module.precision
        self.tuned = dataclasses.replace(self.in_force(), expected_density=float(density.mean()), **facts)
        return self.tuned


def choose_precision(units: Sequence[Layer], checks: Sequence[Tally], names: Sequence[str], grid: Grid) -> list[Tally]:
    """Give a module's units (its phases) the precision of least time in which all of them hold their bounds.

    Where the cost model has no row for this machine, fewer bits count as faster.

    Args:
        checks: of each unit, candidate 0 is selection alone, the following everything in each of the precisions.
        names: those, the most exact one first.

    Returns:
        The checks of that precision alone.
    """
    order = sorted(range(len(names)), key=lambda i: (sum(unit.expected_ms(names[i]) for unit in units), -i))

    def picked(i: int) -> list[Tally]:
        return [check.pick([0, 1 + i]) for check in checks]

    def hold(i: int) -> bool:
        return all(unit.holds(check, grid) for unit, check in zip(units, picked(i), strict=True))

    number = next((i for i in order if hold(i)), 0)
    for unit in units:
        unit.precision = names[number]
    return picked(number)


def fixed_heads(selector: Selector, heads: int) -> Tensor:
    """``Selector.fixed_heads`` as bool ``[H]``."""
    return torch.tensor(selector.fixed_heads or (False,) * heads)


def _work(shape: Shape) -> int:
    heads, q_len, k_len, dim, _ = shape
    return heads * q_len * k_len * dim


def check_layers(model: Any, layers: list[Layer]) -> None:
    """Reject layers that sparse attention cannot compute, before anything runs."""
    least_dim, most = HEAD_DIMS
    for layer in layers:
        dim = layer.module.head_dim
        if dim is not None and not least_dim <= dim <= most:
            raise ValueError(f"layer {layer.path!r} has head dim {dim}; sparse attention serves {least_dim} to {most}")
    for _, part in transformers_of(model):
        if getattr(getattr(part, "_parallel_config", None), "context_parallel_config", None) is not None:
            raise ValueError(
                "the model runs under enable_parallelism, where each device has a part of every sequence: calibrate "
                "it before, without enable_parallelism; several processes share prompts out by themselves"
            )
        if deepspeed_ranks() is not None:
            raise ValueError(
                "DeepSpeed's sequence parallelism is set up, where each device has a part of every sequence: calibrate "
                "before that; several processes share prompts out by themselves"
            )
        for name, parameter in part.named_parameters():
            if parameter.dtype is torch.float64:
                raise ValueError(f"{name!r} is float64; sparse attention serves float16, bfloat16 and float32")
