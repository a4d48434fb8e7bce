"""What is accumulated: one pass against the direct evaluation of every candidate, and tallies that add up exactly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fake_model import activations, exact, tuned
from torch import Tensor

from autotune import Grid, SparseAttention, accumulate, partials
from autotune.accumulate import BINS, PromptTally, Tally, add_check, add_curves, add_pv_curves
from autotune.sampling import Sampler
from spas_attn.backends import triton
from spas_attn.call import Call
from spas_attn.kernels import config
from spas_attn.plan import Plan, plan
from spas_attn.selectors import MeanSimilarity, TopK, Union

GRID = Grid(cdf=(0.2, 0.6, 0.9), sim=(-1.0, 0.3), pv=(50.0, 6.0, 3.0, 1.5))
PAIRS = GRID.pairs(MeanSimilarity())
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
    "attention sinks, left padding": dict(q_len=450, is_causal=True, left=100, sinks=(-2.0, 0.0, 3.0, 6.0)),
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
    sinks: tuple[float, ...] | None = None,
) -> tuple[Call, SparseAttention, list[int]]:
    k_len = k_len or q_len
    q, k, v = activations(q_len, q_len, k_len, noise=0.2, k_heads=k_heads, batch=2)
    mask = None
    if left or right:  # of the first of two sequences
        mask = torch.ones(2, k_len, dtype=torch.bool)
        mask[0, :left] = False
        mask[0, k_len - right :] = False
    logits = None if sinks is None else torch.tensor(sinks)
    call = Call.make(q, k, v, is_causal=is_causal, window=window, attn_mask=mask, text=text, sinks=logits)
    module = SparseAttention(selector=MeanSimilarity(pool=16, block_q=block_q, block_k=block_k))
    module.set_thresholds(tuned(threshold=0.98))
    return call, module, blocks or list(range(-(-q_len // block_q)))


def counted(call: Call, block_q: int, blocks: list[int]) -> Tensor:
    """Queries that count, bool [B, 1, Lq]: of the chosen blocks, with something to see, and no padding themselves."""
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    rows = torch.isin(torch.arange(q_len) // block_q, torch.tensor(blocks))
    seen = call.token_mask(0, q_len)
    valid = rows.expand(2, 1, -1) if seen is None else rows & seen.expand(2, 1, q_len, k_len).any(-1)
    if call.attn_mask is not None and (call.is_causal or q_len == k_len):
        valid = valid & call.attn_mask[:, None, k_len - q_len :]
    return valid


def check(tally: Tally, candidate: int, out: Tensor, call: Call, valid: Tensor) -> None:
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


def blocks_of(call: Call, block_q: int, kept: Tensor) -> Tensor:
    """Blocks ``[B, H, nq, nk]`` of queries that are no padding, counted per head."""
    real = torch.ones(2, 1, call.q_len, dtype=torch.bool)
    if call.attn_mask is not None and (call.is_causal or call.q_len == call.k_len):
        real = real & call.attn_mask[:, None, call.k_len - call.q_len :]
    rows = torch.stack([part.any(-1) for part in real.split(block_q, -1)], -1)
    return (kept.expand(2, 4, -1, -1) & rows[..., None]).sum((0, 2, 3))


@pytest.mark.parametrize("name", CASES)
def test_one_pass_equals_direct_evaluation(name: str) -> None:
    call, module, blocks = make(**CASES[name])
    block_q = module.selector.block_q
    open_tally = PromptTally(4, len(PAIRS))
    add_curves(open_tally, module, call, GRID, blocks)
    tally = open_tally.close(0)
    valid = counted(call, block_q, blocks)
    visible = blocks_of(call, block_q, module.selector.visible(call))
    assert torch.equal(tally.possible, visible)
    for candidate, (sim, threshold) in enumerate(PAIRS):
        module.set_thresholds(tuned(threshold=threshold, sim=sim))
        mask = module.serving(call)[0].mask_of(call)  # what serves such a call
        assert torch.equal(tally.kept[:, candidate], blocks_of(call, block_q, mask.to_dense()))
        check(tally, candidate, exact(call.replace(mask=mask)), call, valid)
    density = tally.density()
    assert torch.equal(density, tally.kept / visible[:, None].double())
    assert density.min() < 0.95, "the case drops too little to test anything"


@pytest.mark.parametrize("name", ["causal", "ragged", "left padding", "window", "128 x 64", "64 x 128", "text first"])
def test_pv_curve_equals_the_reference_backend(name: str) -> None:
    call, module, blocks = make(**CASES[name])
    open_tally = PromptTally(4, len(GRID.pv))
    add_pv_curves(open_tally, module, call, GRID, blocks)
    tally = open_tally.close(0)
    mask = module.serving(call)[0].mask_of(call)
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
        module.set_thresholds(tuned(threshold=0.05))
        open_tally = PromptTally(4, len(PAIRS))
        add_curves(open_tally, module, call, GRID, blocks)
        densities[text_sink] = open_tally.close(0).density()[:, 0]
        selector, _ = module.serving(call)
        kept = selector.kept(call)
        assert isinstance(selector, Union) is text_sink
        assert bool(kept[:, :, :2].all() and kept[..., :2].all()) is text_sink  # 70 tokens touch two blocks of 64
    assert (densities[True] > densities[False]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    """A padded batch is judged as the same sequence without its padding."""
    q, k, v = activations(3, 384, 384)
    pad = (0, 0, 256, 0) if side == "left" else (0, 0, 0, 256)
    mask = torch.nn.functional.pad(torch.ones(1, 384, dtype=torch.bool), pad[2:])
    alone = Call.make(q, k, v, is_causal=True)
    padded = Call.make(*(torch.nn.functional.pad(x, pad) for x in (q, k, v)), is_causal=True, attn_mask=mask)
    module = SparseAttention(selector=MeanSimilarity(pool=16, block_q=64, block_k=64))
    module.set_thresholds(tuned(threshold=0.9))
    found = []
    for call in (alone, padded):
        blocks = Sampler(4, 0).blocks(call, 64, 1, 2)
        curves, checked = PromptTally(4, len(PAIRS)), PromptTally(4, 2)
        add_curves(curves, module, call, GRID, blocks)
        add_check(checked, module, call)
        found.append((curves.close(0), checked.close(0)))
    for tally, other in zip(*found, strict=True):
        assert torch.equal(tally.histogram.sum(-1), other.histogram.sum(-1))
        assert torch.equal(tally.possible, other.possible) and torch.equal(tally.kept, other.kept)
        torch.testing.assert_close(tally.total(), other.total(), rtol=1e-4, atol=1e-4)


def test_the_sampler_takes_blocks_that_are_no_padding() -> None:
    mask = torch.zeros(2, 1000, dtype=torch.bool)
    mask[0, 130:300], mask[1, 640:700] = True, True
    x = torch.zeros(2, 1, 1000, 16)
    call = Call.make(x, x, x, attn_mask=mask)
    assert Sampler(None, 0).blocks(call, 64) == [2, 3, 4, 10]
    found = [Sampler(2, seed).blocks(call, 64, 5, 6) for seed in range(20)]
    assert {i for blocks in found for i in blocks} == {2, 3, 4, 10}
    assert all(blocks == sorted(set(blocks)) and len(blocks) == 2 for blocks in found)


def test_partials_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    call, module, blocks = make(q_len=320, is_causal=True)
    whole, split = PromptTally(4, len(PAIRS)), PromptTally(4, len(PAIRS))
    add_curves(whole, module, call, GRID, blocks)
    monkeypatch.setattr(partials, "_PARTIALS", 1)  # one KV head at a time
    add_curves(split, module, call, GRID, blocks)
    torch.testing.assert_close(split.sums, whole.sums, rtol=1e-6, atol=1e-9)
    assert torch.equal(split.kept, whole.kept)


def test_the_check_has_the_sinks_in_both() -> None:
    call, module, _ = make(q_len=450, is_causal=True, left=100, sinks=(-2.0, 0.0, 3.0, 6.0))
    mask = module.serving(call)[0].mask_of(call)
    tally = PromptTally(4, 2)
    assert add_check(tally, module, call) == "cpu"
    check(tally.close(0), 1, exact(call.replace(mask=mask)), call, counted(call, 64, list(range(8))))


@pytest.mark.parametrize(("fits", "asked"), [(True, "triton"), (True, "auto"), (False, "triton")])
def test_pv_skip_that_does_not_pay_is_checked_all_the_same(
    monkeypatch: pytest.MonkeyPatch, fits: bool, asked: str
) -> None:
    """By the kernel itself, fast at any length, also where "auto" would take dense attention; by the reference only
    where the kernel cannot carry it out.
    """
    call, module, blocks = make(q_len=300, is_causal=True, left=100)
    module.backend = asked
    dense = Plan("sdpa", "exact dense attention is faster here", instead_of="triton")
    monkeypatch.setattr(accumulate, "plan", lambda *given: dense if given[2] == "auto" else plan(*given))
    module.set_thresholds(tuned(threshold=0.98, pv=1.0))
    monkeypatch.setattr(config, "skip_pays", lambda *facts: False)
    if not fits:
        monkeypatch.setattr(triton, "cannot_skip", lambda call: "tiles do not fit on this GPU")
    tally = PromptTally(4, 2)
    assert add_check(tally, module, call) == ("triton" if fits else "reference")
    mask, pv = module.serving(call)[0].mask_of(call), torch.ones(4)
    selection, everything = (exact(call.replace(mask=mask, pv_threshold=x)) for x in (None, pv))
    assert not torch.allclose(selection, everything, atol=1e-2), "nothing is skipped"
    closed, valid = tally.close(0), counted(call, 64, blocks)
    check(closed, 0, selection, call, valid)
    check(closed, 1, everything, call, valid)


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
        call = Call.make(q, k, v, is_causal=True)
        module = SparseAttention(selector=MeanSimilarity(block_q=64, block_k=64))
        open_tally = PromptTally(4, len(PAIRS))
        add_curves(open_tally, module, call, GRID, list(range(prompt % 3 + 1)))
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


def test_the_grid_is_checked() -> None:
    for name, value in (("cdf", ()), ("sim", ()), ("cdf", (1.0,)), ("pv", (0.0,))):
        with pytest.raises(ValueError, match=name):
            Grid(**{name: value})
    assert Grid().pairs(TopK()) == [(-1.0, keep) for keep in TopK.candidates]
    with pytest.raises(ValueError, match="TopK has no similarity filter"):
        GRID.check(TopK())
