"""Fused selection against the torch selectors: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import BF16, F32, HALF, Case
from torch import Tensor

from spas_attn import BlockMask, Call
from spas_attn.checks import per_head
from spas_attn.fused import run_fused
from spas_attn.select import MAX_BLOCKS, Selection, _fused_traced, fused_serves, parts_of, select
from spas_attn.selectors import (
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    PeakMass,
    Selector,
    Streaming,
    Tokens,
    TopK,
    Union,
    XAttention,
)
from spas_attn.selectors.pooled import mean_row, pooled_rows, probabilities

pytest.importorskip("triton")
from spas_attn.kernels import probabilities as pooled_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIE = 2e-4  # probabilities and sums of them this close may come in either order


def inputs_of(case: Case, seed: int = 0) -> Call:
    """A case's q and k with some structure: means that wander, so that blocks differ, and loud, mixed stretches."""
    call = case.call(seed)
    generator = torch.Generator().manual_seed(seed)

    def shaped(x: Tensor) -> Tensor:
        drift = torch.randn(x.shape, generator=generator).cumsum(2) / 6
        loud = torch.rand(*x.shape[:3], 1, generator=generator).cumsum(2) % 70 > 50
        return x.copy_(torch.where(loud, 2 * x.float(), drift + 0.3 * x.float()))  # keeps its strides

    return call.replace(q=shaped(call.q), k=shaped(call.k))


def constant(x: Tensor, is_causal: bool = False, scale: float = 1.0) -> Call:
    return Call(x, x, x, is_causal, scale)


def on_device(call: Call) -> Call:
    """Strides included."""

    def moved(x: Tensor) -> Tensor:
        return x if DEVICE == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)

    mask = None if call.attn_mask is None else call.attn_mask.to(DEVICE)
    return call.replace(q=moved(call.q), k=moved(call.k), v=moved(call.v), attn_mask=mask)


def fused(selector: Selector, call: Call, quantise: bool = False) -> Selection:
    """The kernels' selection, whatever device serves; ``call`` is on the CPU."""
    moved = on_device(call)
    mask, made = run_fused(parts_of(selector, moved), moved, quantise)
    return Selection(mask, made.keys, made.values)


def assert_same_selection(selector: Selector, call: Call, got: BlockMask | None = None) -> Tensor:
    """The fused selection is the torch code's, but for ties; returns it, bool ``[B, H, nq, nk]``."""
    got = (fused(selector, call).mask if got is None else got).to("cpu")
    want = selector.mask_of(call)
    assert (got.block_q, got.block_k, got.q_len, got.k_len) == (want.block_q, want.block_k, want.q_len, want.k_len)
    kept, expected = got.to_dense(), want.to_dense()
    assert torch.equal(got.counts.long(), kept.sum(-1))
    listed = torch.arange(got.indices.shape[-1]) < got.counts[..., None]
    assert (got.indices.diff(dim=-1)[listed[..., 1:]] > 0).all(), "not ascending"
    assert (got.indices[~listed] == 0).all(), "filler that is not 0"
    differs = kept != expected
    if not differs.any():
        return kept
    ranking = next(leaf for leaf in leaves(selector) if not isinstance(leaf, Tokens))
    if isinstance(ranking, (XAttention, FlexPrefill, FlashPrefill, MInference)):
        gap = (ranking.final_levels(call) - ranking._per_head(call)).abs()
        assert (gap[differs] <= TIE).all()
    elif isinstance(ranking, TopK):
        probs = mean_row(probabilities(pooled_rows(ranking, call, ranking.pool)))
        highest = probs.masked_fill(~differs, 0.0).amax(-1)
        lowest = probs.masked_fill(~differs, 1.0).amin(-1)
        assert torch.equal(kept.sum(-1), expected.sum(-1))
        assert (highest - lowest <= TIE * highest)[differs.any(-1)].all()
    else:
        cdf = per_head(ranking.threshold, call.q.shape[1], "cdf_threshold", torch.device("cpu"))
        assert ((ranking.levels(call) - cdf[:, None, None]).abs()[differs] <= TIE).all()
    return kept


def leaves(selector: Selector) -> list[Selector]:
    return leaves(selector.first) + leaves(selector.second) if isinstance(selector, Union) else [selector]


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


def prefill_selector(kind: str, chance: random.Random, heads: int, **size: Any) -> Selector:
    """One of the selectors for long prompts, with thresholds of all kinds."""
    many = torch.rand(heads, generator=torch.Generator().manual_seed(chance.randrange(99)))
    if kind == "XAttention":
        return XAttention(chance.choice([0.0, 1.0, many, *(chance.uniform(0.1, 0.95) for _ in range(4))]),
                          chance.choice([4, 8, 16, 64]), **size)  # fmt: skip
    if kind == "FlashPrefill":
        return FlashPrefill(chance.choice([0.0, many, *(chance.uniform(0.01, 0.9) for _ in range(4))]),
                            sink_blocks=chance.choice([0, 2]), last_blocks=chance.choice([0, 1]), **size)  # fmt: skip
    if kind == "FlexPrefill":
        return FlexPrefill(chance.choice([1.0, many, *(chance.uniform(0.1, 0.95) for _ in range(4))]),
                           chance.choice([0.0, 0.1, 0.25, 5.0, many]), min_budget=chance.choice([0, 0, 100, 300]),
                           max_budget=chance.choice([None, None, 300, 400]), **size)  # fmt: skip
    pattern = chance.choice(["vertical_slash", "a_shape", tuple(["a_shape", "vertical_slash"] * (heads // 2))])
    return MInference(pattern, chance.choice([30, 60, 100 * many]), chance.choice([60, 150, 300 * many]),
                      chance.choice([None, 0.3, 1.0, many]), **size)  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["XAttention", "FlashPrefill", "FlexPrefill", "MInference"])
def test_prefill_selectors(kind: str, seed: int) -> None:
    chance = random.Random(f"{kind} {seed}")
    is_causal = seed % 3 != 2
    k_len = chance.randint(200, 500)
    block_q, block_k = chance.choice([(128, 128), (64, 64), (64, 64), (64, 128), (128, 64)])
    case = Case(
        chance.randint(60, k_len if is_causal else 300), k_len, dim=16, heads=4, k_heads=chance.choice([1, 2]),
        batch=chance.choice([1, 2]), is_causal=is_causal,
        window=chance.choice([None, None, chance.randint(1, 400)]) if is_causal else None,
        padding=chance.choice([None, None, "left", "right", "holes", "one row empty"]),
        scale=chance.choice([0.05, 0.25, 1.0]), density=None, layout=chance.choice(["HND", "NHD", "strided"]),
    )  # fmt: skip
    dense = chance.choice([None, None, torch.tensor([False, True, False, False])])
    size: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    selector = prefill_selector(
        kind, chance, 4, sink=chance.random() < 0.5, local=chance.choice([0, 0, 100]), dense_heads=dense, **size
    )
    if chance.random() < 0.3:
        selector = selector | Tokens(((3, 5), (-70, -2)), queries=chance.random() < 0.5, **size)
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
    (Case(300, 700, dim=96, dtype=BF16, is_causal=True, density=None), XAttention(0.6, 8, block_k=64)),
    (Case(512, 512, dim=64, dtype=HALF, is_causal=True, density=None), XAttention(0.5, block_q=64, block_k=64)),
    (Case(300, 700, dim=80, dtype=HALF, is_causal=True, density=None), FlashPrefill(0.7, 1, 0, local=0)),
    (Case(300, 700, dim=80, dtype=BF16, is_causal=True, density=None), FlexPrefill(0.5, 0.0, 0, block_k=64)),
    (Case(300, 700, dim=64, dtype=BF16, is_causal=True, density=None), FlexPrefill(0.5, 9.0, 0, block_k=64)),
    (Case(200, 1000, dim=64, dtype=HALF, is_causal=True, density=None), MInference("vertical_slash", 30, 60)),
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
    call = constant(x, is_causal, 0.25)
    kept = fused(selector, call).mask.to("cpu").to_dense()
    assert torch.equal(kept.sum(-1), selector.kept(call).sum(-1))
    if not is_causal:
        assert (kept.int().diff(dim=-1) <= 0).all()


def test_equal_halves_at_the_threshold() -> None:
    """Four blocks of probability 0.25 exactly: the mass before the third is 0.5, so that 0.5 leaves it out."""
    x = torch.zeros(1, 1, 512, 16)
    for cdf, count in ((0.0, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)):
        selector = MeanSimilarity(cdf, sink=False)
        mask = fused(selector, constant(x)).mask
        assert mask.counts.tolist() == [[[count] * 4]], cdf
        assert mask.indices[0, 0, 0, :count].tolist() == list(range(count))


def test_blocks_of_no_probability() -> None:
    """Scores so far apart that all but one block has probability 0: 1 is 1, and 0.999 is not."""
    call = inputs_of(Case(600, 600, density=None), 1)
    call = call.replace(q=call.q * 100, k=call.k * 100)
    assert fused(MeanSimilarity(1.0), call).mask.to_dense().all()
    kept = fused(MeanSimilarity(0.999, sink=False), call).mask.to_dense()
    assert torch.equal(kept.cpu(), MeanSimilarity(0.999, sink=False).kept(call))
    assert not kept.all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_pooled_scores_by_one_program(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences are shared by few programs, for the sake of memory; the lists are those of many."""
    call = inputs_of(Case(700, 760, heads=2, k_heads=1, dim=16, is_causal=is_causal, density=None), 3)
    selector = MeanSimilarity(0.6, 0.3, pool=8, block_q=64, block_k=64, local=0)
    expected = fused(selector, call).mask
    assert_same_selection(selector, call, expected)
    monkeypatch.setattr(pooled_kernels, "_MEMORY", 0)
    got = fused(selector, call).mask
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.indices, expected.indices)


@pytest.mark.parametrize("sim", [-1.0, 0.45])
@pytest.mark.parametrize("pool", [16, 64])
def test_later_tokens_do_not_change_earlier_selections(pool: int, sim: float) -> None:
    call = inputs_of(Case(500, 560, dim=16, is_causal=True, density=None), 5)
    selector = MeanSimilarity(0.5, sim, pool=pool, block_q=64, local=0)
    later_q, later_k = call.q.clone(), call.k.clone()
    later_q[:, :, 256:] *= -100
    later_k[:, :, 256 + 60 :] *= -100
    before = fused(selector, call).mask
    after = fused(selector, call.replace(q=later_q, k=later_k)).mask
    assert torch.equal(before.counts[:, :, :4], after.counts[:, :, :4])
    assert torch.equal(before.indices[:, :, :4], after.indices[:, :, :4])
    assert not torch.equal(before.to_dense()[:, :, 4:], after.to_dense()[:, :, 4:])


def test_with_int8_and_twice_the_same() -> None:
    case = Case(150, 200, heads=2, k_heads=1, batch=2, padding="holes", dtype=HALF, density=None)
    call, selector = inputs_of(case), MeanSimilarity(0.6)
    first, second = (fused(selector, call, quantise=True) for _ in range(2))
    assert_same_selection(selector, call, first.mask)
    assert torch.equal(first.mask.indices, second.mask.indices)
    assert first.keys is not None and second.keys is not None
    assert all(torch.equal(a, b) for a, b in zip(first.keys, second.keys, strict=True))
    int8, scale, mean = (x.cpu() for x in first.keys)
    back = int8 * scale.repeat_interleave(128, -1)[:, :, :200, None] + mean[:, :, None]
    assert call.key_mask is not None
    error = torch.where(call.key_mask[:, None, :, None], (back - call.k.float()).abs(), 0.0)
    assert error.max() <= 0.6 * scale.max()
    assert torch.equal(fused(selector, call).mask.indices, first.mask.indices)


def test_which_selectors_are_known() -> None:
    call = inputs_of(Case(64, 64, density=None))
    mean, top, tokens = MeanSimilarity(0.5), TopK(0.5), Tokens(((0, 1),))
    prefill = (XAttention(), FlexPrefill(), FlashPrefill(), MInference(), MInference(("a_shape", "vertical_slash")))
    for selector in (mean, top, mean | tokens, tokens | top, tokens | (mean | tokens), *prefill, prefill[0] | tokens):
        parts = parts_of(selector, call)
        assert parts.ranking in (mean, top, *prefill)
        assert parts.ranking in leaves(selector)
        assert parts.tokens == (tokens in leaves(selector))

    class Own(TopK):
        """May rank otherwise."""

    blocks = {"block_q": 64, "block_k": 64}
    for other in (
        tokens, mean | top, FlashPrefill() | mean, PeakMass(), Streaming(), Streaming() | mean, Own(),
        PeakMass() | Tokens((), **blocks), MInference("block_sparse"), MInference(("a_shape", "block_sparse")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"not {type(other).__name__}"):
            parts_of(other, call)
        assert not fused_serves(other, on_device(call))


@pytest.mark.parametrize("name", ["cdf_threshold", "sim_threshold"])
def test_thresholds_of_another_number_of_heads(name: str) -> None:
    selector = MeanSimilarity(**{name: torch.ones(3)})
    with pytest.raises(ValueError, match=rf"{name} must be a float or a tensor \[2\].*\(3,\)"):
        fused(selector, inputs_of(Case(64, 64, density=None)))


def test_cpu_tensors_are_left_to_torch() -> None:
    call = inputs_of(Case(64, 64, density=None))
    assert not fused_serves(MeanSimilarity(), call)
    assert select(MeanSimilarity(), call, quantise=True).keys is None


HALVES = torch.tensor([0.4, 0.7])
TRACED: list[Selector] = [
    MeanSimilarity(HALVES, 0.2 * HALVES),
    TopK(0.3) | Tokens(((3, 9),)),
    XAttention(HALVES, 8),
    FlashPrefill(0.3, 0, 1, dense_heads=torch.tensor([True, False])),
    FlexPrefill(HALVES, 0.3, 0, 384),
    MInference(("a_shape", "vertical_slash"), 100 * HALVES, 64),
    MInference(adaptive_budget=HALVES),
]


@pytest.mark.parametrize("selector", TRACED, ids=lambda selector: type(selector).__name__)
def test_through_the_custom_op(selector: Selector) -> None:
    """What torch.compile takes as one operation takes selectors apart and puts them together again."""
    call = inputs_of(Case(200, 260, heads=2, k_heads=1, dim=32, is_causal=True, density=None))
    parts = parts_of(selector, call)
    for precision in ("int8_bf16", "int8_fp8"):
        call = call.replace(precision=precision)
        mask, made = run_fused(parts, call, True)
        got = _fused_traced(parts, call, True)
        assert torch.equal(got.mask.indices, mask.indices)
        assert got.keys is not None and made.keys is not None
        assert all(torch.equal(a, b) for a, b in zip(got.keys, made.keys, strict=True))
        assert (got.values is None) == (made.values is None) == (precision == "int8_bf16")
        for a, b in zip(got.values or (), made.values or (), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    def lists(q: Tensor, k: Tensor) -> Tensor:
        again = call.replace(q=q, k=k)
        return _fused_traced(parts_of(selector, again), again, False).mask.indices

    compiled = torch.compile(lists, fullgraph=True, backend="eager")
    assert torch.equal(compiled(call.q, call.k), mask.indices)


@pytest.mark.gpu
def test_route_on_a_gpu() -> None:
    call = on_device(inputs_of(Case(300, 300, density=None)))
    for selector in (MeanSimilarity(0.5), TopK(0.5) | Tokens(((0, 1),))):
        assert fused_serves(selector, call)
        got, _ = run_fused(parts_of(selector, call), call, True)
        chosen = select(selector, call, quantise=True)
        assert torch.equal(chosen.mask.indices, got.indices)
        assert chosen.keys is not None
        assert len(chosen.keys) == 3
        assert select(selector, call).keys is None
    for selector in (PeakMass(), Streaming() | TopK(0.5)):
        assert not fused_serves(selector, call)
        assert torch.equal(select(selector, call).mask.to_dense(), selector.kept(call))
    long = call.k[:, :, :1].expand(-1, -1, 128 * MAX_BLOCKS + 1, -1)
    assert not fused_serves(MeanSimilarity(), call.replace(k=long))
    assert fused_serves(MeanSimilarity(), call.replace(k=long[:, :, 1:]))


FULL_SIZE = [
    MeanSimilarity(0.9), MeanSimilarity(0.9, pool=128), TopK(0.3), XAttention(0.9), XAttention(0.8, 8),
    FlashPrefill(0.18), FlexPrefill(0.95), FlexPrefill(0.8, 9.0, 0), FlexPrefill(0.8, 0.0, 0), MInference(),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("selector", FULL_SIZE, ids=str)
@pytest.mark.parametrize(("length", "dim", "is_causal"), [(16384, 128, False), (32768, 64, True), (75600, 128, False)])
def test_full_size(length: int, dim: int, is_causal: bool, selector: Selector) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    stretch = torch.arange(length, device="cuda") // 100

    def draw(heads: int) -> Tensor:
        x = torch.randn(1, heads, length, dim, generator=generator, device="cuda", dtype=BF16)
        means = torch.randn(1, heads, length // 100 + 1, dim, generator=generator, device="cuda", dtype=BF16)
        return x + means[:, :, stretch]

    q, k = draw(8), draw(2)
    call = Call(q, k, k, is_causal, dim**-0.5)
    got = select(selector, call).mask.to_dense()
    visible, kept = selector.visible(call), selector.kept(call)
    assert not (got & ~visible).any()
    assert ((got != kept).float().sum() / kept.sum()) < 1e-3
    assert 0.001 < kept.float().mean() < 0.99


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    for case, selector in (
        (Case(1000, 1000, heads=4, k_heads=1, is_causal=True, dtype=BF16, density=None), MeanSimilarity(0.6)),
        (Case(300, 300, batch=2, padding="holes", dtype=HALF, density=None), TopK(0.5) | Tokens(((3, 9),))),
        (Case(300, 300, dtype=F32, density=None), MeanSimilarity(torch.full((2,), 0.5).cuda(), 0.4)),
        (Case(1000, 1000, is_causal=True, dtype=BF16, density=None), XAttention(torch.full((2,), 0.5).cuda())),
        (Case(1000, 1000, batch=2, padding="left", is_causal=True, dtype=BF16, density=None), FlashPrefill()),
        (Case(1000, 1000, batch=2, padding="left", is_causal=True, dtype=BF16, density=None), FlexPrefill(0.5)),
        (Case(1000, 1000, is_causal=True, dtype=BF16, density=None), FlexPrefill(torch.full((2,), 0.5).cuda())),
        (Case(1000, 1000, is_causal=True, dtype=BF16, density=None), MInference()),
    ):
        call = on_device(inputs_of(case))
        expected = select(selector, call, quantise=True)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            select(selector, call, quantise=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = select(selector, call, quantise=True)
        assert captured.keys is not None and expected.keys is not None
        made = (captured.mask.indices, captured.mask.counts, captured.keys[0])
        for tensor in made:
            tensor.zero_()
        graph.replay()
        for tensor, other in zip(made, (expected.mask.indices, expected.mask.counts, expected.keys[0]), strict=True):
            assert torch.equal(tensor, other)
