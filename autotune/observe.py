"""What a calibration computes from one call of one layer: curves, PV curves, and the check with the real kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spas_attn import backends, block_sparse_attention
from spas_attn.attention import explain, sparse_attention
from spas_attn.backends import Call
from spas_attn.block_mask import cdiv
from spas_attn.selectors import Inputs, MeanSimilarity
from spas_attn.selectors.mean_similarity import within
from spas_attn.selectors.tokens import Ranges

from .curves import PromptTally, query_blocks, query_mask
from .module import PV_OFF, SparseAttention

CDF_THRESHOLDS = (
    0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.74, 0.78, 0.81, 0.84, 0.87, 0.89, 0.91, 0.925, 0.94, 0.95, 0.96, 0.97,
    0.975, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999, 0.9995,
)  # fmt: skip
SIM_THRESHOLDS = (-1.0, 0.2, 0.35, 0.5)
PV_THRESHOLDS = (PV_OFF, 20.0, 16.0, 14.0, 12.0, 11.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0)


@dataclass(frozen=True)
class Grid:
    """Candidate thresholds: every pair of a similarity and a cdf threshold, and the PV thresholds.

    Raises:
        ValueError: when a list is empty or a value out of range.
    """

    cdf: Sequence[float] = CDF_THRESHOLDS
    sim: Sequence[float] = SIM_THRESHOLDS
    pv: Sequence[float] = PV_THRESHOLDS

    def __post_init__(self) -> None:
        for name in ("cdf", "sim", "pv"):
            if not len(getattr(self, name)):
                raise ValueError(f"the grid of {name} thresholds must not be empty")
        if not all(0 < value < 1 for value in self.cdf):
            raise ValueError(f"cdf thresholds must lie in (0, 1), got {tuple(self.cdf)}")
        if not all(value > 0 for value in self.pv):
            raise ValueError(f"pv thresholds must be above 0, got {tuple(self.pv)}")

    def __len__(self) -> int:
        return len(self.cdf) * len(self.sim)

    def pair(self, index: int) -> tuple[float, float]:
        """(sim, cdf) of a candidate."""
        sim, cdf = divmod(index, len(self.cdf))
        return self.sim[sim], self.cdf[cdf]


@dataclass(frozen=True)
class Watched(Call):
    """A call of a model's layer, with the (start, stop) of its text tokens."""

    text: Ranges = ()


@dataclass
class Sampler:
    """Chooses which query blocks of a call are looked at: at most ``limit``, at random, the same on every machine."""

    limit: int | None
    seed: int

    def blocks(self, count: int, *key: int) -> list[int]:
        """Ascending indices out of ``count`` for the call named by ``key``."""
        if self.limit is None or count <= self.limit:
            return list(range(count))
        seed = self.seed
        for part in key:
            seed = (seed * 1_000_003 + part + 1) % (1 << 62)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return sorted(order[: self.limit].tolist())


def inputs_of(call: Call) -> Inputs:
    """What a selector sees of a call."""
    return Inputs(call.q, call.k, call.is_causal, call.scale, call.key_mask, call.window)


@torch.no_grad()
def add_curves(tally: PromptTally, module: SparseAttention, call: Watched, grid: Grid, blocks: list[int]) -> None:
    """Errors of every candidate on the given query blocks, densities on all of them."""
    selector, sink = module.selector, module.sink_of(call.text)
    pooled = selector.pooled(inputs_of(call))
    heads, device = call.q.shape[1], call.q.device
    levels = [selector.levels(pooled, torch.full((heads,), sim, device=device)) for sim in grid.sim]
    if sink is not None:  # as in serving: a union, so that the kept text does not count toward a cdf threshold
        kept_always = sink.kept_blocks(inputs_of(call))
        levels = [level.masked_fill(kept_always, -1.0) for level in levels]
    cdf = torch.tensor(grid.cdf, device=device)
    kept = [torch.stack([within(level, c).sum((0, 2, 3)) for c in cdf], 1) for level in levels]
    possible = pooled.visible.expand(levels[0].shape).sum((0, 2, 3))
    tally.add_blocks(torch.cat(kept, 1), possible)
    for i, chosen, partials in query_blocks(call, selector.block_q, selector.block_k, blocks):
        masks = torch.cat([within(level[:, chosen, i, None], cdf[:, None]) for level in levels], 2)
        difference, norm = partials.errors(masks)
        tally.add_errors(chosen, difference, norm, partials.valid)


@torch.no_grad()
def add_pv_curves(tally: PromptTally, module: SparseAttention, call: Watched, grid: Grid, blocks: list[int]) -> None:
    """Errors of the chosen selection under every PV threshold."""
    selector, _ = module.tuned(call.q.device, call.text)
    kept = selector.kept_blocks(inputs_of(call)).expand(call.q.shape[0], call.q.shape[1], -1, -1)
    pv = torch.tensor(grid.pv, device=call.q.device)
    for i, chosen, partials in query_blocks(call, selector.block_q, selector.block_k, blocks):
        row = kept[:, chosen, i]
        masks = row[:, :, None] & (partials.pv_reach(row)[:, :, None] + pv[:, None] > 0)
        difference, norm = partials.errors(masks)
        tally.add_errors(chosen, difference, norm, partials.valid)
        tally.add_blocks(_spread(masks.sum((0, 3)), chosen, tally.heads), _spread(row.sum((0, 2)), chosen, tally.heads))


def _spread(x: Tensor, chosen: slice, heads: int) -> Tensor:
    out = x.new_zeros(heads, *x.shape[1:])
    out[chosen] = x
    return out


@torch.no_grad()
def add_check(tally: PromptTally, module: SparseAttention, call: Watched) -> str:
    """Errors of the real kernel on all queries: candidate 0 is selection alone, candidate 1 everything.

    When the backend leaves PV skip out but the layer uses it, everything is computed by ``reference``, which carries
    it out, so that the file is checked as other devices will run it. (Not where that would leave out the quantisation
    which the backend does carry out.)

    Returns:
        The name of the backend that computed everything.
    """
    selector, pv = module.tuned(call.q.device, call.text)
    exact = backends.get("sdpa").run(call.replace(q=call.q.float(), k=call.k.float(), v=call.v.float()))
    backend = module.backend
    uses_pv = bool((pv < PV_OFF).any())
    choice = explain(
        call.q, call.k, call.v, selector, is_causal=call.is_causal, scale=call.scale, attn_mask=call.attn_mask,
        window=call.window, pv_threshold=pv, precision=module.precision, backend=backend,
        expected_density=module.expected_density, error_bound=module.pv_l1,
    )  # fmt: skip
    backend = choice.instead_of or backend  # the check is of the sparse kernels, even where dense ones are faster
    precision = module.precision
    left_out = choice.pv_skip_left_out is not None or not backends.get(choice.backend).skips_pv
    if uses_pv and left_out and (precision == "bf16" or choice.backend == "sdpa"):
        backend, precision = "reference", "bf16"
    total, stats = sparse_attention(
        call.q, call.k, call.v, selector, pv_threshold=pv, backend=backend, return_stats=True,
        precision=precision, expected_density=module.expected_density, error_bound=module.pv_l1,
        is_causal=call.is_causal,
        scale=call.scale, attn_mask=call.attn_mask, window=call.window,
    )  # fmt: skip
    selection = total
    if stats.mask is not None and (uses_pv or precision != "bf16"):
        selection = block_sparse_attention(
            call.q, call.k, call.v, stats.mask, is_causal=call.is_causal, scale=call.scale, attn_mask=call.attn_mask,
            window=call.window,
        )  # fmt: skip
    norm = exact.abs().sum(-1)
    valid = norm > 0
    queries = query_mask(call)
    if queries is not None:
        valid = valid & queries[:, None]
    difference = torch.stack([(x.float() - exact).abs().sum(-1) for x in (selection, total)], 2)
    tally.add_errors(slice(None), difference * valid[:, :, None], norm * valid, valid)
    visible = selector.visible(inputs_of(call)).expand(*call.q.shape[:2], -1, -1).sum((0, 2, 3))
    kept = visible if stats.mask is None else stats.mask.counts.sum((0, 2))
    tally.add_blocks(kept[:, None].expand(-1, 2), visible)
    return stats.backend


@dataclass
class Reservoir:
    """A bounded random sample of one layer's calls in host memory: sampled query blocks with their full K and V.

    Attributes:
        budget: bytes; at least one call is always held.
        calls: (number of the call, its parts: calls of their own and which query blocks to look at in each).
        used: bytes of each.
        seen: calls offered so far.
    """

    budget: int
    seed: int
    calls: list[tuple[int, list[tuple[Watched, list[int]]]]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    seen: int = 0

    def offer(self, number: int, call: Watched, selector: MeanSimilarity, blocks: list[int]) -> None:
        """Keep the call with the probability that makes the sample uniform."""
        self.seen += 1
        rows = min(len(blocks) * selector.block_q, call.q.shape[2]) if _separable(call, selector) else call.q.shape[2]
        size = (call.k.numel() + call.v.numel() + rows * call.q[:, :, 0].numel()) * call.q.itemsize
        if self.calls and sum(self.used) + size > self.budget:
            seed = (self.seed * 1_000_003 + number) % (1 << 62)
            slot = int(torch.randint(self.seen, (1,), generator=torch.Generator().manual_seed(seed)))
            if slot >= len(self.calls):
                return
            self._drop(slot)
            while self.calls and sum(self.used) + size > self.budget:  # a long call may take the place of several
                self._drop(0)
        self.calls.append((number, parts(_to_host(call), selector, blocks)))
        self.used.append(size)

    def _drop(self, slot: int) -> None:
        del self.calls[slot], self.used[slot]


def _to_host(call: Watched) -> Watched:
    move = {name: getattr(call, name).detach().cpu().clone() for name in ("q", "k", "v")}
    mask = None if call.attn_mask is None else call.attn_mask.cpu().clone()
    return replace(call, **move, attn_mask=mask)


def _separable(call: Watched, selector: MeanSimilarity) -> bool:
    """Whether a query block alone, with its keys, is treated exactly as inside the whole call.

    Under causality a query block at the end of its keys is a lower-right aligned call, but only whole key blocks keep
    their means. Without it, the padding among the queries would be forgotten, and so would its place in the text.
    """
    if call.text:
        return False
    if not call.is_causal:
        return query_mask(call) is None
    return (call.k.shape[2] - call.q.shape[2]) % selector.block_k == 0 and selector.block_q % selector.block_k == 0


def parts(call: Watched, selector: MeanSimilarity, blocks: list[int]) -> list[tuple[Watched, list[int]]]:
    """Query blocks of a call as calls of their own where that changes nothing, else the whole call.

    Returns:
        Calls, and which query blocks to look at in each.
    """
    if not _separable(call, selector):
        return [(call, blocks)]
    block_q, q_len, k_len = selector.block_q, call.q.shape[2], call.k.shape[2]
    found = []
    for i in blocks:
        stop = min((i + 1) * block_q, q_len)
        end = stop + k_len - q_len if call.is_causal else k_len
        mask = None if call.attn_mask is None else call.attn_mask[:, :end]
        q = call.q[:, :, i * block_q : stop].clone()
        found.append((replace(call, q=q, k=call.k[:, :, :end], v=call.v[:, :, :end], attn_mask=mask), [0]))
    return found


def block_count(call: Call, block_q: int) -> int:
    """Number of query blocks of a call."""
    return cdiv(call.q.shape[2], block_q)
