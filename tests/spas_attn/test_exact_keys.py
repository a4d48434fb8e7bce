"""ExactKeys: its rule against plain loops in float64, its kernels against its rule."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from cases import BF16, F32, HALF, Case
from test_select import assert_same_selection, fused, inputs_of
from test_selectors import draw, visible_by_pairs
from torch import Tensor

from spas_attn import Call
from spas_attn.fused import run_fused
from spas_attn.kernels import key_scores
from spas_attn.select import _fused_traced, fused_serves, parts_of
from spas_attn.selectors import ExactKeys, Tokens, pooled

pytest.importorskip("triton")


def in_loops(selector: ExactKeys, call: Call, b: int, h: int) -> Tensor:
    """Kept blocks of one head, written out; bool ``[nq, nk]``."""
    q, k = call.q[b, h].double(), call.k[b, h // call.group].double()
    valid = torch.ones(call.k_len, dtype=torch.bool) if call.key_mask is None else call.key_mask[b]
    offset, pool, nk = call.offset, selector.pool, -(-call.k_len // selector.block_k)
    visible = visible_by_pairs(call.q_len, call.k_len, selector, call.is_causal, call.window, valid)
    kept = torch.zeros_like(visible)
    for i in range(len(visible)):
        top, bottom = i * selector.block_q, min((i + 1) * selector.block_q, call.q_len)
        rows = []
        for first in range(top, bottom, pool):
            last = min(first + pool, bottom) - 1
            queries = [x for x in range(first, last + 1) if not call.is_causal or valid[x + offset]]
            if not queries:
                continue
            vector = q[queries].mean(0) if selector.queries == "mean" else q[queries[-1]]
            mass = [0.0] * nk
            seen = range(call.k_len)
            if call.is_causal:
                seen = range(0 if call.window is None else max(0, first + offset - call.window + 1), last + offset + 1)
            for j in seen:
                if valid[j]:
                    mass[j // selector.block_k] += math.exp(float(vector @ k[j]) * call.scale)
            if sum(mass):
                rows.append([x / sum(mass) for x in mass])
        share = [sum(row[j] for row in rows) / max(1, len(rows)) for j in range(nk)]
        forced = set()
        if selector.sink and valid.any():
            forced.add(int(valid.nonzero()[0, 0]) // selector.block_k)
        if call.is_causal:
            starts = [j * selector.block_k - top - offset for j in range(nk)]
            near = range(1 - selector.block_k - selector.local, selector.block_q)
            forced |= {j for j in range(nk) if starts[j] in near}
        forced = {j for j in forced if visible[i, j]}
        kept[i, list(forced)] = True
        if selector.rank == "peak":
            peak = [max((row[j] for row in rows), default=0.0) for j in range(nk)]
            kept[i] |= visible[i] & torch.tensor([1 - x < selector.cdf_threshold for x in peak])
            if not kept[i].any() and visible[i].any():
                kept[i, max(visible[i].nonzero()[:, 0].tolist(), key=lambda j: peak[j])] = True
            continue
        reached = sum(share[j] for j in forced)
        for j in sorted(range(nk), key=lambda j: -share[j]):
            if j in forced or not visible[i, j]:
                continue
            if reached >= selector.cdf_threshold and kept[i].any():
                break
            kept[i, j] = True
            reached += share[j]
    return kept


@pytest.mark.parametrize("rank", ["mass", "peak"])
@pytest.mark.parametrize("queries", ["mean", "sample"])
@pytest.mark.parametrize("seed", range(6))
def test_the_rule_in_loops(queries: str, rank: str, seed: int) -> None:
    chance = random.Random(f"{queries} {seed}")
    is_causal = seed % 3 != 2
    k_len = chance.randint(400, 480)
    q_len = chance.randint(100, 200)
    q, k = draw(q_len, k_len, heads=2, k_heads=1, seed=seed)
    mask = None
    if seed % 2:
        mask = torch.rand(1, k_len, generator=torch.Generator().manual_seed(seed)) < 0.7
        mask[:, : k_len // 6] = False
    call = Call.make(
        q, k, k, is_causal=is_causal, scale=chance.choice([0.1, 0.25]), attn_mask=mask,
        window=chance.choice([None, 200]) if is_causal else None,
    )  # fmt: skip
    selector = ExactKeys(
        chance.uniform(*((0.2, 0.6) if rank == "mass" else (0.6, 0.95))), chance.choice([16, 32, 64]), queries, rank,
        block_q=64,
        block_k=chance.choice([64, 64, 128]), local=chance.choice([0, 40]), sink=chance.random() < 0.5,
    )  # fmt: skip
    kept = selector.kept(call)
    for h in range(2):
        assert torch.equal(kept[0, h], in_loops(selector, call, 0, h)), h
    assert (selector.visible(call) & ~kept).any()


def test_the_key_that_stands_out_counts() -> None:
    """One key of 64 holds the mass: its block is the first to be kept, where the mean of its keys says little."""
    q, k = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 640, 16)
    q[..., 0] = 1.0
    k[:, :, 5 * 64 + 17, 0] = 40.0  # a mean of .6
    k[:, :, 2 * 64 : 3 * 64, 0] = 1.0
    kept = ExactKeys(0.5, sink=False, block_q=64, block_k=64).select(q, k, is_causal=False, scale=1.0).to_dense()
    assert kept[0, 0, 0].nonzero().tolist() == [[5]]


def test_long_sequences_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(300, 330, heads=4, k_heads=2, seed=13)
    for is_causal in (False, True):
        call = Call.make(q, k, k, is_causal=is_causal)
        whole = ExactKeys().rows(call)
        with monkeypatch.context() as patch:
            patch.setattr(pooled, "_FINE_SCORES", 1)
            parts = ExactKeys().rows(call)
        assert torch.equal(whole == -torch.inf, parts == -torch.inf)
        assert torch.allclose(whole, parts, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"pool": 48}, ValueError, r"pool must be a divisor of block_q \(128\), got 48"),
        ({"pool": 128, "block_q": 64}, ValueError, r"pool must be a divisor of block_q \(64\), got 128"),
        ({"pool": 0}, ValueError, "pool must be .*got 0"),
        ({"pool": True}, ValueError, "pool must be .*got True"),
        ({"queries": "middle"}, ValueError, r"queries must be one of \('mean', 'sample'\), got 'middle'"),
        ({"rank": "least"}, ValueError, r"rank must be one of \('mass', 'peak'\), got 'least'"),
        ({"cdf_threshold": 1.5}, ValueError, "cdf_threshold must be in .*got 1.5"),
        ({"cdf_threshold": "0.5"}, TypeError, "cdf_threshold must be a"),
    ],
)
def test_fields_that_cannot_be_meant(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ExactKeys(**fields)


@pytest.mark.parametrize("seed", range(10))
def test_random_calls(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, in one part or in several, keep what the rule keeps."""
    chance = random.Random(seed)
    monkeypatch.setattr(key_scores, "_SCRATCH", chance.choice([1, 1 << 24]))
    monkeypatch.setattr(key_scores, "_STRETCH", chance.choice([(64, 64), (512, 2048)]))
    is_causal = chance.random() < 0.65
    k_len = chance.randint(1, 350)
    block_q, block_k = chance.choice([(64, 64), (64, 64), (128, 64), (64, 128), (128, 128)])
    k_heads = chance.choice([1, 2])
    case = Case(
        chance.randint(1, k_len if is_causal else 300), k_len, dim=chance.choice([16, 24, 64]),
        heads=k_heads * chance.choice([1, 3]), k_heads=k_heads, batch=2, is_causal=is_causal,
        window=chance.choice([None, None, chance.randint(1, 300)]) if is_causal else None,
        padding=chance.choice([None, None, "left", "right", "holes", "one row empty"]),
        scale=chance.choice([0.05, 0.25]), density=None, layout=chance.choice(["HND", "NHD", "strided"]),
        dtype=chance.choice([F32, F32, BF16, HALF]),
    )  # fmt: skip
    size: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    many = torch.rand(case.heads, generator=torch.Generator().manual_seed(seed))
    dense = chance.choice([None, None, many > 0.5])
    cdf: Any = chance.choice([0.0, 1.0, many, *(chance.uniform(0.1, 0.95) for _ in range(4))])
    selector: Any = ExactKeys(
        cdf, chance.choice([8, 16, 32, 64]),
        chance.choice(["mean", "sample"]), chance.choice(["mass", "peak"]), sink=chance.random() < 0.5,
        local=chance.choice([0, 0, 100]),
        dense_heads=dense, **size,
    )  # fmt: skip
    if chance.random() < 0.3:
        selector = selector | Tokens(((3, 5), (-70, -2)), queries=chance.random() < 0.5, **size)
    assert_same_selection(selector, inputs_of(case, seed))


CALLS = [
    (Case(1, 1, density=None), ExactKeys(0.5)),
    (Case(1, 300, is_causal=True, density=None), ExactKeys(0.4, block_q=64, block_k=64)),
    (Case(200, 330, dim=256, dtype=HALF, is_causal=True, density=None), ExactKeys(0.4, local=0, block_k=64)),
    (Case(200, 330, dim=256, is_causal=True, density=None), ExactKeys(0.4, local=0)),
    (Case(300, 260, dim=80, heads=4, k_heads=2, dtype=BF16, layout="NHD", density=None), ExactKeys(0.6, 64)),
    (Case(300, 260, heads=2, k_heads=1, dtype=HALF, density=None), ExactKeys(0.8, 16, "sample", "peak", block_k=64)),
    (Case(128, 128, density=None), ExactKeys(0.7, pool=1, block_q=64, block_k=64)),
    (Case(70, 64 * 70, dim=16, heads=1, k_heads=1, density=None), ExactKeys(0.8, block_q=64, block_k=64)),
]


@pytest.mark.parametrize(("case", "selector"), CALLS, ids=str)
def test_calls(case: Case, selector: ExactKeys) -> None:
    kept = assert_same_selection(selector, inputs_of(case, 3))
    assert case.q_len == 1 or kept.shape[-1] < 3 or not kept.all(), "keeps everything, which shows little"


def test_scores_further_apart_than_float32_holds() -> None:
    """Scores that rise by 300 from block to block: the kernel's quick way overflows, and its other way is taken."""
    q, k = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 640, 16)
    q[..., 0] = 1.0
    k[..., 0] = torch.arange(10).repeat_interleave(64) * 300.0 % 1900.0 - 1000.0
    k[..., 1] = torch.randn(640, generator=torch.Generator().manual_seed(0))
    call = Call(q, k, k, False, 1.0)
    for cdf in (0.5, 0.999):
        assert assert_same_selection(ExactKeys(cdf, sink=False, block_q=64, block_k=64), call)[
            0, 0, 0
        ].nonzero().tolist() == [[6]]
    far = Call(q, k - 1e5, k, False, 1.0)  # a constant changes nothing
    assert torch.equal(
        fused(ExactKeys(0.5, block_q=64, block_k=64), far).mask.indices,
        fused(ExactKeys(0.5, block_q=64, block_k=64), call).mask.indices,
    )


@pytest.mark.parametrize("queries", ["mean", "sample"])
@pytest.mark.parametrize("rank", ["mass", "peak"])
def test_later_tokens_do_not_change_earlier_selections(queries: str, rank: str) -> None:
    call = inputs_of(Case(300, 360, dim=16, k_heads=1, is_causal=True, density=None), 5)
    selector = ExactKeys(0.5 if rank == "mass" else 0.9, 32, queries, rank, block_q=64, block_k=64, local=0)
    q, k = call.q.clone(), call.k.clone()
    q[:, :, 192:] *= -100
    k[:, :, 192 + 60 :] *= -100
    before, after = (fused(selector, x).mask for x in (call, call.replace(q=q, k=k)))
    assert torch.equal(before.counts[:, :, :3], after.counts[:, :, :3])
    assert torch.equal(before.indices[:, :, :3], after.indices[:, :, :3])
    assert not torch.equal(before.to_dense()[:, :, 3:], after.to_dense()[:, :, 3:])


@pytest.mark.parametrize("queries", ["mean", "sample"])
@pytest.mark.parametrize("rank", ["mass", "peak"])
def test_packed_sequences_in_one_launch(queries: str, rank: str) -> None:
    ends = torch.tensor([0, 70, 71, 260, 330], dtype=torch.int32)
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 2, 330, 32, generator=generator).cumsum(2) / 5
    k = torch.randn(1, 1, 330, 32, generator=generator).cumsum(2) / 5
    call, _ = Call.make(q, k, k, is_causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends).aligned()
    selector = ExactKeys(0.5 if rank == "mass" else 0.8, 16, queries, rank, local=0, block_q=64, block_k=64)
    assert not assert_same_selection(selector, call).all()


@pytest.mark.parametrize("queries", ["mean", "sample"])
@pytest.mark.parametrize("rank", ["mass", "peak"])
def test_through_the_custom_op(queries: str, rank: str) -> None:
    call = inputs_of(Case(200, 260, heads=2, k_heads=1, dim=32, is_causal=True, density=None))
    selector = ExactKeys(torch.tensor([0.4, 0.7]), 64, queries, rank, block_q=64, block_k=64)
    want = fused(selector, call).mask
    assert torch.equal(_fused_traced(parts_of(selector, call), call, False).mask.indices, want.indices)
    assert not fused_serves(selector, call)  # a CPU tensor


@pytest.mark.gpu
@pytest.mark.parametrize(("length", "dim", "heads", "is_causal"), [(16384, 128, 4, False), (32768, 64, 8, True)])
@pytest.mark.parametrize("queries", ["mean", "sample"])
@pytest.mark.parametrize(("rank", "threshold"), [("mass", 0.6), ("peak", 0.997)])
def test_full_size(
    length: int, dim: int, heads: int, is_causal: bool, queries: str, rank: str, threshold: float
) -> None:
    """Few blocks differ from those of the rule in float32, with as much mass, and two runs agree to the bit."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(1, n, length, dim, generator=generator, device="cuda").to(BF16) for n in (heads, 2))
    call = Call.make(q, k, k, is_causal=is_causal)
    selector = ExactKeys(threshold, 32, queries, rank, local=0, block_q=64, block_k=64)
    mask = run_fused(parts_of(selector, call), call, False)[0]
    assert torch.equal(run_fused(parts_of(selector, call), call, False)[0].indices, mask.indices)
    got, want = mask.to_dense(), selector.kept(call)
    assert (got != want).float().mean() <= 0.005
    probs = pooled.mean_row(pooled.probabilities(selector.rows(call)))
    assert (probs * got - probs * want).sum(-1).abs().mean() <= 1e-3


def test_scores_take_no_more_memory_than_the_lists() -> None:
    for heads, nq, nk, per_q, group in ((32, 512, 512, 2, 4), (32, 2048, 2048, 2, 4), (1, 8192, 8192, 4, 1)):
        lists = torch.empty(1, heads, nq, nk, dtype=torch.int32, device="meta")
        parts = list(key_scores.row_sums(lists, per_q, group))
        assert [x.first for x in parts] == [sum(y.blocks for y in parts[:n]) for n in range(len(parts))]
        assert sum(x.blocks for x in parts) == nq
        assert parts[0].data.numel() <= max(lists.numel(), 1 << 24)
