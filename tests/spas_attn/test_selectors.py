"""The rule of each selector, against plain loops; what all selectors hold is in test_every_selector.py."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spas_attn import Call
from spas_attn.selectors import Dense, MeanSimilarity, PeakMass, Selector, Streaming, Tokens, TopK, pooled
from spas_attn.selectors.mean_similarity import _self_similarity
from spas_attn.selectors.pooled import pooled_rows

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
    """The selection for one head in float64, written out; ``valid`` is key padding ``[Lk]``."""
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
        # A row that would stay empty keeps the block of its lowest level: of most mass, of the highest peak.
        best = [max(float(row[j]) for row in rows) if peak and rows else float(mass[j]) for j in range(len(mass))]
        for j in sorted(range(len(mass)), key=lambda j: -best[j]):
            if j in forced or not visible[i, j]:
                continue
            if not peak and reached >= cdf and kept[i].any():
                break
            if peak and kept[i].any() and best[j] <= 1 - cdf + 1e-9:
                continue
            kept[i, j] = True  # the block that crosses the threshold is kept
            reached += 0.0 if peak else float(mass[j])
    return kept


@pytest.mark.parametrize("kind", [MeanSimilarity, PeakMass])
@pytest.mark.parametrize("seed", range(30))
def test_pooled_selectors_equal_plain_loops(kind: type[MeanSimilarity], seed: int) -> None:
    """Seeds rather than hypothesis, which likes small numbers: one block of one token shows nothing."""
    chance = random.Random(seed)
    is_causal, padding = chance.random() < 0.6, chance.choice([None, None, "left", "right", "holes"])
    k_len = chance.randint(100, 350)
    q_len = chance.randint(50, k_len if is_causal else 350)
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


@pytest.mark.parametrize("kind", [MeanSimilarity, PeakMass])
def test_a_block_that_ends_later_is_not_judged_by_its_similarity(kind: type[MeanSimilarity]) -> None:
    """Key block 1 (tokens 128 to 255) ends after query block 2 (128 to 191), which must not feel its second half."""
    generator = torch.Generator().manual_seed(0)
    x = torch.ones(1, 1, 256, 16) + 0.1 * torch.randn(1, 1, 256, 16, generator=generator)
    later = x.clone()
    later[:, :, 192:] = torch.randn(1, 1, 64, 16, generator=generator)
    selector = kind(0.9, 0.9, pool=16, block_q=64, block_k=128, sink=False, local=0)
    similarities = [_self_similarity(k, 128, None)[..., 1] for k in (x, later)]
    assert similarities[0] > 0.9 > similarities[1]
    before, after = (selector.levels(call_of(x, k, is_causal=True))[:, :, :3] for k in (x, later))
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
    assert not pooled_rows(MeanSimilarity(), call_of(q, q, is_causal), 16).isnan().any()
    assert _self_similarity(q, 128, None).isfinite().all()


def call_of(q: Tensor, k: Tensor, is_causal: bool = False) -> Call:
    return Call.make(q, k, k, is_causal=is_causal)


def test_similarity_of_a_ragged_last_block() -> None:
    """The original divides 0 by 0 there, so that the last block is always dense."""
    q, _ = draw(300, 300, seed=6)
    assert _self_similarity(q, 128, None)[0, 1, 2].item() == pytest.approx(similarity_in_loops(q[0, 1, 256:]), abs=1e-5)
    assert _self_similarity(q, 64, None)[0, 1, 4].item() == pytest.approx(similarity_in_loops(q[0, 1, 256:]), abs=1e-5)
    # Equal rows in the ragged block: similarity 1, so that no threshold forces it.
    q[:, :, 256:] = q[:, :, 256:257]
    assert torch.allclose(_self_similarity(q, 128, None)[..., 2], torch.ones(()), atol=1e-5)


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
    levels = selector.levels(call_of(q, k))[0, 0, 0]
    probs = torch.tensor([0.0, 1.0, -1.0]).mul(0.25).softmax(0)
    if kind is PeakMass:
        expected = 1 - probs
    else:
        expected = torch.tensor([float(probs[1]), 0.0, float(probs[0] + probs[1])])
    assert levels[1] == -torch.inf
    assert torch.allclose(levels[[0, 2, 3]], expected, atol=1e-3), levels


def test_a_threshold_below_zero_is_no_filter() -> None:
    """Self-similarity is never negative, so the 16 negative steps of the original's search are one."""
    x = torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(0))
    x[:, :, 1::2] = -x[:, :, ::2]  # as dissimilar as can be
    similarity = _self_similarity(x, 128, None)
    assert (similarity >= 0).all()
    assert similarity.max() < 0.01
    assert torch.equal(select(MeanSimilarity(0.5, -1.0), x, x, True), select(MeanSimilarity(0.5, 0.0), x, x, True))
    assert torch.equal(select(MeanSimilarity(0.5, 0.1), x, x, True), select(Dense(), x, x, True))


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


@settings(max_examples=25)
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


@settings(max_examples=25)
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


def test_long_sequences_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(300, 300, heads=2, k_heads=1, seed=13)
    for is_causal in (False, True):
        whole = pooled_rows(MeanSimilarity(), call_of(q, k, is_causal), 16)
        with monkeypatch.context() as patch:
            patch.setattr(pooled, "_FINE_SCORES", 1)
            parts = pooled_rows(MeanSimilarity(), call_of(q, k, is_causal), 16)
        assert torch.allclose(whole, parts, atol=1e-5)
