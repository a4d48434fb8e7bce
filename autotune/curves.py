"""Curves: the error and the density of every candidate threshold, from one pass over dense activations.

For one query block, the softmax mass and the weighted values of every key block are computed once ("partials"). The
output of any selection of blocks is then a 0/1 combination of them: with M [candidates, key blocks] the kept blocks,

    output(M) = (M @ values) / (M @ mass),

so all heads and all thresholds come from one dense attention and one small matrix product, instead of one attention
per candidate. The errors are accumulated per head and candidate; integer counts and sums keyed by prompt make the
result independent of who ran which prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spas_attn.backends import Call

BINS = 64
LOWEST, HIGHEST = 1e-4, 10.0  # range of the histograms of one query's relative error
_LOG2E = 1.4426950408889634
_CANDIDATES = 16  # evaluated at a time: their outputs should stay in the cache of a processor
_PARTIALS = 1 << 26  # float32 elements of partial values held at a time


@dataclass(frozen=True)
class Partials:
    """What one query block gets from each key block, for some heads.

    Attributes:
        mass: ``[B, H, nk, rows]``, Σ exp(score - row maximum) over the block's visible keys.
        value: ``[B, H, nk, rows, D]``, the same sum weighted with v.
        peak: ``[B, H, nk, rows]``, largest score of the row in the block, in log2 units (-inf: nothing visible).
        exact: ``[B, H, rows, D]``, the output over all blocks; 0 where nothing is visible.
        valid: bool ``[B, H, rows]``, rows that see something and are no padding themselves.
    """

    mass: Tensor
    value: Tensor
    peak: Tensor
    exact: Tensor
    valid: Tensor

    def errors(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_d |output - exact| of every query under every candidate, and Σ_d |exact|.

        Args:
            kept: bool ``[B, H, candidates, nk]``.

        Returns:
            ``[B, H, candidates, rows]`` and ``[B, H, rows]``, 0 for rows that are not valid.
        """
        batch, heads, nk, rows, dim = self.value.shape
        values = self.value.view(batch, heads, nk, rows * dim)
        differences = []
        for weights in kept.float().split(_CANDIDATES, dim=2):
            # Where no mass is kept the values are 0 too, and so is the output.
            mass = (weights @ self.mass).clamp_(min=1e-37)
            out = (weights @ values).unflatten(-1, (rows, dim))
            differences.append(out.div_(mass[..., None]).sub_(self.exact[:, :, None]).abs_().sum(-1))
        difference = torch.cat(differences, 2) * self.valid[:, :, None]
        return difference, self.exact.abs().sum(-1) * self.valid

    def pv_reach(self, kept: Tensor) -> Tensor:
        """How far below the running maximum the best row of each kept block stays, in log2 units, <= 0.

        PV skip (rule 6 of SpargeAttn, arXiv 2502.18137) leaves a block out where reach + pv_threshold <= 0.

        Args:
            kept: bool ``[B, H, nk]``.
        """
        peak = self.peak.masked_fill(~kept[..., None], -torch.inf)
        behind = (peak - peak.cummax(2).values).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        return behind.amax(-1)


def query_blocks(call: Call, block_q: int, block_k: int, blocks: list[int]) -> Iterator[tuple[int, slice, Partials]]:
    """Partials of the given query blocks, a few KV heads at a time.

    Yields:
        (query block, slice of query heads, partials).
    """
    q_len, k_len, dim = call.q.shape[2], call.k.shape[2], call.q.shape[3]
    nk = -(-k_len // block_k)
    group, k_heads = call.group, call.k.shape[1]
    step = max(1, _PARTIALS // (call.q.shape[0] * group * nk * block_q * dim))
    for start in range(0, k_heads, step):
        chosen = slice(start, min(start + step, k_heads))
        heads = slice(chosen.start * group, chosen.stop * group)
        pad = (0, 0, 0, nk * block_k - k_len)
        keys = torch.nn.functional.pad(call.k[:, chosen].float(), pad).unflatten(2, (nk, block_k))
        values = torch.nn.functional.pad(call.v[:, chosen].float(), pad).unflatten(2, (nk, block_k))
        for i in blocks:
            rows = slice(i * block_q, min((i + 1) * block_q, q_len))
            yield i, heads, _partials(call, keys, values, heads, rows)


def _partials(call: Call, keys: Tensor, values: Tensor, heads: slice, rows: slice) -> Partials:
    batch, k_heads, nk, block_k, dim = keys.shape
    group, count = call.group, rows.stop - rows.start
    q = call.q[:, heads, rows].float().reshape(batch, k_heads, 1, group * count, dim)
    scores = (q @ keys.transpose(-1, -2)) * (call.scale * _LOG2E)  # [B, Hkv, nk, group * rows, block_k]
    scores = scores.unflatten(3, (group, count)).transpose(2, 3)  # [B, Hkv, group, nk, rows, block_k]
    seen = _seen(call, rows, nk, block_k)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    peak = scores.amax(-1)
    top = peak.amax(3, keepdim=True)
    weights = torch.exp2(scores - top.clamp(min=-3e38)[..., None])
    mass = weights.sum(-1)
    value = weights.transpose(2, 3).flatten(3, 4) @ values
    value = value.unflatten(3, (group, count)).transpose(2, 3).flatten(1, 2)  # [B, H, nk, rows, D]
    mass, peak = mass.flatten(1, 2), peak.flatten(1, 2)
    total = mass.sum(2)
    exact = torch.where(total[..., None] > 0, value.sum(2) / total.clamp(min=1e-37)[..., None], 0.0)
    valid = total > 0
    queries = query_mask(call)
    if queries is not None:
        valid = valid & queries[:, None, rows]
    return Partials(mass, value, peak, exact, valid)


def query_mask(call: Call) -> Tensor | None:
    """Queries that are no padding themselves, bool ``[B, Lq]``: in self-attention the padding of the keys tells."""
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    if call.key_mask is None or not (call.is_causal or q_len == k_len):
        return None
    return call.key_mask[:, k_len - q_len :]


def _seen(call: Call, rows: slice, nk: int, block_k: int) -> Tensor | None:
    """Visible (query, key) pairs, bool broadcastable to ``[B, Hkv, group, nk, rows, block_k]``."""
    k_len = call.k.shape[2]
    mask = call.replace(mask=None).token_mask(rows.start, rows.stop)  # [B or 1, 1, rows, Lk]
    ragged = nk * block_k - k_len
    if mask is None:
        if not ragged:
            return None
        mask = torch.ones(1, 1, 1, k_len, dtype=torch.bool, device=call.q.device)
    mask = torch.nn.functional.pad(mask, (0, ragged)).unflatten(-1, (nk, block_k))
    return mask.transpose(2, 3)[:, :, None]


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

    def add_blocks(self, kept: Tensor, possible: Tensor) -> None:
        """Count kept blocks ``[H, candidates]`` and possible ones ``[H]``."""
        self.kept += kept
        self.possible += possible

    def close(self, prompt: int) -> Tally:
        """The finished prompt as a Tally of its own, on the CPU."""
        tally = Tally(self.heads, self.candidates)
        tally.histogram = self.histogram.cpu()
        above = tally.histogram.flip(-1).cumsum(-1).flip(-1)
        queries = above[0, 0, 0]
        tally.squares, tally.products = above * above, above * queries
        tally.queries = torch.stack([queries, queries * queries])
        tally.kept, tally.possible = self.kept.cpu(), self.possible.cpu()
        tally.sums = {prompt: self.sums.cpu()}
        return tally


def _bin(relative: Tensor) -> Tensor:
    """Index of the logarithmic bin of each error; what is not a number is as bad as can be."""
    position = (relative.nan_to_num(nan=HIGHEST).clamp(min=1e-30).log10() + 4.0) * (BINS / 5.0)
    return position.floor().clamp(0, BINS - 1).long()


def bin_position(value: float) -> float:
    """Where a relative error stands on the bin axis (0 = lowest edge, BINS = highest)."""
    return min(max((torch.tensor(value).log10().item() + 4.0) * (BINS / 5.0), 0.0), float(BINS))
