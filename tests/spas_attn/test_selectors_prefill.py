"""The rules of XAttention, FlexPrefill, MInference and FlashPrefill, against plain loops in float64."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
import torch._subclasses
from random_calls import HEADS, by_pairs, drawn, random_call
from torch import Tensor

from spas_attn import Call
from spas_attn.selectors import FlashPrefill, FlexPrefill, MInference, Selector, XAttention, pooled
from spas_attn.selectors.last_queries import first_distance, last_queries, last_query
from spas_attn.selectors.pooled import block_means

INF = float("inf")
SEEDS = range(14)


class Head:
    """One head of one sequence of a call, in float64, with what its queries see as a matrix."""

    def __init__(self, call: Call, batch: int, head: int) -> None:
        self.q, self.k = call.q[batch, head].double(), call.k[batch, head // call.group].double()
        self.scale, self.offset, self.causal, self.window = call.scale, call.offset, call.is_causal, call.window
        self.q_len, self.k_len = call.q_len, call.k_len
        self.valid = torch.ones(self.k_len, dtype=torch.bool) if call.key_mask is None else call.key_mask[batch]
        i, j = torch.arange(self.q_len)[:, None] + self.offset, torch.arange(self.k_len)
        self.seen = self.valid & ((j <= i) if self.causal else torch.ones_like(j <= i))
        if self.window is not None:
            self.seen = self.seen & (j > i - self.window)
        queries = call.query_mask()
        self.queries = torch.ones(self.q_len, dtype=torch.bool) if queries is None else queries[batch]

    def blocks(self, selector: Selector) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(start, stop) of the query and of the key blocks."""
        return ranges(self.q_len, selector.block_q), ranges(self.k_len, selector.block_k)

    def mean_key(self, start: int, stop: int) -> Tensor:
        """Mean of the valid keys."""
        return self.k[start:stop][self.valid[start:stop]].mean(0)

    def last(self, count: int) -> list[int]:
        """The last ``count`` queries that count, up to the last one that is no padding."""
        if not self.queries.any():
            return []
        end = int(self.queries.nonzero()[-1]) + 1
        return [i for i in range(max(0, end - count), end) if self.queries[i]]

    def attention(self, i: int) -> Tensor:
        """Probabilities of one query, ``[Lk]``."""
        scores = (self.k @ self.q[i] * self.scale).masked_fill(~self.seen[i], -INF)
        return scores.softmax(0) if self.seen[i].any() else torch.zeros_like(scores)


def ranges(length: int, block: int) -> list[tuple[int, int]]:
    return [(a, min(a + block, length)) for a in range(0, length, block)]


def pooled_attention(head: Head, selector: Selector, length: int, score: Any) -> Tensor:
    """Mean rows of sub-blocks of ``length`` tokens, ``[nq, nk]``; ``score(i, j)`` of two sub-blocks (start, stop)."""
    rows, columns = head.blocks(selector)
    result = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for b, (first, end) in enumerate(rows):
        masses = []
        for top in range(first, end, length):
            bottom = min(top + length, end)
            scores = {}
            for left, right in ranges(head.k_len, length):
                seen = bool(head.valid[left:right].any())
                if head.causal:
                    seen = seen and left <= bottom - 1 + head.offset and right <= end + head.offset
                    seen = seen and (head.window is None or right - 1 > top + head.offset - head.window)
                if seen:
                    scores[left] = score((top, bottom), (left, right))
            if scores:
                largest = max(scores.values())
                total = sum(math.exp(x - largest) for x in scores.values())
                mass = torch.zeros(len(columns), dtype=torch.float64)
                for left, x in scores.items():
                    mass[left // selector.block_k] += math.exp(x - largest) / total
                masses.append(mass)
        if masses:
            result[b] = sum(masses) / len(masses)
    return result


def ranked_before(mass: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """Mass before each item of a list, forced ones first."""
    order = sorted(range(len(mass)), key=lambda j: (not visible[j], not forced[j], -float(mass[j])))
    before, total = torch.zeros_like(mass), 0.0
    for j in order:
        before[j] = total
        total += float(mass[j])
    return before


def xattention_in_loops(head: Head, selector: XAttention, forced: Tensor, visible: Tensor) -> Tensor:
    stride = selector.stride

    def score(rows: tuple[int, int], columns: tuple[int, int]) -> float:
        total = 0.0
        for r in range(stride):
            i, j = rows[0] + stride - 1 - r, columns[0] + r
            if i < rows[1] and j < columns[1] and head.valid[j]:
                total += float(head.q[i] @ head.k[j])
        return total * head.scale / stride

    mass = pooled_attention(head, selector, stride, score)
    return torch.stack([ranked_before(*row) for row in zip(mass, forced, visible, strict=True)])


def flash_prefill_in_loops(head: Head, selector: FlashPrefill, forced: Tensor, visible: Tensor) -> Tensor:
    rows, columns = head.blocks(selector)
    first = int(head.valid.int().argmax()) // selector.block_k
    last = (int(head.queries.nonzero()[-1]) if head.queries.any() else head.q_len - 1) // selector.block_q
    levels = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for i, (top, bottom) in enumerate(rows):
        scores = [0.0] * len(columns)
        for j, (left, right) in enumerate(columns):
            if head.valid[left:right].any():
                mean = head.mean_key(left, right)
                for row in range(top, bottom):
                    whole = not head.causal or right - 1 <= row + head.offset
                    if whole and (head.window is None or right - 1 > row + head.offset - head.window):
                        scores[j] += math.exp(float(head.q[row] @ mean) * head.scale)
        for j, score in enumerate(scores):
            always = (selector.sink and first <= j < first + selector.sink_blocks) or i > last - selector.last_blocks
            levels[i, j] = -INF if always else 1 - score / max(max(scores), 1e-300)
    return levels


def flex_prefill_in_loops(head: Head, selector: FlexPrefill, forced: Tensor, visible: Tensor) -> Tensor:
    rows, columns = head.blocks(selector)
    block = selector.block_k
    last = head.last(selector.block_q)
    probs = [head.attention(i) for i in last]
    true, bands = torch.zeros(len(columns), dtype=torch.float64), {}
    for i, p in zip(last, probs, strict=True):
        for j in range(head.k_len):
            true[j // block] += p[j] / len(last)
            band = (i + head.offset - j) // block
            bands[band] = bands.get(band, 0.0) + float(p[j]) / len(last)
    mean = head.q[last].mean(0) if last else torch.zeros(head.q.shape[1], dtype=torch.float64)
    seen_columns = [bool(head.valid[a:b].any()) for a, b in columns]
    if head.causal and last:
        near = [head.window is None or b - 1 > last[0] + head.offset - head.window for _, b in columns]
        end = last[-1] + head.offset
        seen_columns = [s and n and a <= end for s, n, (a, _) in zip(seen_columns, near, columns, strict=True)]
    scores = torch.full((len(columns),), -INF, dtype=torch.float64)
    for j, (a, b) in enumerate(columns):
        if seen_columns[j]:
            scores[j] = mean @ head.mean_key(a, b) * head.scale
    guess = scores.softmax(0) if any(seen_columns) else torch.zeros_like(true)
    divergence = 0.0
    for p in (true, guess):
        for x, m in zip(p.tolist(), ((true + guess) / 2).tolist(), strict=True):
            divergence += 0.5 * x * math.log(x / m) if x > 0 else 0.0
    if math.sqrt(max(divergence, 0.0)) < float(selector.tau):
        length = min(selector.block_q, selector.block_k)
        means = pooled_attention(
            head, selector, length, lambda i, j: float(head.q[slice(*i)].mean(0) @ head.mean_key(*j)) * head.scale
        )
        before = ranked_before(*(x.flatten() for x in (means, forced, visible))) / means[visible].sum()
        levels = before.view(len(rows), len(columns))
    else:
        none, every = torch.zeros(len(columns), dtype=torch.bool), torch.ones(len(columns), dtype=torch.bool)
        by_column = ranked_before(true, none, every)
        names = sorted(bands)
        masses = torch.tensor([bands[name] for name in names], dtype=torch.float64)
        by_band = dict(zip(names, ranked_before(masses, masses > 9, masses < 9).tolist(), strict=True))
        levels = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for i in range(len(rows)):
            for j in range(len(columns)):
                crossing = distances_of_block(i, j, selector, head.offset)
                found = [by_band[d // block] for d in crossing if d // block in by_band]
                levels[i, j] = min([float(by_column[j]), *found])
    return within_budgets(levels, selector, forced, visible)


def within_budgets(levels: Tensor, selector: FlexPrefill, forced: Tensor, visible: Tensor) -> Tensor:
    levels = levels.clone()
    for row, (must, seen) in enumerate(zip(forced, visible, strict=True)):
        order = [j for j in range(levels.shape[1]) if seen[j]]
        order.sort(key=lambda j: (not must[j], round(float(levels[row, j]), 6)))
        for place, j in enumerate(order):
            if selector.max_budget is not None and place >= max(1, selector.max_budget // selector.block_k):
                levels[row, j] = max(1.0, float(levels[row, j]))
            if place * selector.block_k < selector.min_budget:
                levels[row, j] = -INF
    return levels


def distances_of_block(i: int, j: int, selector: Selector, offset: int) -> range:
    """The distances from queries back to keys in a (whole) block."""
    top, left = i * selector.block_q + offset, j * selector.block_k
    return range(top - left - selector.block_k + 1, top + selector.block_q - left)


def minference_in_loops(head: Head, selector: MInference, forced: Tensor, visible: Tensor) -> Tensor:
    """Levels of one head, whose pattern is a single name."""
    rows, columns = head.blocks(selector)
    budget, count = selector.adaptive_budget, max(1, int(head.valid.sum()))

    def level(place: int, size: float, least: int, share: float) -> float:
        if budget is None:
            return -INF if place < max(size, least) else INF
        return -INF if place < least else place / (share * count)

    levels = torch.full((len(rows), len(columns)), INF, dtype=torch.float64)
    sizes = float(selector.vertical_size), float(selector.slash_size)
    if selector.pattern == "block_sparse":
        length = min(selector.block_q, selector.block_k)
        means = pooled_attention(
            head, selector, length, lambda i, j: float(head.q[slice(*i)].mean(0) @ head.mean_key(*j)) * head.scale
        )
        for i, row in enumerate(means):
            order = sorted(range(len(row)), key=lambda j: (not visible[i, j], not forced[i, j], -float(row[j])))
            for place, j in enumerate(order):
                levels[i, j] = level(place * selector.block_k, sum(sizes), 0, 1.0)
        return levels
    first = int(head.valid.int().argmax())
    keys, distances = list(range(first, head.k_len)), range(0 if head.causal else head.offset - head.k_len + 1, 0)
    distances = [*distances, *range(head.q_len + head.offset)]
    vertical, slash = torch.zeros(head.k_len).double(), dict.fromkeys(distances, 0.0)
    if selector.pattern == "vertical_slash":
        last = head.last(64)
        for i in last:
            p = head.attention(i)
            vertical += p / len(last)
            for j in range(head.k_len):
                if p[j] > 0:
                    slash[i + head.offset - j] += float(p[j]) / len(last)
        keys = [j for j in keys if head.valid[j]]
        keys.sort(key=lambda j: (j >= first + 30, -float(vertical[j])))
        distances.sort(key=lambda d: (abs(d) >= 100, abs(d) if abs(d) < 100 else -slash[d]))
        vertical_place = {j: place for place, j in enumerate(keys)}
        slash_place = {d: place for place, d in enumerate(distances)}
    else:
        vertical_place, slash_place = {j: j - first for j in keys}, {d: abs(d) for d in distances}
    for i in range(len(rows)):
        for j, (left, right) in enumerate(columns):
            found = [level(vertical_place[x], sizes[0], 30, 0.2) for x in range(left, right) if x in vertical_place]
            crossing = distances_of_block(i, j, selector, head.offset)
            found += [level(slash_place[d], sizes[1], 50, 0.8) for d in crossing if d in slash_place]
            levels[i, j] = min(found, default=INF)
    return levels


IN_LOOPS: dict[type[Selector], Any] = {
    XAttention: xattention_in_loops,
    FlashPrefill: flash_prefill_in_loops,
    FlexPrefill: flex_prefill_in_loops,
    MInference: minference_in_loops,
}


def equals_loops(selector: Selector, call: Call, per_head: Any = None) -> list[float]:
    """Compare levels and selection with the loops; gives the densities of the heads that were compared."""
    levels, kept = selector.levels(call), selector.kept(call)
    levels = levels.expand(*call.q.shape[:2], *kept.shape[-2:]).double()
    visible, forced = by_pairs(call, selector)
    densities = []
    for batch, head in ((0, 0), (1, 3)):
        one = selector if per_head is None else per_head(head)
        seen, must = visible[batch], forced[batch]
        expected = IN_LOOPS[type(selector)](Head(call, batch, head), one, must, seen)
        got = levels[batch, head]
        free = seen & ~must
        assert torch.equal(got[free].isinf(), expected[free].isinf()), (one, batch, head)
        finite = free & expected.isfinite()
        assert torch.allclose(got[finite], expected[finite], atol=2e-5), (one, batch, head)
        threshold = torch.as_tensor(one.threshold).double()
        wanted = must | (seen & (expected < threshold))
        if bool((expected[finite] - threshold).abs().min() > 1e-4) if finite.any() else True:
            rows = wanted.any(-1)
            assert torch.equal(kept[batch, head][rows], wanted[rows]), (one, batch, head)
            assert (kept[batch, head][~rows].sum(-1) == seen[~rows].any(-1)).all(), "one block of an empty row"
        if seen.any():
            densities.append(float(kept[batch, head].sum() / seen.sum()))
    return densities


def options(chance: random.Random) -> dict[str, Any]:
    sizes = {"block_q": chance.choice([64, 64, 128]), "block_k": chance.choice([64, 64, 128])}
    return sizes | {"sink": chance.random() < 0.5, "local": chance.choice([0, 0, 100])}


@pytest.mark.parametrize("seed", SEEDS)
def test_xattention_equals_loops(seed: int) -> None:
    chance = random.Random(seed)
    selector = XAttention(chance.choice([0.0, 0.3, 0.6, 0.9]), stride=chance.choice([8, 16, 32]), **options(chance))
    equals_loops(selector, random_call(seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_flash_prefill_equals_loops(seed: int) -> None:
    chance = random.Random(seed)
    blocks = {"sink_blocks": chance.randint(0, 2), "last_blocks": chance.randint(0, 2)}
    equals_loops(FlashPrefill(chance.choice([0.1, 0.5, 1.0]), **blocks, **options(chance)), random_call(seed))


@pytest.mark.parametrize("tau", [0.0, 9.0, None], ids=["vertical-slash", "query-aware", "as it comes"])
@pytest.mark.parametrize("seed", SEEDS)
def test_flex_prefill_equals_loops(seed: int, tau: float | None) -> None:
    chance = random.Random(seed)
    least = chance.choice([0, 0, 100])
    most = chance.choice([None, None, least + 130])
    tau = chance.uniform(0.05, 0.4) if tau is None else tau
    equals_loops(FlexPrefill(chance.choice([0.3, 0.6, 0.9]), tau, least, most, **options(chance)), random_call(seed))


@pytest.mark.parametrize("pattern", ["vertical_slash", "a_shape", "block_sparse"])
@pytest.mark.parametrize("budget", [None, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_minference_equals_loops(seed: int, budget: float | None, pattern: str) -> None:
    chance = random.Random(seed)
    sizes = chance.choice([0, 31, 80]), chance.choice([0, 55, 130])
    equals_loops(MInference(pattern, *sizes, budget, **options(chance)), random_call(seed))


def test_minference_with_a_table() -> None:
    """Patterns and sizes of each head at once."""
    call = random_call(8)
    table = ("block_sparse", "a_shape", "a_shape", "vertical_slash")
    vertical, slash = torch.tensor([30.0, 80.0, 0.0, 40.0]), torch.tensor([40.0, 60.0, 99.0, 101.0])
    selector = MInference(table, vertical, slash, block_q=64, block_k=64)

    def of_head(head: int) -> MInference:
        sizes = {"vertical_size": float(vertical[head]), "slash_size": float(slash[head])}
        return dataclasses.replace(selector, pattern=table[head], **sizes)  # type: ignore[arg-type]

    equals_loops(selector, call, of_head)


def test_the_loops_try_something() -> None:
    """Guards the comparisons above: their selections are neither full nor only forced, and depend on the fields."""
    call = random_call(12, is_causal=True, padded=False)
    assert call.k_len > 300 and call.q_len > 200
    sizes: dict[str, Any] = {"block_q": 64, "block_k": 64}
    flex: dict[str, Any] = sizes | {"min_budget": 0}
    makes: list[list[Selector]] = [
        [XAttention(0.2, **sizes), XAttention(0.7, **sizes), XAttention(0.7, stride=4, **sizes)],
        [FlashPrefill(x, 0, 0, local=0, **sizes) for x in (0.2, 0.7, 0.9)],
        [FlexPrefill(0.5, 0.0, **flex), FlexPrefill(0.5, 9.0, **flex), FlexPrefill(0.8, 9.0, **flex)],
        [MInference(x, adaptive_budget=0.3, **sizes) for x in ("vertical_slash", "a_shape", "block_sparse")],
    ]
    visible, forced = by_pairs(call, makes[0][0])
    for selectors in makes:
        kept = [selector.kept(call) for selector in selectors]
        for selector, x in zip(selectors, kept, strict=True):
            assert int(forced.sum()) * HEADS < int(x.sum()) < int(visible.sum()) * HEADS, selector
        assert len({tuple(x.flatten().tolist()) for x in kept}) == len(kept)


def whole(q: Tensor, k: Tensor, **more: Any) -> Call:
    return Call.make(q, k, k, **more)


def test_antidiagonals_meet_diagonals_of_odd_distance() -> None:
    """A line of keys, each looked at from 201 tokens later: antidiagonals see it. That of 200 they never meet."""
    generator = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1024, 256, generator=generator), dim=-1)
    sizes: dict[str, Any] = {"sink": False, "block_q": 64, "block_k": 64}
    found = {}
    for distance in (200, 201):
        q = torch.cat([torch.zeros(1, 1, distance, 256), 250.0 * k[:, :, :-distance]], 2)
        kept = XAttention(0.5, stride=16, **sizes).kept(whole(q, k, is_causal=True, scale=1.0))[0, 0]
        found[distance] = sum(bool(kept[i, i - 4] | kept[i, i - 3]) for i in range(5, 16))
    assert found[201] == 11
    assert found[200] < 8, "chance alone"


def test_flash_prefill_scores_the_last_queries_and_the_first_keys_densely() -> None:
    call = whole(torch.zeros(1, 1, 1280, 16), torch.zeros(1, 1, 1280, 16), is_causal=True)
    kept = FlashPrefill(1.0).kept(call.replace(k=torch.randn(1, 1, 1280, 16).sort(2).values))
    expected = torch.ones(10, 10).tril().bool()
    near = torch.ones(10, 10).triu(-3).bool()
    expected &= near | (torch.arange(10) < 2) | (torch.arange(10)[:, None] >= 8)
    assert torch.equal(kept[0, 0] & expected, expected)
    assert int((kept[0, 0] & ~expected).sum()) == 0, "zero queries score all blocks alike; alpha 1 keeps one"


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.6, 1.0])
def test_flash_prefill_keeps_what_comes_near_the_largest(alpha: float) -> None:
    probs = torch.tensor([0.15, 0.4, 0.05, 0.1, 0.3])
    k = torch.zeros(1, 1, 640, 16)
    k[0, 0, :, 0] = probs.log().repeat_interleave(128)
    q = torch.zeros(1, 1, 128, 16)
    q[..., 0] = 1.0
    more: dict[str, Any] = {"last_blocks": 0, "sink": False}
    kept = FlashPrefill(alpha, **more).kept(whole(q, k, scale=1.0))
    assert kept[0, 0, 0].tolist() == (probs >= alpha * 0.4).tolist()
    assert torch.equal(FlashPrefill(torch.tensor([alpha]), **more).kept(whole(q, k, scale=1.0)), kept)


def test_flex_prefill_decides_by_head() -> None:
    """Head 0: last queries of one kind, as their mean. Head 1: each looks at a key of its own."""
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(1, 1, 512, 32, generator=generator)
    alike = torch.randn(1, 1, 1, 32, generator=generator).expand(-1, -1, 512, -1)
    own = 3.0 * k.roll(100, 2)
    call = whole(torch.cat([alike, own], 1), torch.cat([0.05 * k, k], 1), is_causal=True)
    distances = FlexPrefill(block_q=64, block_k=64).distances(
        call, last_queries(call, 64), *block_means(call.k, 64, None)
    )
    assert distances.shape == (1, 2)
    assert float(distances[0, 0]) < 0.1 < float(distances[0, 1]) <= math.sqrt(math.log(2))
    tau = torch.tensor([float(x) for x in distances[0]])
    sizes: dict[str, Any] = {"block_q": 64, "block_k": 64, "min_budget": 0}
    aware, slash = (FlexPrefill(0.5, x, **sizes).levels(call) for x in (9.0, 0.0))
    assert torch.equal(FlexPrefill(0.5, tau + torch.tensor([0.01, -0.01]), **sizes).levels(call)[:, 0], aware[:, 0])
    assert torch.equal(FlexPrefill(0.5, tau + torch.tensor([0.01, -0.01]), **sizes).levels(call)[:, 1], slash[:, 1])


def test_flex_prefill_budgets_are_a_floor_and_a_ceiling() -> None:
    call = random_call(12, is_causal=True, padded=False).replace(window=None)
    sizes: dict[str, Any] = {"block_q": 64, "block_k": 64, "tau": 0.2}
    visible, forced = (x[0].sum(-1) for x in by_pairs(call, FlexPrefill(**sizes)))
    few = FlexPrefill(0.0, min_budget=256, **sizes).kept(call).sum(-1)
    assert torch.equal(few, torch.minimum(visible, torch.maximum(forced, torch.tensor(4))).expand_as(few))
    many = FlexPrefill(0.9999, min_budget=0, max_budget=200, **sizes).kept(call).sum(-1)
    assert torch.equal(many, torch.minimum(visible, torch.maximum(forced, torch.tensor(3))).expand_as(many))
    every = FlexPrefill(1.0, min_budget=0, max_budget=200, **sizes).kept(call).sum(-1)
    assert torch.equal(every, visible.expand_as(every))


@pytest.mark.parametrize("selector", [FlexPrefill(0.5, 0.0, 0, block_q=64, block_k=64), MInference(
    "vertical_slash", 40, 110, block_q=64, block_k=64)], ids=lambda selector: type(selector).__name__)  # fmt: skip
def test_a_vertical_and_a_slash_line_are_found(selector: Selector) -> None:
    """All queries look at key 150 or at the key 333 before them; every block that the lines cross is kept."""
    generator = torch.Generator().manual_seed(2)
    places = torch.nn.functional.normalize(torch.randn(1, 1, 768, 64, generator=generator), dim=-1)
    column = places[:, :, 150:151]
    q = 12.0 * (places.roll(333, 2) + column)
    kept = selector.kept(whole(q, places, is_causal=True, scale=1.0))[0, 0]
    i = torch.arange(768)
    for row in range(6, 12):
        assert kept[row, 150 // 64]
        crossed = {int(j) for j in (i[row * 64 : row * 64 + 64] - 333) // 64}
        assert all(kept[row, j] for j in crossed)
    assert kept[8:].float().mean() < 0.75


def test_minference_looks_at_given_sizes_alone() -> None:
    """Without an adaptive budget there is no threshold; a calibration can only leave heads dense."""
    call = random_call(12, padded=False)
    fixed = MInference(block_q=64, block_k=64, vertical_size=30, slash_size=60)
    assert (fixed.tuned, fixed.candidates, fixed.threshold) == ("", (0.0,), 0.0)
    tuned = fixed.tuned_to(torch.full((HEADS,), 0.3), torch.tensor([True, False, True, True]))
    assert torch.equal(tuned.kept(call)[:, [0, 2, 3]], fixed.kept(call)[:, [0, 2, 3]])
    adaptive = MInference(adaptive_budget=0.1)
    assert adaptive.tuned == "adaptive_budget" and len(adaptive.candidates) > 9 and adaptive.threshold == 0.1


@pytest.mark.parametrize("padding", [0, 37, 128])
@pytest.mark.parametrize(
    "selector",
    [
        FlashPrefill(0.6, block_q=64, block_k=64, local=0),
        FlexPrefill(0.5, 0.2, 0, block_q=64, block_k=64),
        MInference(adaptive_budget=0.3, block_q=64, block_k=64),
        XAttention(0.6, block_q=64, block_k=64),
    ],
    ids=lambda selector: type(selector).__name__,
)
def test_padding_on_the_right_changes_nothing(selector: Selector, padding: int) -> None:
    """The last queries are the last that are no padding, in each sequence of the batch."""
    generator = torch.Generator().manual_seed(4)
    q, k = drawn(450, HEADS, generator), drawn(450, 2, generator)
    length = 450 - padding
    alone = selector.kept(whole(q[1:, :, :length], k[1:, :, :length], is_causal=True))
    valid = torch.ones(2, 450, dtype=torch.bool)
    valid[1, length:] = False
    batch = selector.kept(whole(q, k, is_causal=True, attn_mask=valid))
    rows = length // 64  # whole blocks of queries; the next one holds queries that are padding
    assert torch.equal(batch[1:, :, :rows, : alone.shape[-1]], alone[:, :, :rows])
    assert torch.equal(batch[:1], selector.kept(whole(q[:1], k[:1], is_causal=True)))


@pytest.mark.parametrize("seed", range(6))
def test_long_prompts_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    call = random_call(seed)
    sizes: dict[str, Any] = {"block_q": 64, "block_k": 64}
    for selector in (XAttention(**sizes), FlashPrefill(**sizes), FlexPrefill(**sizes), MInference(**sizes)):
        at_once = selector.levels(call)
        with monkeypatch.context() as patch:
            patch.setattr(pooled, "_FINE_SCORES", 1)
            parts = selector.levels(call)
        assert torch.allclose(at_once, parts, atol=1e-5)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and not func.is_view:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize(
    "selector",
    [XAttention(), FlashPrefill(), FlexPrefill(), MInference(), MInference(("a_shape", "vertical_slash") * 16)],
    ids=lambda selector: type(selector).__name__,
)
@pytest.mark.parametrize("padded", [False, True])
def test_memory_is_bounded_and_nothing_is_read_on_the_host(selector: Selector, padded: bool) -> None:
    """128K tokens of Llama-3.1-8B's shape in tensors without data: reading a value of them is an error."""
    length = 131072
    with torch._subclasses.FakeTensorMode(), Largest() as largest:
        q, k = (torch.empty(1, heads, length, 128, dtype=torch.bfloat16) for heads in (32, 8))
        mask = torch.empty(1, length, dtype=torch.bool) if padded else None
        kept = selector.kept(Call(q, k, k, is_causal=True, scale=0.1, attn_mask=mask))
    assert kept.shape == (1, 32, 1024, 1024)
    assert largest.elements <= q.numel(), "no more than the queries"


def test_last_queries_sum_up_by_key_and_by_distance() -> None:
    for seed in SEEDS:
        call = random_call(seed)
        last, first = last_queries(call, 50), first_distance(call)
        head = Head(call, 0, 2)
        rows = head.last(50)
        assert not rows or rows[-1] == int(last_query(call)[0])
        columns = torch.zeros(call.k_len, dtype=torch.float64)
        diagonals = torch.zeros(last.diagonals.shape[-1], dtype=torch.float64)
        for i in rows:
            p = head.attention(i) / len(rows)
            columns += p
            for j in p.nonzero()[:, 0].tolist():
                diagonals[i + call.offset - j - first] += p[j]
        assert torch.allclose(last.columns[0, 2].double(), columns, atol=1e-5)
        assert torch.allclose(last.diagonals[0, 2].double(), diagonals, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: XAttention(stride=48), ValueError, r"stride must be a divisor of both .*\(128, 128\), got 48"),
        (lambda: XAttention(stride=128, block_k=64), ValueError, r"stride must be .*\(128, 64\), got 128"),
        (lambda: XAttention(stride=8.0), ValueError, "stride must be .*got 8.0"),  # type: ignore[arg-type]
        (lambda: FlashPrefill(sink_blocks=-1), ValueError, "sink_blocks must be a number of blocks, .*got -1"),
        (lambda: FlashPrefill(last_blocks=1.5), ValueError, "last_blocks must be .*got 1.5"),  # type: ignore[arg-type]
        (lambda: FlexPrefill(min_budget=-1), ValueError, "min_budget must be a number of tokens, .*got -1"),
        (lambda: FlexPrefill(min_budget=None), ValueError, "min_budget must be .*got None"),  # type: ignore[arg-type]
        (lambda: FlexPrefill(max_budget=True), ValueError, "max_budget must be .*got True"),
        (lambda: FlexPrefill(max_budget=64), ValueError, "max_budget must be at least min_budget 1024, got 64"),
        (lambda: MInference("diagonal"), ValueError, r"pattern must be one of \('vertical_slash', .*got 'diagonal'"),
        (lambda: MInference(("a_shape", 3)), ValueError, "pattern must be one of"),  # type: ignore[arg-type]
        (lambda: MInference(()), ValueError, r"pattern must be one of .*got \(\)"),
        (lambda: MInference(adaptive_budget=1.2), ValueError, r"adaptive_budget must be in \[0, 1\], got 1.2"),
        (lambda: MInference(adaptive_budget="x"), TypeError, "adaptive_budget must be a number"),  # type: ignore
        (lambda: MInference(("a_shape",) * 3).kept(random_call(0)), ValueError, "a tuple of 4, got 3 names"),
    ],
)
def test_fields_that_cannot_be_meant(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
