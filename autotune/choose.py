"""What a calibration decides for a head alone: from sums and bounds to the candidates that hold them with confidence.

A mean bound is held by the one-sided 95% upper confidence limit of Σerror / Σ|exact|, a tail bound by that of the
share of queries whose own error exceeds it (which must stay within 0.5%). Prompts are the sampling units, because
queries of one prompt go wrong together. Choosing at the edge of a point estimate instead leaves only 63-94% of the
heads within the bound on new prompts.
"""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit
from torch import Tensor

from .accumulate import BINS, Tally, bin_position

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


def within_bounds(tally: Tally, mean_bound: Tensor | None, tail: Tensor | None) -> Tensor:
    """Candidates that hold both bounds ``[H]`` with confidence, bool ``[H, candidates]``; None = no bound."""
    good = mean_error(tally).isfinite()
    if mean_bound is not None:
        good &= mean_limit(tally) <= mean_bound[:, None]
    if tail is not None:
        good &= tail_share_limit(tally, tail) <= 1 - TAIL_QUANTILE
    return good


def choose(tally: Tally, mean_bound: Tensor | None, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`least` of the candidates that hold both bounds."""
    return least(tally, within_bounds(tally, mean_bound, tail))


def least(tally: Tally, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The candidate of lowest density among those allowed ``[H, candidates]``, per head; ties go to the smaller error.

    Returns:
        Its index, int64 ``[H]``; and whether there is one that is allowed and drops blocks, bool ``[H]``.
    """
    cost = tally.density() + 1e-6 * mean_error(tally).clamp(max=1.0)
    cost = cost.masked_fill(~allowed, math.inf)
    best, index = cost.min(-1)
    return index, best < 1.0
