"""What a calibration decides: from sums and bounds to the thresholds of every head, and what heads that missed get.

A mean bound is held by the one-sided 95% upper confidence limit of Σerror / Σ|exact|, a tail bound by that of the
share of queries whose own error exceeds it (which must stay within 0.5%). Prompts are the sampling units, because
queries of one prompt go wrong together. Choosing at the edge of a point estimate instead leaves only 63-94% of the
heads within the bound on new prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from spas_attn.checks import HEAD_DIMS

from .accumulate import BINS, Grid, Tally, bin_position
from .module import FULL_MASK, SCHEDULED, SHORT, SparseAttention, transformers_of
from .tuned import PV_OFF, Bounds, Tuned

TAIL_QUANTILE = 0.995
CONFIDENCE = 0.95
SKIPPED_STEP = "its step is not observed (every)"
MARGIN = 0.9  # a head that misses its bound aims this far below it the next time


def mean_error(tally: Tally) -> Tensor:
    """Σerror / Σ|exact| over everything, float64 ``[H, candidates]``."""
    total = tally.total()
    return (total[1:] / total[0].clamp(min=1e-300)).T


def mean_limit(tally: Tally) -> Tensor:
    """Upper confidence limit of the mean error, float64 ``[H, candidates]``; the estimate itself with one prompt.

    The variance is that of a ratio of sums (linearised), over prompts.
    """
    ratio = mean_error(tally)
    prompts = len(tally.sums)
    if prompts < 2:
        return ratio
    parts = torch.stack([tally.sums[prompt] for prompt in sorted(tally.sums)])  # [P, 1 + N, H]
    residual = parts[:, 1:] - ratio.T * parts[:, :1]
    variance = residual.square().sum(0) * (prompts / (prompts - 1)) / parts[:, 0].sum(0).clamp(min=1e-300).square()
    return ratio + _t_value(prompts) * variance.sqrt().T


def tail_error(tally: Tally, quantile: float = TAIL_QUANTILE) -> Tensor:
    """A high quantile of one query's relative error, float64 ``[H, candidates]``, from the histograms.

    Interpolated inside its bin (5 decades in 64 bins: edges 20% apart).
    """
    share = _above(tally.histogram).double() / max(1, int(tally.queries[0]))
    allowed = 1 - quantile
    last = (share > allowed).sum(-1, keepdim=True).clamp(min=1) - 1  # last edge that too many queries exceed
    here, following = share.gather(-1, last)[..., 0], share.gather(-1, last + 1)[..., 0]
    inside = ((here - allowed) / (here - following).clamp(min=1e-12)).clamp(0, 1)
    return 10 ** ((last[..., 0] + inside) * (5.0 / BINS) - 4.0)


def tail_share_limit(tally: Tally, tail: Tensor) -> Tensor:
    """Upper confidence limit of the share of queries whose error exceeds ``tail [H]``; float64 ``[H, candidates]``.

    The limit is that of the logarithm of the share, with one query more than was seen: rare events scatter by factors,
    and a limit made of share and variance alone holds in 77-87% of cases only, where prompts differ by 30%.
    """
    position = torch.tensor([bin_position(float(value)) for value in tail], dtype=torch.float64)
    queries, squared = float(tally.queries[0]), float(tally.queries[1])
    above = _at(_above(tally.histogram), position)
    share = above / max(1.0, queries)
    prompts = len(tally.sums)
    if prompts < 2 or queries == 0:
        return share
    squares, products = _at(_padded(tally.squares), position), _at(_padded(tally.products), position)
    residual = (squares - 2 * share * products + share.square() * squared).clamp(min=0)
    variance = residual * (prompts / (prompts - 1)) / queries**2
    share = share + 1 / queries
    return (share * torch.exp(_t_value(prompts) * variance.sqrt() / share)).clamp(max=1.0)


def _t_value(prompts: int) -> float:
    """Quantile of Student's t distribution (scipy.stats gives the same, and takes a second to import)."""
    return float(stdtrit(prompts - 1, CONFIDENCE))


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1))


def _above(histogram: Tensor) -> Tensor:
    """Queries at or above each bin edge, int64 ``[H, candidates, BINS + 1]``."""
    return _padded(histogram.flip(-1).cumsum(-1).flip(-1))


def _at(edges: Tensor, position: Tensor) -> Tensor:
    """Value at ``position [H]`` on the bin axis, linear between edges; float64 ``[H, candidates]``."""
    lower = position.floor().clamp(max=BINS - 1).long()
    index = lower[:, None, None].expand(-1, edges.shape[1], 1)
    inside = (position - lower)[:, None]
    low, high = (edges.gather(-1, index + shift)[..., 0].double() for shift in (0, 1))
    return low * (1 - inside) + high * inside


def within_bounds(tally: Tally, mean_bound: Tensor, tail: Tensor | None) -> Tensor:
    """Candidates that hold both bounds ``[H]`` with confidence, bool ``[H, candidates]``."""
    good = mean_limit(tally) <= mean_bound[:, None]
    if tail is not None:
        good &= tail_share_limit(tally, tail) <= 1 - TAIL_QUANTILE
    return good


def choose(tally: Tally, mean_bound: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """The candidate of lowest density that holds both bounds, per head; ties go to the smaller error.

    Returns:
        Its index, int64 ``[H]``; and whether there is one that holds the bounds and drops blocks, bool ``[H]``.
    """
    density = tally.density()
    cost = density + 1e-6 * mean_error(tally).clamp(max=1.0)
    cost = cost.masked_fill(~within_bounds(tally, mean_bound, tail), math.inf)
    best, index = cost.min(-1)
    return index, best < 1.0


class Layer:
    """What a calibration knows of one layer, and how it chooses the layer's thresholds from it.

    Attributes:
        curves, check: what those passes counted.
        lengths: fewest and most keys, padding left out.
        calls: how many calls of the prompt in progress were looked at.
        unseen: calls of that prompt that were not looked at, by reason.
        reasons: per head, why it runs dense.
        tighter: ``[H]``, factor on the bounds of heads that missed them; 0 = runs dense.
        check_backend: name of the backend that the check ran on.
    """

    def __init__(self, index: int, path: str, module: SparseAttention, bounds: Bounds) -> None:
        self.index, self.path, self.module, self.bounds = index, path, module, bounds
        self.curves: Tally | None = None
        self.check: Tally | None = None
        self.lengths: tuple[int, int] | None = None
        self.calls = 0
        self.unseen: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.tighter = torch.ones(0, dtype=torch.float64)
        self.check_backend = ""

    def saw(self, *lengths: int) -> None:
        """Remember numbers of keys."""
        lengths = (*(self.lengths or ()), *lengths)
        self.lengths = (min(lengths), max(lengths)) if lengths else None

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

    def choose_first(self, curves: Tally, grid: Grid) -> None:
        """Thresholds from the curves, without PV skip."""
        self.curves = curves
        self.tighter = torch.ones(curves.heads, dtype=torch.float64)
        self.reasons = [""] * curves.heads
        self._choose(grid, torch.full((curves.heads,), PV_OFF))

    def choose_pv(self, curves: Tally, grid: Grid) -> None:
        """The PV threshold that skips most within ``pv_l1`` and ``tail``."""
        _, pv_l1, tail = self.bounds
        mean = torch.full((curves.heads,), pv_l1, dtype=torch.float64)
        good = within_bounds(curves, mean, None if tail is None else torch.full_like(mean, tail))
        self._choose(grid, torch.where(good, torch.tensor(grid.pv), PV_OFF).amin(1))

    def back_off(self, check: Tally, grid: Grid, last: int) -> bool:
        """Tighten the bounds of sparse heads that missed one in the check; says whether there were any.

        In the last round, whose number ``last`` is then (else 0), such heads become dense instead.
        """
        self.check = check
        _, pv_l1, tail = self.bounds
        tuned = self.in_force()
        excess = mean_error(check)[:, 1] / pv_l1
        if tail is not None:
            excess = torch.maximum(excess, tail_error(check)[:, 1] / tail)
        excess = excess.nan_to_num(nan=torch.inf)
        wrong = (excess > 1) & tuned.is_sparse.cpu()
        if not bool(wrong.any()):
            return False
        factor = torch.zeros_like(excess) if last else MARGIN / excess
        self.tighter = torch.where(wrong, self.tighter * factor, self.tighter)
        for head in wrong.nonzero()[:, 0].tolist() if last else []:
            self.reasons[head] = f"missed a bound {last} times in the check with the real kernel"
        self._choose(grid, torch.where(wrong, PV_OFF, tuned.pv.cpu()))
        return True

    def in_force(self) -> Tuned:
        """The thresholds chosen last."""
        assert self.module.tuned is not None
        return self.module.tuned

    def _choose(self, grid: Grid, pv: Tensor) -> None:
        """Thresholds of least density within the (possibly tightened) bounds."""
        assert self.curves is not None
        l1, _, tail = self.bounds
        index, found = choose(self.curves, l1 * self.tighter, None if tail is None else tail * self.tighter)
        sim, threshold = torch.tensor(grid.pairs(self.module.selector), dtype=torch.float64)[index].T
        sparse = found & (self.tighter > 0)
        for head in (~sparse).nonzero()[:, 0].tolist():
            self.reasons[head] = self.reasons[head] or "no candidate threshold holds the bounds"
        density = torch.where(sparse, self.curves.density().gather(1, index[:, None])[:, 0], 1.0)
        self.module.tuned = Tuned(
            sparse,
            torch.where(sparse, threshold, 1.0),
            torch.where(sparse, sim, -1.0),
            torch.where(sparse, pv.double(), PV_OFF),
            expected_density=float(density.mean()),
            lengths=self.lengths,
            bounds=self.bounds,
        )

    def finish(self) -> None:
        """Put the thresholds in force, with the density that the check measured for the choice of the backend."""
        assert self.check is not None
        tuned, module = self.in_force(), self.module
        density = torch.where(tuned.is_sparse.cpu(), self.check.density()[:, 1], 1.0)
        module.l1, module.pv_l1, module.tail = self.bounds
        module.set_thresholds(dataclasses.replace(tuned, expected_density=float(density.mean())))


def check_layers(model: Any, layers: list[Layer]) -> None:
    """Reject layers that sparse attention cannot compute, before anything runs."""
    least, most = HEAD_DIMS
    for layer in layers:
        dim = layer.module.head_dim
        if dim is not None and not least <= dim <= most:
            raise ValueError(f"layer {layer.path!r} has head dim {dim}; sparse attention serves {least} to {most}")
    for _, part in transformers_of(model):
        for name, parameter in part.named_parameters():
            if parameter.dtype is torch.float64:
                raise ValueError(f"{name!r} is float64; sparse attention serves float16, bfloat16 and float32")
