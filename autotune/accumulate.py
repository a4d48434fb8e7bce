"""What a calibration sums up: errors and densities of every candidate threshold, per head, over calls and prompts.

Integer counts and sums keyed by prompt make the result independent of who ran which prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spas_attn import backends
from spas_attn.attention import attend
from spas_attn.backends import triton
from spas_attn.block_mask import BlockMask, blockwise
from spas_attn.call import Call
from spas_attn.plan import Plan, plan
from spas_attn.selectors import Selector
from spas_attn.selectors.base import keeps

from .block_maps import Map, record
from .module import SparseAttention
from .partials import query_groups
from .tuned import PV_OFF

BINS = 64
LOWEST, HIGHEST = 1e-4, 10.0  # range of the histograms of one query's relative error
PV_THRESHOLDS = (PV_OFF, 20.0, 16.0, 14.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
ALL_HEADS = slice(None)


@dataclass(frozen=True)
class Grid:
    """Candidate thresholds: every pair of a similarity filter and a threshold of the selector, and the PV thresholds.

    Attributes:
        cdf: thresholds of the selector, in (0, 1); None = the selector's own candidates.
        sim: similarity filters, for selectors that have one; below 0 = off. Each costs a pass over the scores.
        pv: PV thresholds.

    Raises:
        ValueError: when a list is empty or a value out of range.
    """

    cdf: Sequence[float] | None = None
    sim: Sequence[float] = (-1.0,)
    pv: Sequence[float] = PV_THRESHOLDS

    def __post_init__(self) -> None:
        for name in ("cdf", "sim", "pv"):
            if getattr(self, name) is not None and not len(getattr(self, name)):
                raise ValueError(f"the grid of {name} thresholds must not be empty")
        if not all(0 < value < 1 for value in self.cdf or ()):
            raise ValueError(f"cdf thresholds must lie in (0, 1), got {tuple(self.cdf or ())}")
        if not all(value > 0 for value in self.pv):
            raise ValueError(f"pv thresholds must be above 0, got {tuple(self.pv)}")

    def check(self, selector: Selector) -> None:
        """Reject a similarity filter for a selector that has none."""
        if not hasattr(selector, "sim_threshold") and any(value > 0 for value in self.sim):
            raise ValueError(f"{type(selector).__name__} has no similarity filter, but the grid has {tuple(self.sim)}")

    def thresholds(self, selector: Selector) -> Sequence[float]:
        """Thresholds to try."""
        return selector.candidates if self.cdf is None else self.cdf

    def pairs(self, selector: Selector) -> list[tuple[float, float]]:
        """(similarity filter, threshold) of every candidate."""
        return [(sim, value) for sim in self.sim for value in self.thresholds(selector)]

    def filtered(self, selector: Selector) -> list[Selector]:
        """The selector with each similarity filter."""
        if not hasattr(selector, "sim_threshold"):
            return [selector] * len(self.sim)
        return [dataclasses.replace(selector, sim_threshold=sim) for sim in self.sim]  # type: ignore[call-arg]


@dataclass
class Tally:
    """Errors and densities of some candidates, per head, over all prompts seen.

    Quantiles follow from ``histogram``. How much they vary from prompt to prompt follows from ``squares`` and
    ``products``: integer moments of each prompt's number of queries above a bin edge.

    Attributes:
        histogram: int64 ``[H, candidates, BINS]``, one query's relative error, logarithmic bins from 1e-4 to 10.
        squares: int64 ``[H, candidates, BINS]``, Σ over prompts of (queries at or above the bin)².
        products: int64 ``[H, candidates, BINS]``, Σ over prompts of (queries at or above the bin) · queries.
        queries: int64 ``[2]``, Σ over prompts of queries and of queries² (of one head).
        kept, possible: int64 ``[H, candidates]`` and ``[H]``, blocks.
        sums: by prompt, float64 ``[1 + candidates, H]``: Σ|exact|, then Σ|output - exact| of every candidate.
        maps: by prompt, block maps of the check.
    """

    heads: int
    candidates: int
    histogram: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    products: Tensor = field(init=False)
    queries: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    possible: Tensor = field(init=False)
    sums: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, list[Map]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.heads, self.candidates, BINS)
        self.histogram, self.squares, self.products = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        self.queries = torch.zeros(2, dtype=torch.int64)
        self.kept = torch.zeros(shape[:2], dtype=torch.int64)
        self.possible = torch.zeros(self.heads, dtype=torch.int64)

    def merge(self, other: Tally) -> None:
        """Add what another process or prompt saw; prompts must differ."""
        both = self.sums.keys() & other.sums.keys()
        if both:
            raise ValueError(f"prompts {sorted(both)} were counted twice")
        for name in ("histogram", "squares", "products", "queries", "kept", "possible"):
            getattr(self, name).add_(getattr(other, name))
        self.sums.update(other.sums)
        self.maps.update(other.maps)

    def pick(self, candidates: list[int]) -> Tally:
        """The same of some candidates, in this order."""
        found = Tally(self.heads, len(candidates))
        for name in ("histogram", "squares", "products", "kept"):
            setattr(found, name, getattr(self, name)[:, candidates])
        found.queries, found.possible, found.maps = self.queries, self.possible, self.maps
        rows = [0, *(1 + c for c in candidates)]
        found.sums = {prompt: sums[rows] for prompt, sums in self.sums.items()}
        return found

    def total(self) -> Tensor:
        """Σ over prompts of ``sums``, added in prompt order, so that it does not depend on who ran what."""
        total = torch.zeros(1 + self.candidates, self.heads, dtype=torch.float64)
        for prompt in sorted(self.sums):
            total += self.sums[prompt]
        return total

    def density(self) -> Tensor:
        """Kept over possible blocks, float64 ``[H, candidates]``."""
        return self.kept.double() / self.possible.clamp(min=1)[:, None]


class PromptTally:
    """What one prompt adds to a Tally: filled call by call, then closed."""

    def __init__(self, heads: int, candidates: int, device: torch.device | str = "cpu") -> None:
        self.heads, self.candidates = heads, candidates
        self.histogram = torch.zeros(heads, candidates, BINS, dtype=torch.int64, device=device)
        self.sums = torch.zeros(1 + candidates, heads, dtype=torch.float64, device=device)
        self.kept = torch.zeros(heads, candidates, dtype=torch.int64, device=device)
        self.possible = torch.zeros(heads, dtype=torch.int64, device=device)
        self.maps: list[Map] = []

    def add_errors(self, heads: slice, difference: Tensor, norm: Tensor, valid: Tensor) -> None:
        """Count the errors of some queries.

        Args:
            heads: which heads.
            difference: ``[B, h, candidates, rows]``, norm: ``[B, h, rows]``, valid: bool ``[B, h, rows]``.
        """
        self.sums[0, heads] += norm.double().sum((0, 2))
        self.sums[1:, heads] += difference.double().sum((0, 3)).T
        relative = difference / norm.clamp(min=1e-30)[:, :, None]
        bins = _bin(relative)
        # Rows that do not count go to an extra bin that is cut off.
        bins = bins.masked_fill(~valid[:, :, None], BINS).permute(1, 2, 0, 3).flatten(2)
        counted = torch.zeros(*bins.shape[:2], BINS + 1, dtype=torch.int64, device=bins.device)
        counted.scatter_add_(-1, bins, torch.ones_like(bins))
        self.histogram[heads] += counted[..., :BINS]

    def add_blocks(self, heads: slice, kept: Tensor, possible: Tensor) -> None:
        """Count kept blocks ``[h, candidates]`` and possible ones ``[h]`` of some heads."""
        self.kept[heads] += kept
        self.possible[heads] += possible

    def absorb(self, other: PromptTally) -> None:
        """Add what another call of the prompt gave."""
        for name in ("histogram", "sums", "kept", "possible"):
            getattr(self, name).add_(getattr(other, name))
        self.maps = self.maps or other.maps

    def close(self, prompt: int) -> Tally:
        """The finished prompt as a Tally of its own, on the CPU."""
        tally = Tally(self.heads, self.candidates)
        tally.histogram = self.histogram.cpu()
        above = tally.histogram.flip(-1).cumsum(-1).flip(-1)
        queries = above[0, 0, 0]
        tally.squares, tally.products = above * above, above * queries
        tally.queries = torch.stack([queries, queries * queries])
        tally.kept, tally.possible = self.kept.cpu(), self.possible.cpu()
        tally.sums, tally.maps = {prompt: self.sums.cpu()}, {prompt: self.maps} if self.maps else {}
        return tally


def _bin(relative: Tensor) -> Tensor:
    """Index of the logarithmic bin of each error; what is not a number is as bad as can be."""
    position = (relative.nan_to_num(nan=HIGHEST).clamp(min=1e-30).log10() + 4.0) * (BINS / 5.0)
    return position.floor().clamp(0, BINS - 1).long()


def bin_position(value: float) -> float:
    """Where a relative error stands on the bin axis (0 = lowest edge, BINS = highest)."""
    return min(max((torch.tensor(value).log10().item() + 4.0) * (BINS / 5.0), 0.0), float(BINS))


def real_blocks(call: Call, block_q: int) -> Tensor | None:
    """Query blocks that hold a query which is no padding, bool ``[B, nq]``; None: all of them."""
    queries = call.query_mask()
    return None if queries is None else blockwise(queries, block_q).any(-1)


def _real(blocks: Tensor, call: Call, block_q: int) -> Tensor:
    """``blocks`` ``[B or 1, H or 1, nq, nk]`` without those of padding queries, ``[B, H, nq, nk]``."""
    blocks, real = blocks.expand(*call.q.shape[:2], -1, -1), real_blocks(call, block_q)
    return blocks if real is None else blocks & real[:, None, :, None]


@torch.no_grad()
def add_curves(tally: PromptTally, module: SparseAttention, call: Call, grid: Grid, blocks: list[int]) -> None:
    """Errors of every candidate on the given query blocks, densities on all that are no padding."""
    own, device = module.selector, call.q.device
    selectors = [module.with_text(selector, call.text) for selector in grid.filtered(own)]
    levels = [selector.final_levels(call) for selector in selectors]
    thresholds = torch.tensor(grid.thresholds(own), device=device)
    real = real_blocks(call, own.block_q)
    counted = [level if real is None else level.masked_fill(~real[:, None, :, None], torch.inf) for level in levels]
    kept = torch.cat([_kept_counts(level, thresholds) for level in counted], 1)
    tally.add_blocks(ALL_HEADS, kept, _real(own.visible(call), call, own.block_q).sum((0, 2, 3)))
    for group in query_groups(call, own.block_q, own.block_k, blocks):
        rows = [group.rows_of(level)[:, :, None] for level in levels]
        masks = torch.cat([keeps(row, thresholds[:, None]) for row in rows], 2)
        tally.add_errors(group.heads, *group.partials.errors(masks), group.partials.valid)


def _kept_counts(levels: Tensor, thresholds: Tensor) -> Tensor:
    """How many blocks of ``levels [B, H, nq, nk]`` each threshold ``[C]`` keeps, int64 ``[H, C]``."""
    heads, size = levels.shape[1], len(thresholds)
    # 1 and more keeps every visible block, see selectors.base.keeps.
    ranked, order = thresholds.masked_fill(thresholds >= 1.0, torch.inf).sort()
    first = torch.bucketize(levels, ranked, right=True)  # the lowest threshold that keeps the block, `size` for none
    first += (size + 1) * torch.arange(heads, device=levels.device)[:, None, None]
    counts = torch.zeros(heads * (size + 1), dtype=torch.int64, device=levels.device)
    counts.scatter_add_(0, first.flatten(), torch.ones_like(first.flatten()))
    return (
        torch.zeros_like(counts)
        .view(heads, -1)[:, :size]
        .scatter(1, order.expand(heads, -1), counts.view(heads, -1)[:, :size].cumsum(1))
    )


@torch.no_grad()
def add_pv_curves(tally: PromptTally, module: SparseAttention, call: Call, grid: Grid, blocks: list[int]) -> None:
    """Errors of the chosen selection under every PV threshold."""
    selector, _ = module.serving(call)
    kept = selector.kept(call)
    counted = _real(kept, call, selector.block_q)
    pv = torch.tensor(grid.pv, device=call.q.device)
    for group in query_groups(call, selector.block_q, selector.block_k, blocks):
        row, real = group.rows_of(kept), group.rows_of(counted)
        runs = group.partials.pv_reach(row)[:, :, None] + pv[:, None] > 0
        tally.add_errors(group.heads, *group.partials.errors(row[:, :, None] & runs), group.partials.valid)
        tally.add_blocks(group.heads, (real[:, :, None] & runs).sum((0, 3)), real.sum((0, 2)))


@torch.no_grad()
def add_check(tally: PromptTally, module: SparseAttention, call: Call, precisions: Sequence[str] = ()) -> str:
    """Errors of the real kernel on all queries: candidate 0 is selection alone, candidate 1 everything.

    Where PV skip is left out because it costs more time than it saves, though the layer uses it, the kernel carries it
    out all the same, so that the file is checked as other devices will run it; where no kernel can, ``reference`` does.
    (Not where that would leave out the quantisation which the backend does carry out.)

    Args:
        precisions: candidates 1, 2, ... are everything in these precisions, under the same blocks; those that are not
            served here get errors that are no numbers. None: the call's own.

    Returns:
        The name of the backend that computed candidate 1.
    """
    if precisions:
        call = call.replace(precision=precisions[0])
    selector, pv = module.serving(call)
    exact = _exact(call)
    tuned, backend = module.tuned, module.backend
    assert tuned is not None
    asked = call.replace(pv_threshold=pv, expected_density=tuned.expected_density)
    chosen = plan(asked, selector, backend)
    if chosen.instead_of is not None:  # the check is of the sparse kernels, even where dense ones are faster
        backend = chosen.instead_of
        chosen = plan(asked, selector, backend)
    left_out = tuned.skips and (chosen.pv_skip_left_out is not None or not backends.get(chosen.backend).skips_pv)
    anyway = left_out and _skips_anyway(asked, selector, chosen)
    quantised = chosen.precision != "native"
    if left_out and not anyway and (not quantised or chosen.backend == "sdpa"):
        backend, quantised, left_out, asked = "reference", False, False, asked.replace(precision="native")
    total, stats = attend(asked, selector, backend=backend)
    selection = total
    if stats.mask is not None and (quantised or (tuned.skips and not left_out)):
        selection, _ = attend(call.replace(mask=stats.mask, precision="native"))
    if anyway:
        total = triton.run(asked.replace(mask=stats.mask, precision=chosen.precision), anyway=True)
    others = [_in_precision(asked, stats.mask, name, stats.backend) for name in precisions[1:]]
    norm = exact.abs().sum(-1)
    valid, queries = norm > 0, call.query_mask()
    if queries is not None:
        valid = valid & queries[:, None]
    difference = torch.stack([(x.float() - exact).abs().sum(-1) for x in (selection, total, *others)], 2)
    tally.add_errors(ALL_HEADS, difference.masked_fill(~valid[:, :, None], 0.0), norm * valid, valid)
    visible = _real(selector.visible(call), call, selector.block_q)
    kept = visible if stats.mask is None else _real(stats.mask.to_dense(), call, selector.block_q)
    tally.add_blocks(ALL_HEADS, kept.sum((0, 2, 3))[:, None].expand(-1, tally.candidates), visible.sum((0, 2, 3)))
    if not tally.maps and stats.mask is not None:
        tally.maps = record(kept[0], visible[0], tuned.is_sparse)
    return stats.backend


def _skips_anyway(call: Call, selector: Selector, chosen: Plan) -> bool:
    """Whether the kernel that is to run can carry out a PV skip that it leaves out."""
    call = call.replace(blocks=(selector.block_q, selector.block_k), precision=chosen.precision)
    whole = call.sinks is None and call.cu_seqlens_q is None
    return chosen.backend == "triton" and whole and triton.cannot_skip(call) is None


def _exact(call: Call) -> Tensor:
    """Dense attention in float32 ``[B, Hq, Lq, D]``, one KV head at a time where query heads share them: for grouped
    heads in float32 torch has only the kernel that holds all scores (128 GiB for 32 heads of 32K tokens).
    """
    sdpa, group = backends.get("sdpa"), call.group
    if group == 1:
        return sdpa.compute(call.replace(q=call.q.float(), k=call.k.float(), v=call.v.float()))
    parts = []
    for i in range(call.k.shape[1]):
        heads = slice(i * group, (i + 1) * group)
        k, v = (x[:, i : i + 1].float().expand(-1, group, -1, -1) for x in (call.k, call.v))
        sinks = None if call.sinks is None else call.sinks[heads]
        parts.append(sdpa.compute(call.replace(q=call.q[:, heads].float(), k=k, v=v, sinks=sinks)))
    return torch.cat(parts, 1)


def _in_precision(call: Call, mask: BlockMask | None, precision: str, backend: str) -> Tensor:
    """The output under a mask in another precision; NaN where that is not served."""
    given = call.replace(mask=mask, precision=precision)
    if mask is None or plan(given, None, backend).fallback is not None:
        return torch.full_like(call.q, torch.nan)
    return attend(given, backend=backend)[0]
