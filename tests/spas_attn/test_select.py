"""Fused selection against the torch selectors: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import BF16, F32, HALF, Case
from torch import Tensor

from spas_attn import BlockMask
from spas_attn.selectors import Inputs, MeanSimilarity, PeakMass, Selector, Streaming, Tokens, TopK, fused
from spas_attn.selectors.base import per_head
from spas_attn.selectors.pooled import pool

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIE = 2e-4  # probabilities and sums of them this close may come in either order


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    """A case's q and k with some structure: means that wander, so that blocks differ, and loud, mixed stretches."""
    call = case.call(seed)
    generator = torch.Generator().manual_seed(seed)

    def shaped(x: Tensor) -> Tensor:
        drift = torch.randn(x.shape, generator=generator).cumsum(2) / 6
        loud = torch.rand(*x.shape[:3], 1, generator=generator).cumsum(2) % 70 > 50
        return x.copy_(torch.where(loud, 2 * x.float(), drift + 0.3 * x.float()))  # keeps its strides

    return Inputs(shaped(call.q), shaped(call.k), case.is_causal, call.scale, call.attn_mask, case.window)


def on_device(inputs: Inputs) -> Inputs:
    """Strides included."""

    def moved(x: Tensor) -> Tensor:
        return x if DEVICE == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)

    mask = None if inputs.key_mask is None else inputs.key_mask.to(DEVICE)
    return replace(inputs, q=moved(inputs.q), k=moved(inputs.k), key_mask=mask)


def by_torch(selector: Selector, inputs: Inputs) -> BlockMask:
    """The selection on the CPU, where the torch code makes it."""
    return selector.select(
        inputs.q, inputs.k, is_causal=inputs.is_causal, scale=inputs.scale, attn_mask=inputs.key_mask,
        window=inputs.window,
    )  # fmt: skip


def assert_same_selection(selector: Selector, inputs: Inputs, got: BlockMask | None = None) -> Tensor:
    """The fused selection is the torch code's, but for ties; returns it, bool ``[B, H, nq, nk]``."""
    got = (fused.select(selector, on_device(inputs)) if got is None else got).to("cpu")
    want = by_torch(selector, inputs)
    assert (got.block_q, got.block_k, got.q_len, got.k_len) == (want.block_q, want.block_k, want.q_len, want.k_len)
    kept, expected = got.to_dense(), want.to_dense()
    assert torch.equal(got.counts.long(), kept.sum(-1))
    listed = torch.arange(got.indices.shape[-1]) < got.counts[..., None]
    assert (got.indices.diff(dim=-1)[listed[..., 1:]] > 0).all(), "not ascending"
    assert (got.indices[~listed] == 0).all(), "filler that is not 0"
    differs = kept != expected
    if not differs.any():
        return kept
    ranking, _ = fused.parts(selector) or pytest.fail("no such selector")
    heads = inputs.q.shape[1]
    sim = per_head(getattr(ranking, "sim_threshold", -1.0), heads, "sim_threshold", torch.device("cpu"))
    pooled = pool(ranking, inputs, ranking.pool)
    if isinstance(ranking, TopK):
        probs = pooled._prepare(sim)[0].mean(-2)
        highest = probs.masked_fill(~differs, 0.0).amax(-1)
        lowest = probs.masked_fill(~differs, 1.0).amin(-1)
        assert torch.equal(kept.sum(-1), expected.sum(-1))
        assert (highest - lowest <= TIE * highest)[differs.any(-1)].all()
    else:
        cdf = per_head(ranking.cdf_threshold, heads, "cdf_threshold", torch.device("cpu"))
        assert ((pooled.levels(sim) - cdf[:, None, None]).abs()[differs] <= TIE).all()
    return kept


@pytest.mark.parametrize("seed", range(16))
def test_random_calls(seed: int) -> None:
    chance = random.Random(seed)
    is_causal = chance.random() < 0.6
    k_len = chance.randint(100, 400)
    q_len = chance.randint(50, k_len if is_causal else 300)
    block_q, block_k, length = chance.choice(
        [(128, 128, 128), (64, 64, 64), (64, 64, 16), (64, 128, 64), (128, 64, 32), (64, 64, 8), (128, 128, 16)]
    )
    case = Case(
        q_len, k_len, dim=16, heads=2, k_heads=chance.choice([1, 2]), batch=2, is_causal=is_causal,
        window=chance.choice([None, None, chance.randint(1, 400)]) if is_causal else None,
        padding=chance.choice([None, None, "left", "right", "holes", "one row empty"]),
        scale=chance.choice([0.05, 0.25, 1.0]), density=None, layout=chance.choice(["HND", "NHD", "strided"]),
    )  # fmt: skip
    size: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    more = {"sink": chance.random() < 0.5, "local": chance.choice([0, 0, 100, 200]), **size}
    many = torch.rand(2, generator=torch.Generator().manual_seed(seed))
    selector: Selector
    if chance.random() < 0.6:
        cdf = chance.choice([0.0, 1.0, many, *(chance.uniform(0.1, 0.95) for _ in range(5))])
        selector = MeanSimilarity(cdf, chance.choice([-1.0, 0.35, 0.5, 0.6 * many.flip(0)]), length, **more)
    else:
        selector = TopK(chance.choice([0.01, 0.3, 0.5, 1.0, many.clamp(min=0.1)]), length, **more)
    if chance.random() < 0.5:
        tokens = Tokens(
            ((3, 5), (-70, -2)), queries=chance.random() < 0.5, keys=chance.random() < 0.5,
            sink=chance.random() < 0.5, local=chance.choice([0, 150]), **size,
        )  # fmt: skip
        selector = selector | tokens if chance.random() < 0.5 else tokens | selector
    assert_same_selection(selector, inputs_of(case, seed))


CALLS = [
    (Case(1, 1, density=None), MeanSimilarity(0.5)),
    (Case(1, 300, density=None), TopK(0.4)),
    (Case(300, 260, dim=80, heads=8, k_heads=2, dtype=HALF, layout="NHD", density=None), MeanSimilarity(0.8)),
    (Case(200, 400, dim=256, dtype=HALF, is_causal=True, density=None), TopK(0.3, local=0)),
    (Case(70, 640, dim=96, dtype=BF16, is_causal=True, layout="strided", density=None), MeanSimilarity(0.4, 0.02)),
    (Case(256, 256, density=None), MeanSimilarity(0.7, 0.45, pool=128, sink=False)),
    (Case(256, 256, density=None), MeanSimilarity(0.7, pool=1, block_q=64, block_k=64)),
    (Case(64, 64 * 280, dim=16, heads=1, k_heads=1, density=None), MeanSimilarity(0.9, pool=64, block_k=64)),
    (Case(64, 64 * 150, dim=16, heads=1, k_heads=1, density=None), TopK(0.3, pool=64, block_k=64)),
]


@pytest.mark.parametrize(("case", "selector"), CALLS, ids=str)
def test_calls(case: Case, selector: Selector) -> None:
    kept = assert_same_selection(selector, inputs_of(case, 3))
    assert case.q_len == 1 or kept.shape[-1] < 3 or not kept.all(), "keeps everything, which shows little"


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("selector", [MeanSimilarity(0.55, sink=False, local=0), TopK(0.41, local=0)], ids=str)
def test_ties_go_to_the_first(selector: Selector, is_causal: bool) -> None:
    """Constant inputs: all visible blocks of a row are equally probable, and as many of the first ones are kept."""
    x = torch.ones(1, 1, 1024, 16)
    inputs = Inputs(x, x, is_causal, 0.25, None, None)
    kept = fused.select(selector, on_device(inputs)).to("cpu").to_dense()
    assert torch.equal(kept.sum(-1), by_torch(selector, inputs).to_dense().sum(-1))
    if not is_causal:
        assert (kept.int().diff(dim=-1) <= 0).all()


def test_equal_halves_at_the_threshold() -> None:
    """Four blocks of probability 0.25 exactly: the mass before the third is 0.5, so that 0.5 leaves it out."""
    x = torch.zeros(1, 1, 512, 16)
    for cdf, count in ((0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)):
        selector = MeanSimilarity(cdf, sink=False)
        mask = fused.select(selector, on_device(Inputs(x, x, False, 1.0, None, None)))
        assert mask.counts.tolist() == [[[count] * 4]], cdf
        assert mask.indices[0, 0, 0, :count].tolist() == list(range(count))


def test_blocks_of_no_probability() -> None:
    """Scores so far apart that all but one block has probability 0: 1 is 1, and 0.999 is not."""
    inputs = inputs_of(Case(600, 600, density=None), 1)
    inputs = replace(inputs, q=inputs.q * 100, k=inputs.k * 100)
    assert fused.select(MeanSimilarity(1.0), on_device(inputs)).to_dense().all()
    kept = fused.select(MeanSimilarity(0.999, sink=False), on_device(inputs)).to_dense()
    assert torch.equal(kept.cpu(), by_torch(MeanSimilarity(0.999, sink=False), inputs).to_dense())
    assert not kept.all()


@pytest.mark.parametrize("sim", [-1.0, 0.45])
@pytest.mark.parametrize("pool", [16, 64])
def test_later_tokens_do_not_change_earlier_selections(pool: int, sim: float) -> None:
    inputs = inputs_of(Case(500, 560, dim=16, is_causal=True, density=None), 5)
    selector = MeanSimilarity(0.5, sim, pool=pool, block_q=64, local=0)
    later_q, later_k = inputs.q.clone(), inputs.k.clone()
    later_q[:, :, 256:] *= -100
    later_k[:, :, 256 + 60 :] *= -100
    before = fused.select(selector, on_device(inputs))
    after = fused.select(selector, on_device(replace(inputs, q=later_q, k=later_k)))
    assert torch.equal(before.counts[:, :, :4], after.counts[:, :, :4])
    assert torch.equal(before.indices[:, :, :4], after.indices[:, :, :4])
    assert not torch.equal(before.to_dense()[:, :, 4:], after.to_dense()[:, :, 4:])


def test_with_int8_and_twice_the_same() -> None:
    case = Case(150, 200, heads=2, k_heads=1, batch=2, padding="holes", dtype=HALF, density=None)
    inputs, selector = inputs_of(case), MeanSimilarity(0.6)
    moved = on_device(inputs)
    first = fused.prepare_and_select(selector, moved, (64, 128))
    second = fused.prepare_and_select(selector, moved, (64, 128))
    assert_same_selection(selector, inputs, first.mask)
    assert torch.equal(first.mask.indices, second.mask.indices)
    for side, other, x, tile in ((first.q, second.q, moved.q, 64), (first.k, second.k, moved.k, 128)):
        assert side.int8 is not None
        assert side.scale is not None
        assert other.int8 is not None
        assert torch.equal(side.int8, other.int8)
        factor = inputs.scale * 1.4426950408889634 if side is first.q else 1.0
        back = side.int8 * (side.scale / factor).repeat_interleave(tile, -1)[:, :, : x.shape[2], None]
        if side is first.k:
            assert first.key_sums is not None
            sums, counts = first.key_sums
            back = back + (sums[:, 0] / counts).view(2, 1, 1, 64)
        valid = moved.key_mask[:, None, :, None] if side is first.k and moved.key_mask is not None else True
        error = torch.where(torch.as_tensor(valid, device=DEVICE), (back - x.float()).abs(), 0.0)
        assert error.max() <= 0.6 * side.scale.max() / factor
    without = fused.prepare_and_select(selector, moved)
    assert without.k.int8 is None
    assert torch.equal(without.mask.indices, first.mask.indices)


def test_which_selectors_are_known() -> None:
    mean, top, tokens = MeanSimilarity(0.5), TopK(0.5), Tokens(((0, 1),))
    for selector in (mean, top, mean | tokens, tokens | top, tokens | (mean | tokens)):
        ranking, others = fused.parts(selector) or pytest.fail(str(selector))
        assert ranking in (mean, top)
        assert all(other is tokens for other in others)
    blocks = {"block_q": 64, "block_k": 64}
    for selector in (
        tokens,
        mean | top,
        PeakMass(),
        Streaming(),
        Streaming() | mean,
        PeakMass() | Tokens((), **blocks),
    ):
        assert fused.parts(selector) is None
        with pytest.raises(ValueError, match=type(selector).__name__):
            fused.select(selector, on_device(inputs_of(Case(64, 64, density=None))))


@pytest.mark.parametrize("name", ["cdf_threshold", "sim_threshold"])
def test_thresholds_of_another_number_of_heads(name: str) -> None:
    selector = MeanSimilarity(**{name: torch.ones(3)})
    with pytest.raises(ValueError, match=rf"{name} must be a float or a tensor \[2\].*\(3,\)"):
        fused.select(selector, on_device(inputs_of(Case(64, 64, density=None))))


def test_cpu_tensors_are_left_to_torch() -> None:
    inputs = inputs_of(Case(64, 64, density=None))
    assert not fused.serves(MeanSimilarity(), inputs)


@pytest.mark.gpu
def test_route_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = on_device(inputs_of(Case(300, 300, density=None)))
    calls = []
    monkeypatch.setattr(fused, "prepare_and_select", lambda *args: calls.append(args))
    monkeypatch.setattr(fused, "select", lambda *args: calls.append(args))
    for selector in (MeanSimilarity(0.5), TopK(0.5) | Tokens(((0, 1),))):
        by_torch(selector, inputs)
        assert calls.pop() == (selector, inputs)
    for selector in (PeakMass(), Streaming() | TopK(0.5)):
        assert isinstance(by_torch(selector, inputs), BlockMask)
    assert not fused.serves(MeanSimilarity(), replace(inputs, q=inputs.q.double()))
    long = inputs.k[:, :, :1].expand(-1, -1, 128 * fused.MAX_BLOCKS + 1, -1)
    assert not fused.serves(MeanSimilarity(), replace(inputs, k=long))
    assert fused.serves(MeanSimilarity(), replace(inputs, k=long[:, :, 1:]))
    assert not calls


@pytest.mark.gpu
@pytest.mark.parametrize("selector", [MeanSimilarity(0.9), MeanSimilarity(0.9, pool=128), TopK(0.3)], ids=str)
@pytest.mark.parametrize(("length", "dim", "is_causal"), [(16384, 128, False), (32768, 64, True), (75600, 128, False)])
def test_full_size(length: int, dim: int, is_causal: bool, selector: Selector) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    stretch = torch.arange(length, device="cuda") // 100

    def draw(heads: int) -> Tensor:
        x = torch.randn(1, heads, length, dim, generator=generator, device="cuda", dtype=BF16)
        means = torch.randn(1, heads, length // 100 + 1, dim, generator=generator, device="cuda", dtype=BF16)
        return x + means[:, :, stretch]

    q, k = draw(8), draw(2)
    inputs = Inputs(q, k, is_causal, dim**-0.5, None, None)
    got = fused.select(selector, inputs).to_dense()
    visible, kept = selector.visible(inputs), selector.kept_blocks(inputs)
    assert not (got & ~visible).any()
    assert ((got != kept).float().sum() / kept.sum()) < 1e-3
    assert 0.01 < kept.float().mean() < 0.95


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    for case, selector in (
        (Case(1000, 1000, heads=4, k_heads=1, is_causal=True, dtype=BF16, density=None), MeanSimilarity(0.6)),
        (Case(300, 300, batch=2, padding="holes", dtype=HALF, density=None), TopK(0.5) | Tokens(((3, 9),))),
        (Case(300, 300, dtype=F32, density=None), MeanSimilarity(torch.full((2,), 0.5).cuda(), 0.4)),
    ):
        inputs = on_device(inputs_of(case))
        expected = fused.prepare_and_select(selector, inputs, (64, 128))  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused.prepare_and_select(selector, inputs, (64, 128))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused.prepare_and_select(selector, inputs, (64, 128))
        for tensor in (captured.mask.indices, captured.mask.counts, captured.k.int8):
            assert tensor is not None
            tensor.zero_()
        graph.replay()
        assert torch.equal(captured.mask.indices, expected.mask.indices)
        assert torch.equal(captured.mask.counts, expected.mask.counts)
        assert captured.k.int8 is not None
        assert expected.k.int8 is not None
        assert torch.equal(captured.k.int8, expected.k.int8)
