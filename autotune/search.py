"""Search: from curves and bounds to one choice per head.

A mean bound is held by the one-sided 95% upper confidence limit of Σerror / Σ|exact|, a tail bound by that of the
share of queries whose own error exceeds it (which must stay within 0.5%). Prompts are the sampling units, because
queries of one prompt go wrong together. Choosing at the edge of a point estimate instead leaves only 63-94% of the
heads within the bound on new prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from .curves import BINS, Tally, bin_position

TAIL_QUANTILE = 0.995
CONFIDENCE = 0.95


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
    return float(stats.t.ppf(CONFIDENCE, prompts - 1))


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


@dataclass(frozen=True)
class Choice:
    """The chosen candidate of every head of one layer.

    Attributes:
        index: int64 ``[H]``, candidate; meaningless where ``found`` is False.
        found: bool ``[H]``, some candidate holds the bounds and drops blocks.
    """

    index: Tensor
    found: Tensor


def choose(tally: Tally, mean_bound: Tensor, tail: Tensor | None) -> Choice:
    """The candidate of lowest density that holds both bounds, per head; ties go to the smaller error."""
    density = tally.density()
    cost = density + 1e-6 * mean_error(tally).clamp(max=1.0)
    cost = cost.masked_fill(~within_bounds(tally, mean_bound, tail), math.inf)
    best, index = cost.min(-1)
    return Choice(index, best < 1.0)
