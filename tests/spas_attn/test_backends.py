"""Backends `sdpa` and `cpu` against `reference`, and `reference` against plain loops, on every awkward case.

(`triton` and `sage` have tests of their own.)
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import BF16, CASES, F32, HALF, Case
from torch import Tensor

from spas_attn import BlockMask, Call, backends
from spas_attn.metrics import relative_l1

# Relative L1 against `reference`, both rounded to the call's dtype.
LIMITS = {F32: 1e-5, HALF: 0.003, BF16: 0.003}
EXACT = ["cpu", "sdpa"]
ALL = ["cpu", "sdpa", "reference"]


def run(name: str, call: Call) -> Tensor:
    backend = backends.get(name)
    assert backend.missing() is None
    assert backend.declines(call) is None
    return backend.run(call)


def in_loops(call: Call) -> Tensor:
    """Attention written out: one query at a time, in float64, from the definitions alone."""
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    q_len, k_len = q.shape[2], k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kh = h // (q.shape[1] // k.shape[1])
            for i in range(q_len):
                at = i + k_len - q_len
                visible = []
                for j in range(k_len):
                    seen = not call.is_causal or j <= at
                    seen = seen and (call.window is None or j > at - call.window)
                    if call.attn_mask is not None:
                        mask = call.attn_mask
                        seen = seen and bool(mask[b, j] if mask.dim() == 2 else mask[b, h % mask.shape[1], i, j])
                    if call.mask is not None:
                        kept = call.mask.indices[b, h, i // call.mask.block_q]
                        kept = kept[: int(call.mask.counts[b, h, i // call.mask.block_q])].tolist()
                        seen = seen and j // call.mask.block_k in kept
                    if seen:
                        visible.append(j)
                if visible:
                    probs = torch.softmax(k[b, kh, visible] @ q[b, h, i] * call.scale, 0)
                    out[b, h, i] = probs @ v[b, kh, visible]
    return out


@pytest.mark.parametrize(
    "case",
    [
        Case(70, 70, dim=16, is_causal=True, block_q=64, block_k=64),
        Case(66, 130, dim=16, heads=4, k_heads=2, is_causal=True, window=40, block_q=64, block_k=64),
        Case(130, 66, dim=16, heads=2, k_heads=1, padding="left", batch=2, block_q=128, block_k=64, scale=0.7),
        Case(65, 65, dim=16, heads=1, k_heads=1, padding="one row empty", batch=2, block_q=64, block_k=64),
    ],
    ids=str,
)
def test_reference_equals_plain_loops(case: Case) -> None:
    call = case.call()
    assert relative_l1(run("reference", call), in_loops(call)) < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_full_4d_mask(name: str) -> None:
    mask = torch.rand(2, 1, 40, 70, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, :, 7] = False
    call = Case(40, 70, dim=16, batch=2, block_q=64, block_k=64).call(attn_mask=mask)
    if name == "cpu":
        assert "4-D" in str(backends.get(name).declines(call))
        return
    out = run(name, call)
    assert relative_l1(out, in_loops(call)) < 1e-6
    assert (out[:, :, 7] == 0).all()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(name: str, case: Case) -> None:
    call = case.call()
    before = [x.clone() for x in (call.q, call.k, call.v)]
    expected = run("reference", call)
    out = run(name, call)
    assert out.shape == call.q.shape
    assert out.dtype == call.q.dtype
    assert out.isfinite().all()
    if expected.abs().sum() > 0:
        assert relative_l1(out, expected) <= LIMITS[case.dtype]
    assert torch.equal(out, run(name, call)), "the same call twice gives different bits"
    for x, y in zip((call.q, call.k, call.v), before, strict=True):
        assert torch.equal(x, y), "inputs were changed"


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [HALF, BF16, F32], ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 256])
def test_head_dims_and_dtypes(name: str, dtype: torch.dtype, dim: int) -> None:
    call = Case(200, 200, dim=dim, heads=4, k_heads=2, is_causal=True, block_q=64, dtype=dtype).call(seed=3)
    assert relative_l1(run(name, call), run("reference", call)) <= LIMITS[dtype]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_without_a_visible_key_give_zero(name: str, is_causal: bool) -> None:
    """No block kept, every kept key padded away, or every kept block in the future: 0, and never what was in memory."""
    case = Case(300, 300, batch=2, heads=2, density=0.5, is_causal=is_causal)
    kept = torch.ones(2, 2, 3, 3, dtype=torch.bool)
    kept[0, 0, 1] = False  # this query block keeps nothing
    kept[0, 1, 0] = torch.tensor([False, False, True])  # this one only the future (without causality: something)
    padding = torch.ones(2, 300, dtype=torch.bool)
    padding[1] = False
    call = case.call(mask=BlockMask.from_dense(kept, 300, 300), attn_mask=padding)
    torch.empty(2, 2, 384, 64).fill_(7.0)  # leave something to be found in unwritten memory
    out = run(name, call)
    assert (out[0, 0, 128:256] == 0).all()
    assert (out[1] == 0).all()
    assert bool((out[0, 1, :128] == 0).all()) == is_causal
    rest = torch.ones(2, 300, dtype=torch.bool)
    rest[0, 128:256] = False
    rest[1, :128] = False
    assert (out[0][rest].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "given mask"])
@pytest.mark.parametrize("dtype", [HALF, BF16, F32], ids=str)
@pytest.mark.parametrize(("q_len", "k_len"), [(300, 300), (200, 333)])
def test_causality_to_the_bit(name: str, masked: bool, dtype: torch.dtype, q_len: int, k_len: int) -> None:
    """Outputs do not depend on later tokens, not even on huge ones; the next output does."""
    case = Case(q_len, k_len, dim=32, heads=2, k_heads=1, is_causal=True, dtype=dtype, density=0.6 if masked else None)
    call = case.call()
    if masked:
        assert call.mask is not None
        kept = call.mask.to_dense() | torch.eye(call.mask.counts.shape[2], call.mask.indices.shape[3], dtype=torch.bool)
        call = call.replace(mask=BlockMask.from_dense(kept, q_len, k_len))
    before = run(name, call)
    offset = k_len - q_len
    for first, value in ((q_len - 1, 1.0), (150, 60000.0), (129, -60000.0), (1, 60000.0)):
        later = [x.clone() for x in (call.q, call.k, call.v)]
        later[0][:, :, first:] = value / 100
        later[1][:, :, first + offset :] = value
        later[2][:, :, first + offset :] = value
        after = run(name, call.replace(q=later[0], k=later[1], v=later[2]))
        assert torch.equal(before[:, :, :first], after[:, :, :first]), f"tokens from {first} on changed earlier outputs"
        assert not torch.equal(before[:, :, first:], after[:, :, first:])


@pytest.mark.parametrize("name", ALL)
def test_hidden_keys_do_not_matter(name: str) -> None:
    """Padding, window and dropped blocks hide keys to the bit, too."""
    call = Case(300, 300, is_causal=True, window=100, padding="left", heads=4, k_heads=2).call()
    before = run(name, call)
    assert call.attn_mask is not None
    k, v = call.k.clone(), call.v.clone()
    k[:, :, ~call.attn_mask[0]] = 1e4
    v[:, :, ~call.attn_mask[0]] = 1e4
    assert torch.equal(before, run(name, call.replace(k=k, v=v)))
    k, v = call.k.clone(), call.v.clone()
    k[:, :, 130:150] = 1e4
    v[:, :, 130:150] = 1e4
    after = run(name, call.replace(k=k, v=v))
    assert torch.equal(before[:, :, 249:], after[:, :, 249:])  # row 249 sees keys 150 to 249
    assert not torch.equal(before[:, :, 248], after[:, :, 248])


@pytest.mark.parametrize("name", EXACT)
def test_nan_in_the_inputs_is_not_hidden(name: str) -> None:
    call = Case(200, 200, is_causal=True).call()
    q = call.q.clone()
    q[0, 0, 5] = math.nan
    out = run(name, call.replace(q=q))
    assert out[0, 0, 5].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("counts", [[0, 1, 2, 3], [3, 3, 0, 0], [1, 1, 1, 1]])
def test_cpu_with_ragged_counts(counts: list[int]) -> None:
    """Rows are grouped by their number of kept blocks; every grouping gives the same."""
    kept = torch.tensor([[j < n for j in range(4)] for n in counts])
    kept = torch.stack([kept, kept.flip(1), kept.flip(0), kept.roll(1, 1)])[None]
    call = Case(500, 500, heads=4, k_heads=2).call(mask=BlockMask.from_dense(kept, 500, 500))
    assert relative_l1(run("cpu", call), run("reference", call)) <= LIMITS[F32]


def test_cpu_splits_long_rows_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1000, 1000, density=0.6, heads=4, k_heads=2, is_causal=True, padding="holes", batch=2)
    whole = run("cpu", case.call())
    monkeypatch.setattr(backends.cpu, "_SCORES", 128 * 128)
    assert relative_l1(run("cpu", case.call()), whole) < 1e-6


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_long_queries_are_cut_into_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(600, 700, is_causal=True, window=90, heads=2, k_heads=1)
    whole = run(name, case.call())
    monkeypatch.setattr(getattr(backends, name), "_ROWS", 128)
    assert relative_l1(run(name, case.call()), whole) < 1e-6


class TestPVSkip:
    """PV skip in `reference`, against its rule in loops."""

    @staticmethod
    def in_loops(call: Call, threshold: float) -> Tensor:
        assert call.mask is not None
        scores = (call.q[0, 0].double() @ call.k[0, 0].double().T) * call.scale
        seen = call.token_mask(0, call.q.shape[2])
        assert seen is not None
        scores = scores.masked_fill(~seen[0, 0], -math.inf) / math.log(2)
        block_q, block_k = call.mask.block_q, call.mask.block_k
        out = torch.zeros(call.q.shape[2:], dtype=torch.float64)
        for top in range(0, len(scores), block_q):
            rows = scores[top : top + block_q]
            largest = torch.full((len(rows),), -math.inf, dtype=torch.float64)
            total, acc = torch.zeros(len(rows), 1), torch.zeros(len(rows), call.q.shape[3], dtype=torch.float64)
            for left in range(0, rows.shape[1], block_k):
                tile = rows[:, left : left + block_k]
                largest = torch.maximum(largest, tile.amax(1))
                gaps = [float(a - b) for a, b in zip(tile.amax(1), largest, strict=True) if b > -math.inf]
                if not gaps or max(gaps) + threshold <= 0:
                    continue
                weights = torch.exp2(tile)
                total = total + weights.sum(1, keepdim=True)
                acc = acc + weights @ call.v[0, 0, left : left + block_k].double()
            out[top : top + block_q] = torch.where(total > 0, acc / total.clamp(min=1e-300), 0.0)
        return out

    @pytest.mark.parametrize("threshold", [0.5, 2.0, 4.0, 50.0])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_rule(self, threshold: float, is_causal: bool) -> None:
        case = Case(500, 500, heads=1, k_heads=1, is_causal=is_causal, block_q=64, block_k=64, scale=0.2)
        call = case.call()
        # Keys of falling size, so that later blocks are far behind.
        call = call.replace(k=call.k * torch.linspace(2.0, 0.2, 500)[:, None])
        out = run("reference", call.replace(pv_threshold=torch.tensor([threshold])))
        expected = self.in_loops(call, threshold)
        assert relative_l1(out[0, 0], expected) < 1e-5
        changed = relative_l1(out, run("reference", call)) > 1e-4
        assert bool(changed) == (threshold < 10), "the case does not try the rule"

    def test_per_head_and_monotonous(self) -> None:
        call = Case(500, 500, heads=2, k_heads=2, block_q=64, block_k=64, scale=0.2).call()
        call = call.replace(k=call.k * torch.linspace(2.0, 0.2, 500)[:, None])
        exact = run("reference", call)
        mixed = run("reference", call.replace(pv_threshold=torch.tensor([50.0, 1.0])))
        assert torch.equal(mixed[:, 0], exact[:, 0])
        assert not torch.equal(mixed[:, 1], exact[:, 1])
        errors = [
            float(relative_l1(run("reference", call.replace(pv_threshold=torch.full((2,), t))), exact))
            for t in (1.0, 3.0, 6.0, 50.0)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] == 0

    def test_sdpa_leaves_it_out_and_is_exact(self) -> None:
        assert not backends.get("sdpa").skips_pv
        call = Case(300, 300).call()
        out = run("sdpa", call.replace(pv_threshold=torch.tensor([0.5, 0.5])))
        assert torch.equal(out, run("sdpa", call))

    @pytest.mark.parametrize(
        "case", [Case(129, 300), Case(200, 1000, is_causal=True), Case(300, 300, batch=2, padding="left")], ids=str
    )
    def test_cpu_skips_what_reference_skips(self, case: Case) -> None:
        call = case.call()
        falling = torch.linspace(2.0, 0.2, case.k_len)[:, None]  # later keys matter less and less
        call = call.replace(q=call.q * 3, k=call.k * falling)
        skipping = call.replace(pv_threshold=torch.tensor([1.0, 3.0]))
        exact, expected = run("reference", call), run("reference", skipping)
        assert relative_l1(exact, expected) > 1e-4  # something was really skipped
        assert relative_l1(run("cpu", skipping), expected) < 1e-5

    @pytest.mark.parametrize("name", ["cpu", "reference"])
    @pytest.mark.parametrize("threshold", [0.0, -1.0])
    def test_a_threshold_that_skips_everything_gives_zero(self, name: str, threshold: float) -> None:
        call = Case(200, 300, is_causal=True).call(pv_threshold=torch.tensor([threshold, 50.0]))
        out = run(name, call)
        assert (out[:, 0] == 0).all()
        assert relative_l1(out[:, 1], run("sdpa", call)[:, 1]) < 1e-5


def test_registry() -> None:
    assert set(ALL) <= set(backends.names())
    with pytest.raises(ValueError, match=r"'auto' or one of .*'cpu'.*, got 'quick'"):
        backends.get("quick")


def test_cases_are_awkward_enough() -> None:
    """No kind of case is dropped unseen."""
    assert {1, 63, 127, 129, 1000} <= {c.q_len for c in CASES} | {c.k_len for c in CASES}
    assert {64, 80, 96, 128, 16, 256} <= {c.dim for c in CASES}
    assert {1, 4, 8} <= {c.heads // c.k_heads for c in CASES}
    assert {"HND", "NHD", "strided"} == {c.layout for c in CASES}
    assert {HALF, BF16, F32} == {c.dtype for c in CASES}
    assert {(128, 128), (128, 64), (64, 128), (64, 64)} <= {(c.block_q, c.block_k) for c in CASES}
    assert {"left", "right", "holes", "one row empty"} <= {c.padding for c in CASES}
    assert any(c.q_len < c.k_len and c.is_causal for c in CASES)
    assert any(c.q_len > c.k_len for c in CASES)
    assert any(c.window for c in CASES)
    assert len({dataclasses.astuple(c) for c in CASES}) == len(CASES)
