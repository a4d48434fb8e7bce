"""Curves: one pass against the direct evaluation of every candidate, and tallies that add up exactly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fake_model import DIM, activations, exact, thresholds
from torch import Tensor

from autotune import SparseAttention, curves, observe
from autotune.curves import BINS, PromptTally, Tally
from autotune.observe import Watched
from spas_attn.selectors import MeanSimilarity, Union

GRID = observe.Grid(cdf=(0.2, 0.6, 0.9), sim=(-1.0, 0.3), pv=(50.0, 6.0, 3.0, 1.5))
EDGES = 10 ** (torch.arange(BINS, dtype=torch.float64) * 5 / BINS - 4)

# name: lengths, KV heads of 4, causal, window, padding on the left and right, block sizes, query blocks looked at, text
CASES: dict[str, dict[str, Any]] = {
    "causal": dict(q_len=512, is_causal=True),
    "not causal": dict(q_len=384),
    "four KV heads": dict(q_len=320, k_heads=4, is_causal=True),
    "one KV head": dict(q_len=320, k_heads=1),
    "ragged": dict(q_len=333, is_causal=True),
    "ragged, not causal": dict(q_len=333),
    "left padding": dict(q_len=450, is_causal=True, left=100),
    "right padding, not causal": dict(q_len=450, right=100),
    "window": dict(q_len=512, is_causal=True, window=150),
    "chunk at the end": dict(q_len=200, k_len=460, is_causal=True),
    "cross attention": dict(q_len=200, k_len=460, right=70),
    "128 x 64": dict(q_len=512, is_causal=True, block_q=128),
    "64 x 128": dict(q_len=500, is_causal=True, block_k=128),
    "sampled": dict(q_len=640, is_causal=True, blocks=[0, 3, 9]),
    "text first": dict(q_len=600, text=((0, 70),)),
    "text last, padded": dict(q_len=600, right=60, text=((480, 600),)),
    "text, 128 x 64": dict(q_len=900, block_q=128, text=((300, 310),), blocks=[0, 2, 4]),
}


def make(
    q_len: int,
    *,
    k_len: int | None = None,
    k_heads: int = 2,
    is_causal: bool = False,
    window: int | None = None,
    left: int = 0,
    right: int = 0,
    block_q: int = 64,
    block_k: int = 64,
    blocks: list[int] | None = None,
    text: tuple[tuple[int, int], ...] = (),
) -> tuple[Watched, SparseAttention, list[int]]:
    k_len = k_len or q_len
    q, k, v = activations(q_len, q_len, k_len, noise=0.2, k_heads=k_heads, batch=2)
    mask = None
    if left or right:  # of the first of two sequences
        mask = torch.ones(2, k_len, dtype=torch.bool)
        mask[0, :left] = False
        mask[0, k_len - right :] = False
    call = Watched(q, k, v, is_causal=is_causal, scale=DIM**-0.5, window=window, attn_mask=mask, text=text)
    module = SparseAttention(selector=MeanSimilarity(pool=16, block_q=block_q, block_k=block_k))
    module.set_thresholds(thresholds(cdf=0.98))
    return call, module, blocks or list(range(-(-q_len // block_q)))


def counted(call: Watched, block_q: int, blocks: list[int]) -> Tensor:
    """Queries that count, bool [B, 1, Lq]: of the chosen blocks, with something to see, and no padding themselves."""
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    rows = torch.isin(torch.arange(q_len) // block_q, torch.tensor(blocks))
    seen = call.token_mask(0, q_len)
    valid = rows.expand(2, 1, -1) if seen is None else rows & seen.expand(2, 1, q_len, k_len).any(-1)
    if call.attn_mask is not None and (call.is_causal or q_len == k_len):
        valid = valid & call.attn_mask[:, None, k_len - q_len :]
    return valid


def check(tally: Tally, candidate: int, out: Tensor, call: Watched, valid: Tensor) -> None:
    """One candidate's sums and histogram against its output."""
    truth = exact(call).double()
    difference, norm = (out.double() - truth).abs().sum(-1) * valid, truth.abs().sum(-1) * valid
    total = tally.total()
    torch.testing.assert_close(total[0], norm.sum((0, 2)), rtol=1e-5, atol=0)
    mean = difference.sum((0, 2)) / norm.sum((0, 2))
    torch.testing.assert_close(total[1 + candidate] / total[0], mean, rtol=0, atol=1e-6)
    above = tally.histogram[:, candidate].flip(-1).cumsum(-1).flip(-1)
    for head in range(len(above)):
        relative = (difference[:, head] / norm[:, head])[valid[:, 0]]
        least, most = ((relative * (1 + s) + t)[:, None] >= EDGES for s, t in ((-1e-4, -2e-6), (1e-4, 2e-6)))
        assert above[head, 0] == len(relative) == tally.queries[0]
        assert (least.sum(0)[1:] <= above[head, 1:]).all()
        assert (above[head, 1:] <= most.sum(0)[1:]).all()
        direct = (relative[:, None] >= EDGES).sum(0)
        # Rounding alone may put a query on the other side of an edge.
        assert (direct[1:] - above[head, 1:]).abs().sum() <= 0.01 * len(relative)


@pytest.mark.parametrize("name", CASES)
def test_one_pass_equals_direct_evaluation(name: str) -> None:
    call, module, blocks = make(**CASES[name])
    open_tally = PromptTally(4, len(GRID))
    observe.add_curves(open_tally, module, call, GRID, blocks)
    tally = open_tally.close(0)
    valid = counted(call, module.selector.block_q, blocks)
    visible = module.selector.visible(observe.inputs_of(call)).expand(2, 4, -1, -1).sum((0, 2, 3))
    assert torch.equal(tally.possible, visible)
    for candidate in range(len(GRID)):
        sim, cdf = GRID.pair(candidate)
        module.set_thresholds(thresholds(cdf=cdf, sim=sim))
        selector, _ = module.tuned(call.q.device, call.text)  # what serves such a call
        mask = selector.select(
            call.q, call.k, is_causal=call.is_causal, scale=call.scale, attn_mask=call.attn_mask, window=call.window
        )
        assert torch.equal(tally.kept[:, candidate], mask.counts.sum((0, 2)))
        check(tally, candidate, exact(call.replace(mask=mask)), call, valid)
    density = tally.density()
    assert torch.equal(density, tally.kept / visible[:, None].double())
    assert density.min() < 0.95, "the case drops too little to test anything"


@pytest.mark.parametrize(
    "name",
    [
        *("causal", "not causal", "ragged", "left padding", "window", "128 x 64", "64 x 128"),
        "text first",
        "text, 128 x 64",
    ],
)
def test_pv_curve_equals_the_reference_backend(name: str) -> None:
    call, module, blocks = make(**CASES[name])
    open_tally = PromptTally(4, len(GRID.pv))
    observe.add_pv_curves(open_tally, module, call, GRID, blocks)
    tally = open_tally.close(0)
    selector, _ = module.tuned(call.q.device, call.text)
    mask = selector.select(
        call.q, call.k, is_causal=call.is_causal, scale=call.scale, attn_mask=call.attn_mask, window=call.window
    )
    valid = counted(call, module.selector.block_q, blocks)
    for candidate, pv in enumerate(GRID.pv):
        out = exact(call.replace(mask=mask, pv_threshold=torch.full((4,), pv)))
        check(tally, candidate, out, call, valid)
    density = tally.density()
    assert (density[:, 0] == 1).all(), "off skips nothing"
    assert (density.diff(dim=1) <= 0).all()
    assert density[:, -1].min() < 0.99, "the case skips too little to test anything"


def test_text_is_kept_whatever_the_threshold() -> None:
    densities = {}
    for text_sink in (True, False):
        call, module, blocks = make(**CASES["text first"])
        module.text_sink = text_sink
        module.set_thresholds(thresholds(cdf=0.05))
        open_tally = PromptTally(4, len(GRID))
        observe.add_curves(open_tally, module, call, GRID, blocks)
        densities[text_sink] = open_tally.close(0).density()[:, 0]
        selector, _ = module.tuned(call.q.device, call.text)
        kept = selector.select(call.q, call.k, is_causal=False).to_dense()
        assert isinstance(selector, Union) is text_sink
        assert bool(kept[:, :, :2].all() and kept[..., :2].all()) is text_sink  # 70 tokens touch two blocks of 64
    assert (densities[True] > densities[False]).all()


def test_partials_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    call, module, blocks = make(q_len=320, is_causal=True)
    whole, split = PromptTally(4, len(GRID)), PromptTally(4, len(GRID))
    observe.add_curves(whole, module, call, GRID, blocks)
    monkeypatch.setattr(curves, "_PARTIALS", 1)  # one KV head at a time
    observe.add_curves(split, module, call, GRID, blocks)
    torch.testing.assert_close(split.sums, whole.sums, rtol=1e-6, atol=1e-9)
    assert torch.equal(split.kept, whole.kept)


def test_binning() -> None:
    relative = torch.tensor([0.0, 5e-5, 1.1e-4, 0.0099, 0.0101, 0.5, 9.99, 10.5, 1e9, float("nan")])
    tally = PromptTally(1, 1)
    valid = torch.ones(1, 1, 11, dtype=torch.bool)
    valid[..., 10] = False  # this query does not count
    norm = torch.full((1, 1, 11), 2.0) * valid
    tally.add_errors(slice(None), torch.cat([2 * relative, torch.zeros(1)]).view(1, 1, 1, 11), norm, valid)
    expected = torch.zeros(BINS, dtype=torch.int64)
    for bin_, count in ((0, 3), (25, 1), (47, 1), (63, 4)):
        expected[bin_] += count
    expected[int((torch.tensor(0.0101).log10() + 4) * BINS / 5)] += 1
    assert torch.equal(tally.histogram[0, 0], expected)
    assert int(tally.close(3).queries[0]) == 10


def several(count: int) -> list[Tally]:
    tallies = []
    for prompt in range(count):
        q, k, v = activations(prompt, 256, 256, noise=0.3 + 0.2 * prompt)
        call = Watched(q, k, v, is_causal=True, scale=DIM**-0.5)
        module = SparseAttention(selector=MeanSimilarity(block_q=64, block_k=64))
        open_tally = PromptTally(4, len(GRID))
        observe.add_curves(open_tally, module, call, GRID, list(range(prompt % 3 + 1)))
        tallies.append(open_tally.close(prompt))
    return tallies


def test_merge_is_exact_in_any_order() -> None:
    results = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        tallies = several(4)
        left, right = tallies[order[0]], tallies[order[1]]
        left.merge(tallies[order[2]])
        right.merge(tallies[order[3]])
        left.merge(right)
        results.append(left)
    parts = several(4)
    for result in results:
        assert torch.equal(result.total(), results[0].total())  # float64, to the bit
        for name in ("histogram", "squares", "products", "queries", "kept", "possible"):
            assert torch.equal(getattr(result, name), sum(getattr(part, name) for part in parts)), name
        assert sorted(result.sums) == [0, 1, 2, 3]
    above = torch.stack([part.histogram.flip(-1).cumsum(-1).flip(-1) for part in parts])
    queries = torch.stack([part.queries[0] for part in parts])
    assert torch.equal(results[0].squares, above.square().sum(0))
    assert torch.equal(results[0].products, (above * queries.view(-1, 1, 1, 1)).sum(0))
    assert results[0].queries.tolist() == [int(queries.sum()), int(queries.square().sum())]


def test_a_prompt_counted_twice_is_refused() -> None:
    a, b, c = several(3)
    a.merge(b)
    before = a.histogram.clone()
    c.sums = {1: c.sums[2], 7: c.sums[2]}
    with pytest.raises(ValueError, match=r"prompts \[1\] were counted twice"):
        a.merge(c)
    assert torch.equal(a.histogram, before)
