"""Selectors: against plain loops, and the faults that algorithms.md lists, each as a test."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spas_attn import BlockMask
from spas_attn.block_mask import cdiv
from spas_attn.selectors import Dense, MeanSimilarity, PeakMass, Selector, Streaming, Tokens, TopK, Union, pooled

SIZES = st.sampled_from([64, 128])


def draw(
    q_len: int, k_len: int, *, heads: int = 2, k_heads: int = 1, dim: int = 16, batch: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """q and k with some structure: a slowly wandering mean (so that blocks differ) and one loud, mixed stretch."""
    generator = torch.Generator().manual_seed(seed)

    def one(count: int, length: int) -> Tensor:
        x = torch.randn(batch, count, length, dim, generator=generator)
        drift = torch.randn(batch, count, length, dim, generator=generator).cumsum(2) / 6
        loud = torch.rand(batch, count, length, 1, generator=generator).cumsum(2) % 70 > 50
        return torch.where(loud, 2 * x, drift + 0.3 * x)

    return one(heads, q_len), one(k_heads, k_len)


def select(selector: Selector, q: Tensor, k: Tensor, is_causal: bool = False, **more: Any) -> Tensor:
    return selector.select(q, k, is_causal=is_causal, **more).to_dense()


def visible_by_pairs(
    q_len: int, k_len: int, selector: Selector, is_causal: bool, window: int | None = None, valid: Tensor | None = None
) -> Tensor:
    """Blocks with a (query, key) pair that causality and window allow, and with a valid key; bool ``[nq, nk]``."""
    i, j = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)
    seen = (j <= i) if is_causal else torch.ones(q_len, k_len, dtype=torch.bool)
    if window is not None:
        seen = seen & (j > i - window)
    visible = to_blocks(seen, selector)
    return visible if valid is None else visible & torch.stack([part.any() for part in valid.split(selector.block_k)])


def to_blocks(pairs: Tensor, selector: Selector) -> Tensor:
    """Blocks with at least one True pair."""
    strips = pairs.split(selector.block_q, 0)
    return torch.stack([torch.stack([part.any() for part in s.split(selector.block_k, 1)]) for s in strips])


def similarity_in_loops(rows: Tensor) -> float:
    """Mean cosine over all pairs of rows."""
    if not len(rows):
        return 0.0
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return float((unit @ unit.T).mean())


def pooled_selection_in_loops(
    selector: MeanSimilarity, q: Tensor, k: Tensor, is_causal: bool, scale: float, window: int | None, valid: Tensor
) -> Tensor:
    """The selection for one head in float64, from the text of algorithms.md; ``valid`` is key padding ``[Lk]``."""
    peak = isinstance(selector, PeakMass)
    q, k = q.double(), k.double()
    cdf, sim = float(selector.cdf_threshold), float(selector.sim_threshold)
    block_q, block_k, pool = selector.block_q, selector.block_k, selector.pool
    q_len, k_len = len(q), len(k)
    offset = k_len - q_len
    if not is_causal and valid.any():
        k = k - k[valid].mean(0)  # smoothing
    visible = visible_by_pairs(q_len, k_len, selector, is_causal, window, valid)
    kept = torch.zeros_like(visible)
    for i in range(len(visible)):
        end = min((i + 1) * block_q, q_len)
        not_similar, forced = set(), set()
        for j in range(visible.shape[1]):
            left, right = j * block_k, min((j + 1) * block_k, k_len)
            known = not is_causal or right <= end + offset
            if known and similarity_in_loops(k[left:right][valid[left:right]]) < sim:
                not_similar.add(j)
            if (
                is_causal
                and left < i * block_q + block_q + offset
                and left + block_k > i * block_q + offset - selector.local
            ):
                forced.add(j)
        if selector.sink and valid.any():
            forced.add(int(valid.nonzero()[0, 0]) // block_k)
        rows = []
        for top in range(i * block_q, end, pool):
            bottom = min(top + pool, end)
            scores = {}
            for left in range(0, k_len, pool):
                right = min(left + pool, k_len)
                seen = bool(valid[left:right].any()) and left // block_k not in not_similar
                if is_causal:
                    seen = seen and left <= bottom - 1 + offset and right <= end + offset
                    seen = seen and (window is None or right - 1 > top + offset - window)
                if seen:
                    keys, query = k[left:right][valid[left:right]], q[top:bottom].mean(0) * scale
                    scores[left] = float(query @ keys.mean(0))
                    if peak:
                        scores[left] += 0.5 * float(query.square() @ keys.var(0, correction=0))
            if scores:
                mass = torch.zeros(visible.shape[1], dtype=torch.float64)
                largest = max(scores.values())
                total = sum(math.exp(s - largest) for s in scores.values())
                for left, score in scores.items():
                    mass[left // block_k] += math.exp(score - largest) / total
                rows.append(mass)
        mass = sum(rows) / len(rows) if rows else torch.zeros(visible.shape[1])
        if similarity_in_loops(q[i * block_q : end]) < sim:
            kept[i] = visible[i]
            continue
        forced = {j for j in forced | not_similar if visible[i, j]}
        reached = float(sum(mass[j] for j in forced))
        kept[i, list(forced)] = True
        for j in sorted(range(len(mass)), key=lambda j: -float(mass[j])):
            if j in forced or not visible[i, j]:
                continue
            if not peak and reached >= cdf and kept[i].any():
                break
            if peak and kept[i].any() and max(float(row[j]) for row in rows) <= 1 - cdf + 1e-9:
                continue
            kept[i, j] = True  # the block that crosses the threshold is kept
            reached += 0.0 if peak else float(mass[j])
    return kept


@pytest.mark.parametrize("kind", [MeanSimilarity, PeakMass])
@pytest.mark.parametrize("seed", range(60))
def test_pooled_selectors_equal_plain_loops(kind: type[MeanSimilarity], seed: int) -> None:
    """Seeds rather than hypothesis, which likes small numbers: one block of one token shows nothing."""
    chance = random.Random(seed)
    is_causal, padding = chance.random() < 0.6, chance.choice([None, None, "left", "right", "holes"])
    k_len = chance.randint(100, 500)
    q_len = chance.randint(50, k_len if is_causal else 500)
    window = chance.choice([None, None, chance.randint(1, 400)]) if is_causal else None
    scale, cdf = chance.choice([0.05, 0.25, 1.0]), chance.choice([0.0, *(chance.uniform(0.1, 0.95) for _ in range(9))])
    block_q, block_k, pool = chance.choice(
        [(128, 128, 128), (64, 64, 64), (64, 64, 16), (64, 128, 64), (128, 64, 32), (64, 64, 8)]
    )
    selector = kind(
        cdf,
        chance.choice([-1.0, -1.0, 0.35, 0.5]),
        pool,
        block_q=block_q,
        block_k=block_k,
        sink=chance.random() < 0.3,
        local=chance.choice([0, 0, 100, 200]),
    )
    q, k = draw(q_len, k_len, seed=seed)
    valid = torch.ones(k_len, dtype=torch.bool)
    if padding == "left":
        valid[: k_len // 3] = False
    elif padding == "right":
        valid[k_len - k_len // 3 :] = False
    elif padding == "holes":
        valid = torch.rand(k_len, generator=torch.Generator().manual_seed(seed)) < 0.3
    attn_mask = None if padding is None else valid[None]
    kept = select(selector, q, k, is_causal, scale=scale, attn_mask=attn_mask, window=window)
    for head in range(2):
        expected = pooled_selection_in_loops(selector, q[0, head], k[0, 0], is_causal, scale, window, valid)
        assert torch.equal(kept[0, head], expected), (selector, q_len, k_len, is_causal, window, padding, scale)


def test_the_loops_try_something() -> None:
    """Guards the comparison above: its inputs give selections that are neither full nor empty, and depend on all."""
    q, k = draw(500, 500, seed=1)
    valid = torch.ones(500, dtype=torch.bool)
    results = [
        pooled_selection_in_loops(
            MeanSimilarity(cdf, sim, pool=pool, sink=False, local=0), q[0, 0], k[0, 0], False, s, None, valid
        )
        for cdf, sim, pool, s in ((0.7, -1, 16, 0.25), (0.7, 0.35, 16, 0.25), (0.7, -1, 128, 0.25), (0.7, -1, 16, 2.0))
    ]
    assert all(0.2 < float(kept.float().mean()) < 1 for kept in results), [float(k.float().mean()) for k in results]
    assert len({tuple(kept.flatten().tolist()) for kept in results}) == 4


SELECTORS = [
    Dense(),
    MeanSimilarity(0.5),
    MeanSimilarity(0.0, sink=False),
    MeanSimilarity(0.9, 0.4, pool=128, sink=False),
    MeanSimilarity(0.3, 1.1, pool=64, block_q=64),
    PeakMass(0.8),
    PeakMass(0.0, pool=16, sink=False, local=0),
    MeanSimilarity(0.0, -1, pool=8, block_q=64, block_k=64, sink=False, local=0),
    TopK(0.01, sink=False, local=0),
    TopK(0.5, pool=32, block_k=64),
    Streaming(0, 0, sink=False),
    Streaming(64, 100, block_q=64, block_k=64),
    Tokens((), sink=False),
    Tokens(((3, 5), (-10, -2))),
    Streaming(128, 64) | TopK(0.3),
    Tokens((), sink=False) | Streaming(0, 0, sink=False),
]


@settings(max_examples=25)
@given(
    st.integers(1, 500), st.integers(1, 500), st.sampled_from([None, "left", "right", "holes", "all"]), st.booleans()
)
@pytest.mark.parametrize("selector", SELECTORS, ids=str)
def test_what_every_selector_holds(
    selector: Selector, q_len: int, k_len: int, padding: str | None, is_causal: bool
) -> None:
    """At least one block for every query block that sees any; never an invisible one; the diagonal; the sink."""
    q_len = min(q_len, k_len) if is_causal else q_len
    q, k = draw(q_len, k_len, batch=2, seed=q_len + k_len)
    valid = torch.ones(2, k_len, dtype=torch.bool)
    if padding == "left":
        valid[0, : k_len // 2] = False
    elif padding == "right":
        valid[0, k_len - k_len // 2 :] = False
    elif padding == "holes":
        valid = torch.rand(2, k_len, generator=torch.Generator().manual_seed(k_len)) < 0.01
    elif padding == "all":
        valid[0] = False
    kept = select(selector, q, k, is_causal, attn_mask=valid if padding else None)
    for b in range(2):
        visible = visible_by_pairs(q_len, k_len, selector, is_causal, valid=valid[b])
        assert not (kept[b] & ~visible).any(), "an invisible block was kept"
        assert (kept[b].any(-1) | ~visible.any(-1)).all(), "a query block keeps nothing"
        if selector.sink and not isinstance(selector, Union) and valid[b].any():
            first = int(valid[b].nonzero()[0, 0]) // selector.block_k
            assert (kept[b, :, :, first] | ~visible[:, first]).all(), "the sink is missing"
        if is_causal:
            i, j = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)
            assert (kept[b] | ~(to_blocks(i == j, selector) & visible)).all(), "a diagonal block is missing"


@pytest.mark.parametrize("kind", ["mean", "peak", "topk", "union", "streaming"])
@pytest.mark.parametrize("seed", range(30))
def test_later_tokens_do_not_change_earlier_selections(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    block_q, block_k = chance.choice([64, 128]), chance.choice([64, 128])
    sizes: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    pool = chance.choice([8, 16, 64, min(block_q, block_k)])
    sim = chance.choice([-1.0, 0.35, 0.5])
    selector: Selector = {
        "mean": MeanSimilarity(chance.uniform(0.2, 0.8), sim, pool=pool, local=0, **sizes),
        "peak": PeakMass(chance.uniform(0.4, 0.9), sim, pool=pool, local=0, **sizes),
        "topk": TopK(chance.uniform(0.1, 0.6), pool=pool, local=0, **sizes),
        "union": Streaming(64, 64, **sizes) | MeanSimilarity(0.6, sim, pool=pool, **sizes),
        "streaming": Streaming(64, 100, **sizes),
    }[kind]
    q_len, more = chance.randint(200, 700), chance.choice([0, 64, chance.randint(0, 200)])
    k_len, window = q_len + more, chance.choice([None, None, chance.randint(1, 300)])
    q, k = draw(q_len, k_len, seed=seed)
    # Keys and queries change from the end of some query block on: the tightest place.
    ends = torch.arange(block_q, q_len + block_q, block_q).clamp(max=q_len) + more
    changed = int(ends[chance.randrange(len(ends) - 1) if len(ends) > 1 else 0])
    later_q, later_k = q.clone(), k.clone()
    generator = torch.Generator().manual_seed(seed)
    value = chance.choice([3.0, 100.0, 60000.0])
    later_k[:, :, changed:] = value * torch.randn(1, 1, k_len - changed, 16, generator=generator)
    later_q[:, :, changed - more :] *= -value
    before, after = (select(selector, a, b, True, window=window) for a, b in ((q, k), (later_q, later_k)))
    unaffected = ends <= changed
    assert unaffected.any()
    assert torch.equal(before[:, :, unaffected], after[:, :, unaffected])
    if isinstance(selector, MeanSimilarity):  # at no threshold
        before, after = (
            selector.levels(selector.pooled(inputs(a, b, True)), torch.full((2,), sim))
            for a, b in ((q, k), (later_q, later_k))
        )
        assert torch.equal(before[:, :, unaffected], after[:, :, unaffected])


@pytest.mark.parametrize("kind", [MeanSimilarity, PeakMass])
def test_a_block_that_ends_later_is_not_judged_by_its_similarity(kind: type[MeanSimilarity]) -> None:
    """Key block 1 (tokens 128 to 255) ends after query block 2 (128 to 191), which must not feel its second half."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(1, 1, 256, 16) + 0.1 * torch.randn(1, 1, 256, 16, generator=generator)
    later = x.clone()
    later[:, :, 192:] = torch.randn(1, 1, 64, 16, generator=generator)
    selector = kind(0.9, 0.9, pool=16, block_q=64, block_k=128, sink=False, local=0)
    before, after = (selector.pooled(inputs(x, k, is_causal=True)) for k in (x, later))
    assert (before.k_similarity[..., 1] > 0.9).all()
    assert (after.k_similarity[..., 1] < 0.9).all()
    before, after = (selector.levels(pooled, torch.tensor([0.9]))[:, :, :3] for pooled in (before, after))
    assert torch.equal(before, after)
    assert before[0, 0, 2, 0] > 0, "the other block is ranked by its share of the mass"


def test_later_tokens_do_change_later_selections() -> None:
    """Guards the test above."""
    q, k = draw(500, 500, seed=3)
    later = k.clone()
    later[:, :, 256:] *= -5
    before, after = (select(MeanSimilarity(0.6), q, x, True) for x in (k, later))
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2:], after[:, :, 2:])


@given(
    st.integers(1, 500), st.integers(1, 500), st.booleans(), st.sampled_from([16, 128]), st.sampled_from([-1.0, 0.4])
)
def test_more_mass_keeps_a_superset_and_one_keeps_all(
    q_len: int, k_len: int, is_causal: bool, pool: int, sim: float
) -> None:
    q_len = min(q_len, k_len) if is_causal else q_len
    q, k = draw(q_len, k_len, seed=k_len)
    less = torch.zeros(1, dtype=torch.bool)
    for cdf in (0.0, 0.2, 0.5, 0.8, 0.95, 0.999, 1.0):
        kept = select(MeanSimilarity(cdf, sim, pool=pool), q, k, is_causal)
        assert not (less & ~kept).any()
        less = kept
    assert torch.equal(less, select(Dense(), q, k, is_causal))


def test_cdf_one_keeps_blocks_of_no_probability() -> None:
    """1 is 1, whatever rounding the sums had."""
    q, k = draw(1000, 1000, seed=1)
    assert select(MeanSimilarity(1.0), q * 100, k * 100).all()
    assert not select(MeanSimilarity(0.999), q * 100, k * 100).all()


def test_the_block_that_crosses_the_threshold_is_kept() -> None:
    """Four key blocks with probabilities 0.4, 0.3, 0.2, 0.1 (in another order); SpargeAttn leaves the last one out."""
    probs = torch.tensor([0.2, 0.4, 0.1, 0.3])
    k = torch.zeros(1, 1, 512, 16)
    k[0, 0, :, 0] = probs.log().repeat_interleave(128)
    q = torch.zeros(1, 1, 128, 16)
    q[..., 0] = 1.0
    for cdf, expected in ((0.35, {1}), (0.45, {1, 3}), (0.75, {1, 3, 0}), (0.95, {0, 1, 2, 3}), (0.0, {1})):
        for pool in (16, 128):
            kept = select(MeanSimilarity(cdf, pool=pool, sink=False), q, k, scale=1.0)
            assert set(kept[0, 0, 0].nonzero()[:, 0].tolist()) == expected, (cdf, pool)
    # Forced blocks count toward the sum: with the sink (0.2), 0.4 more reach 0.55, and 0.3 more 0.65.
    for cdf, expected in ((0.15, {0}), (0.55, {0, 1}), (0.65, {0, 1, 3})):
        kept = select(MeanSimilarity(cdf), q, k, scale=1.0)
        assert set(kept[0, 0, 0].nonzero()[:, 0].tolist()) == expected, cdf


def test_scale_is_used_in_selection() -> None:
    q, k = draw(600, 600, seed=2)
    selector = MeanSimilarity(0.8)
    assert torch.equal(select(selector, q, k), select(selector, q, k, scale=16**-0.5))
    assert torch.equal(select(selector, q, k, scale=1.0), select(selector, q * 4, k, scale=0.25))
    assert select(selector, q, k, scale=2.0).sum() < select(selector, q, k, scale=0.01).sum()


@pytest.mark.parametrize("is_causal", [False, True])
def test_smoothing_does_not_matter(is_causal: bool) -> None:
    """A constant added to every key changes neither the softmax nor (without causality) the similarities."""
    q, k = draw(700, 700, heads=4, k_heads=2, seed=4)
    moved = k + 5 * torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    for sim in (-1.0, 0.4) if not is_causal else (-1.0,):
        for pool in (16, 128):
            selector = MeanSimilarity(0.8, sim, pool=pool)
            kept = select(selector, q, k, is_causal)
            assert torch.equal(kept, select(selector, q, moved, is_causal))
            assert kept.float().mean() < 0.95


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [100, 256, 300])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_rows(is_causal: bool, length: int, value: float) -> None:
    q = torch.full((1, 2, length, 16), value)
    for sim in (-1.0, 0.5):
        kept = select(MeanSimilarity(0.5, sim), q, q, is_causal)
        assert kept.any(-1).all()
    scores = MeanSimilarity().pooled(inputs(q, q, is_causal))
    assert not scores.rows.isnan().any()
    assert scores.q_similarity.isfinite().all()
    assert scores.k_similarity.isfinite().all()


def inputs(q: Tensor, k: Tensor, is_causal: bool = False, key_mask: Tensor | None = None) -> Any:
    from spas_attn.selectors import Inputs

    return Inputs(q, k, is_causal, q.shape[-1] ** -0.5, key_mask, None)


def test_similarity_of_a_ragged_last_block() -> None:
    """The original divides 0 by 0 there, so that the last block is always dense."""
    q, k = draw(300, 300, seed=6)
    scores = MeanSimilarity(block_q=128, block_k=64).pooled(inputs(q, k, is_causal=True))
    assert scores.q_similarity[0, 1, 2].item() == pytest.approx(similarity_in_loops(q[0, 1, 256:]), abs=1e-5)
    assert scores.k_similarity[0, 1, 4].item() == pytest.approx(similarity_in_loops(k[0, 0, 256:]), abs=1e-5)
    # Equal rows in the ragged blocks: similarity 1, so that no threshold forces them.
    q[:, :, 256:] = q[:, :, 256:257]
    k[:, :, 256:] = k[:, :, 256:257]
    scores = MeanSimilarity().pooled(inputs(q, k, is_causal=True))
    assert torch.allclose(scores.q_similarity[..., 2], torch.ones(()), atol=1e-5)
    assert torch.allclose(scores.k_similarity[..., 2], torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("kind", [MeanSimilarity, PeakMass])
def test_left_out_blocks_do_not_drown_the_others(kind: type[MeanSimilarity]) -> None:
    """The block that holds the largest score by far is left out by the filter; the rest shares all of the mass."""
    generator = torch.Generator().manual_seed(0)
    k = torch.zeros(1, 1, 512, 16)
    k[0, 0, :, 0] = torch.tensor([0.0, 500.0, 1.0, -1.0]).repeat_interleave(128)
    k[0, 0, 128:256, 1:] = 1000 * torch.randn(128, 15, generator=generator)
    q = torch.zeros(1, 1, 128, 16)
    q[..., 0] = 1.0
    selector = kind(0.5, 0.5, pool=16, block_q=128, block_k=128, sink=False, local=0)
    levels = selector.levels(selector.pooled(inputs(q, k)), torch.tensor([0.5]))[0, 0, 0]
    probs = torch.tensor([0.0, 1.0, -1.0]).mul(0.25).softmax(0)
    if kind is PeakMass:
        expected = 1 - probs
    else:
        expected = torch.tensor([float(probs[1]), 0.0, float(probs[0] + probs[1])])
    assert levels[1] == -1
    assert torch.allclose(levels[[0, 2, 3]], expected, atol=1e-3), levels


def test_a_threshold_below_zero_is_no_filter() -> None:
    """Self-similarity is never negative, so the 16 negative steps of the original's search are one."""
    x = torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 1::2] = -x[:, :, ::2]  # as dissimilar as can be
    scores = MeanSimilarity().pooled(inputs(x, x, is_causal=True))
    assert (scores.k_similarity >= 0).all()
    assert scores.k_similarity.max() < 0.01
    assert torch.equal(select(MeanSimilarity(0.5, -1.0), x, x, True), select(MeanSimilarity(0.5, 0.0), x, x, True))
    assert torch.equal(select(MeanSimilarity(0.5, 0.1), x, x, True), select(Dense(), x, x, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_selects_in_float32(dtype: torch.dtype, is_causal: bool) -> None:
    q, k = (x.to(dtype) for x in draw(4000, 4000, seed=8))
    for selector in (MeanSimilarity(0.9), MeanSimilarity(0.9, 0.4, pool=128), TopK(0.3)):
        kept = select(selector, q, k, is_causal)
        assert torch.equal(kept, select(selector, q.float(), k.float(), is_causal))
        assert 0.05 < kept.float().mean() < 0.9
    half, full = (PeakMass().pooled(inputs(a, b, is_causal)) for a, b in ((q, k), (q.float(), k.float())))
    for field in ("rows", "q_similarity", "k_similarity"):
        assert torch.equal(getattr(half, field), getattr(full, field)), field


@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_queries_and_thresholds_per_head(is_causal: bool) -> None:
    """A head's selection depends on its own queries, keys and thresholds alone."""
    q, k = draw(500, 600, heads=4, k_heads=2, batch=2, seed=9)
    cdf, sim = torch.tensor([0.3, 0.9, 0.6, 0.75]), torch.tensor([-1.0, 0.3, 0.35, -1.0])
    kept = select(MeanSimilarity(cdf, sim, local=0), q, k, is_causal)
    shares = torch.tensor([0.1, 0.9, 0.5, 0.3])
    best = select(TopK(shares), q, k, is_causal)
    for b in range(2):
        for h in range(4):
            one = q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1]
            alone = select(MeanSimilarity(float(cdf[h]), float(sim[h]), local=0), *one, is_causal)
            assert torch.equal(kept[b, h], alone[0, 0])
            assert torch.equal(best[b, h], select(TopK(float(shares[h])), *one, is_causal)[0, 0])
    assert len({tuple(head.flatten().tolist()) for head in kept[0]}) == 4


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "selector", [MeanSimilarity(0.6), MeanSimilarity(0.6, 0.4, pool=128), TopK(0.4), Streaming(10, 150)]
)
def test_left_padding_moves_everything(selector: Selector, is_causal: bool) -> None:
    """With whole blocks of padding on the left, the rest is selected as without them; the sink moves along."""
    q, k = draw(400, 400, seed=10)
    pad = 256
    padded_q, padded_k = (torch.nn.functional.pad(x, (0, 0, pad, 0), value=50.0) for x in (q, k))
    valid = (torch.arange(pad + 400) >= pad)[None]
    plain = select(selector, q, k, is_causal)
    padded = select(selector, padded_q, padded_k, is_causal, attn_mask=valid)
    assert torch.equal(padded[:, :, 2:, 2:], plain)
    assert not padded[..., :2].any()
    assert padded[:, :, 2:, 2].all()
    four_d = select(selector, padded_q, padded_k, is_causal, attn_mask=valid[:, None, None])
    assert torch.equal(padded, four_d)


@given(st.integers(1, 600), st.integers(1, 600), st.tuples(SIZES, SIZES), st.booleans(), st.floats(0.01, 1.0))
@pytest.mark.parametrize("local", [0, 150])
def test_topk_counts(local: int, q_len: int, k_len: int, blocks: tuple[int, int], is_causal: bool, keep: float) -> None:
    q_len = min(q_len, k_len) if is_causal else q_len
    q, k = draw(q_len, k_len, seed=k_len)
    selector = TopK(keep, block_q=blocks[0], block_k=blocks[1], local=local)
    counts = select(selector, q, k, is_causal).sum(-1)
    visible = visible_by_pairs(q_len, k_len, selector, is_causal)
    keep = float(torch.tensor(keep))
    for i, row in enumerate(visible):
        forced = {0}
        if is_causal:
            top = i * blocks[0] + k_len - q_len
            last = min((i + 1) * blocks[0], q_len) - 1 + k_len - q_len
            forced |= set(range(max(0, top - local) // blocks[1], last // blocks[1] + 1))
        expected = max(math.ceil(keep * int(row.sum()) - 1e-6), len(forced))
        assert (counts[:, :, i] == expected).all()


def test_topk_keeps_the_best() -> None:
    probs = torch.tensor([0.15, 0.4, 0.05, 0.1, 0.3])
    k = torch.zeros(1, 1, 640, 16)
    k[0, 0, :, 0] = probs.log().repeat_interleave(128)
    q = torch.zeros(1, 1, 128, 16)
    q[..., 0] = 1.0
    kept = select(TopK(0.6, sink=False), q, k, scale=1.0)
    assert kept[0, 0, 0].tolist() == [True, True, False, False, True]


@given(
    st.integers(1, 600), st.integers(1, 600), st.tuples(SIZES, SIZES), st.booleans(), st.integers(0, 300),
    st.integers(0, 400), st.integers(0, 150), st.booleans(),
)  # fmt: skip
def test_streaming_in_loops(
    q_len: int, k_len: int, blocks: tuple[int, int], is_causal: bool, sink: int, local: int, padding: int, forced: bool
) -> None:
    q_len = min(q_len, k_len) if is_causal else q_len
    padding = min(padding, k_len - 1)
    q, k = draw(q_len, k_len)
    valid = torch.arange(k_len) >= padding
    selector = Streaming(
        torch.tensor([float(sink), 0.0]), torch.tensor([float(local), float(local // 2)]),
        block_q=blocks[0], block_k=blocks[1], sink=forced,
    )  # fmt: skip
    kept = select(selector, q, k, is_causal, attn_mask=valid[None] if padding else None)[0]
    visible = visible_by_pairs(q_len, k_len, selector, is_causal, valid=valid)
    i, j = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)
    for h, (first, near) in enumerate(((sink, local), (0, local // 2))):
        pairs = (j >= padding) & (j < padding + first) | ((i - j).abs() < near)
        wanted = to_blocks(pairs, selector) & visible
        # Always: the diagonal, the forced sink, and one block of every row.
        extra = kept[h] & ~wanted
        assert not (wanted & ~kept[h]).any()
        diagonal = torch.zeros_like(visible)
        if is_causal:
            diagonal = to_blocks(i == j, selector)
        if forced:
            diagonal[:, padding // blocks[1]] = True
        lonely = ~(wanted | diagonal & visible).any(-1)
        assert not (extra & ~diagonal)[~lonely].any()
        assert (kept[h][lonely].sum(-1) <= 1).all()


@given(
    st.integers(1, 600),
    st.integers(1, 600),
    st.tuples(SIZES, SIZES),
    st.lists(st.tuples(st.integers(-700, 700), st.integers(-700, 700)), max_size=3),
)
def test_tokens_in_loops(q_len: int, k_len: int, blocks: tuple[int, int], ranges: list[tuple[int, int]]) -> None:
    q, k = draw(q_len, k_len)
    touched_q, touched_k = set(), set()
    for start, stop in ranges:
        touched_q |= {t // blocks[0] for t in range(q_len)[start:stop]}
        touched_k |= {t // blocks[1] for t in range(k_len)[start:stop]}
    sizes: dict[str, Any] = {"block_q": blocks[0], "block_k": blocks[1]}
    for queries in (False, True):
        for keys in (False, True):
            kept = select(Tokens(tuple(ranges), queries=queries, keys=keys, **sizes), q, k)[0, 0]
            for i in range(kept.shape[0]):
                for j in range(kept.shape[1]):
                    expected = j == 0 or (keys and j in touched_k) or (queries and i in touched_q)
                    assert bool(kept[i, j]) == expected


@pytest.mark.parametrize("is_causal", [False, True])
def test_union_keeps_what_either_keeps(is_causal: bool) -> None:
    q, k = draw(700, 900, seed=11)
    parts = [TopK(0.3, sink=False), Streaming(0, 100, sink=False), Tokens(((300, 310),), queries=False, sink=False)]
    together = select(parts[0] | parts[1] | parts[2], q, k, is_causal)
    apart = [select(part, q, k, is_causal) for part in parts]
    assert torch.equal(together, apart[0] | apart[1] | apart[2])
    assert all((together & ~part).any() for part in apart)
    assert (parts[0] | parts[1]).expected_density is None
    assert (TopK(0.3) | TopK(0.4)).expected_density == 0.4


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "selector", [MeanSimilarity(0.6, 0.3), TopK(0.4, block_q=64), Streaming(64, 64), Dense()], ids=str
)
def test_packed_sequences_are_selected_one_by_one(selector: Selector, is_causal: bool) -> None:
    lengths = [(300, 300), (1, 129), (200, 257)]
    q, k = draw(501, 686, heads=4, k_heads=2, seed=12)
    cu_q, cu_k = torch.tensor([0, 300, 301, 501]).int(), torch.tensor([0, 300, 429, 686]).int()
    packed = selector.select(q, k, is_causal=is_causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    at_q = at_k = 0
    for (q_len, k_len), part in zip(lengths, packed.split(), strict=True):
        alone = select(selector, q[:, :, at_q : at_q + q_len], k[:, :, at_k : at_k + k_len], is_causal)
        assert torch.equal(part.to_dense(), alone)
        at_q, at_k = at_q + q_len, at_k + k_len


def test_long_sequences_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(700, 700, heads=4, k_heads=2, seed=13)
    for is_causal in (False, True):
        whole = MeanSimilarity(0.7).pooled(inputs(q, k, is_causal))
        with monkeypatch.context() as patch:
            patch.setattr(pooled, "_FINE_SCORES", 1)
            parts = MeanSimilarity(0.7).pooled(inputs(q, k, is_causal))
        assert torch.allclose(whole.rows, parts.rows, atol=1e-5)


def test_selection_is_deterministic_and_leaves_inputs_alone() -> None:
    q, k = draw(700, 700, seed=14)
    before = q.clone(), k.clone()
    for selector in SELECTORS:
        masks = [selector.select(q, k, is_causal=True) for _ in range(2)]
        assert torch.equal(masks[0].indices, masks[1].indices)
        assert isinstance(masks[0], BlockMask)
        assert masks[0].indices.shape[2:] == (cdiv(700, selector.block_q), cdiv(700, selector.block_k))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: Dense(block_q=32), "block_q must be one of .*64, 128.*got 32"),
        (lambda q: MeanSimilarity(block_k=100), "block_k must be one of .*got 100"),
        (lambda q: MeanSimilarity(pool=48), r"pool must be a divisor of both block sizes \(128, 128\), got 48"),
        (lambda q: MeanSimilarity(pool=128, block_q=64), r"pool must be .*\(64, 128\), got 128"),
        (lambda q: TopK(pool=0), "pool must be .*got 0"),
        (lambda q: TopK(0.0), r"keep must be in \(0, 1\], got 0"),
        (lambda q: TopK(1.5), r"keep must be in \(0, 1\], got 1.5"),
        (lambda q: TopK(0.5, block_q=64) | Streaming(), "one block_q, got 64 and 128"),
        (lambda q: select(MeanSimilarity(torch.ones(3)), q, q), r"cdf_threshold must be .*\[2\], got shape \(3,\)"),
        (lambda q: select(MeanSimilarity(0.5, torch.ones(1, 2)), q, q), r"sim_threshold must be .*\(1, 2\)"),
        (lambda q: select(Streaming(torch.ones(3)), q, q), "sink_tokens must be"),
        (
            lambda q: select(Dense(), q, q, attn_mask=torch.ones(1, 1, 100, 100).bool()),
            r"attn_mask must be a key-padding mask .*got \(1, 1, 100, 100\)",
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    q = torch.randn(1, 2, 100, 16)
    with pytest.raises(ValueError, match=message):
        make(q)
