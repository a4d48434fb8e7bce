"""Packed causal self-attention as one call: equal to the sequences one by one, and no length is read on the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from every_selector import SELECTORS, SIZES, every
from torch import Tensor

import spas_attn.plan as plan
from spas_attn import Call, attend, backends, block_sparse_attention, checks, explain, sparse_attention
from spas_attn.backends import Backend
from spas_attn.block_mask import visible_blocks
from spas_attn.packing import aligned_length, layout
from spas_attn.selectors import Dense, FlexPrefill, MeanSimilarity, MInference, Selector, Tokens, TopK

LENGTHS = (300, 1, 128, 129, 64, 200)
SPARSE = TopK(0.3, local=0, sink=False, **SIZES)


@pytest.fixture(autouse=True)
def fresh_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees its own first warning."""
    monkeypatch.setattr(plan, "_fallbacks", Counter())


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


CU = bounds(*LENGTHS)


def qkv(total: int = sum(LENGTHS), seed: int = 0, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, total, 32, generator=generator, **options) for h in (4, 2, 2))
    return 2 * q, k, v


def packed(q: Tensor, k: Tensor, v: Tensor, selector: Selector, cu: Tensor = CU, **options: Any) -> Any:
    return sparse_attention(q, k, v, selector, is_causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, **options)


def documents(cu: Tensor = CU) -> list[slice]:
    ends = cu.tolist()
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def one_launch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the launches of one sequence; stays empty when everything runs as one call."""
    launches: list[int] = []
    alone = attend._attend_one
    monkeypatch.setattr(attend, "_attend_one", lambda call, *rest: launches.append(call.q_len) or alone(call, *rest))
    return launches


@pytest.mark.parametrize("window", [None, 100])
@every
def test_equals_one_by_one(selector: Selector, window: int | None) -> None:
    q, k, v = qkv()
    out, stats = packed(q, k, v, selector, return_stats=True, window=window)
    kept = possible = torch.zeros(())
    for at, mask in zip(documents(), stats.mask.split(), strict=True):
        part = [x[:, :, at] for x in (q, k, v)]
        alone, one = sparse_attention(*part, selector, is_causal=True, window=window, return_stats=True)
        torch.testing.assert_close(out[:, :, at], alone, atol=2e-5, rtol=1e-4)
        n = at.stop - at.start
        grid = visible_blocks(n, n, selector.block_q, selector.block_k, is_causal=True, window=window)
        expected = grid.expand_as(mask.to_dense()) if one.mask is None else one.mask.to_dense() & grid
        assert torch.equal(mask.to_dense() & grid, expected)
        kept, possible = kept + expected.sum((-1, -2)), possible + grid.sum()
    torch.testing.assert_close(stats.density, kept / possible)
    given = selector.select(q, k, is_causal=True, window=window, cu_seqlens_q=CU, cu_seqlens_k=CU)
    torch.testing.assert_close(given.density(True, window), stats.density)
    again = block_sparse_attention(q, k, v, given, is_causal=True, window=window)
    torch.testing.assert_close(again, out, atol=2e-5, rtol=1e-4)


@every
def test_who_runs_as_one_call(selector: Selector, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = one_launch(monkeypatch)
    packed(*qkv(), selector)
    assert launches == ([] if selector.fits_packing else list(LENGTHS))


def test_rules_about_the_whole_sequence_do_not_fit() -> None:
    fitting = {name for name, selector in SELECTORS.items() if selector.fits_packing}
    assert fitting >= {"MeanSimilarity", "PeakMass", "TopK", "XAttention", "Streaming", "Dense", "Streaming | TopK"}
    for selector in (FlexPrefill(), MInference(), Tokens(((0, 1),)), SPARSE | Tokens(((0, 1),), **SIZES)):
        assert not selector.fits_packing
    assert not MeanSimilarity(sim_threshold=0.5).fits_packing
    assert not SELECTORS["a user's own"].fits_packing, "nothing is known of a rule that does not say so"


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton", "sdpa", "reference"])
@pytest.mark.parametrize("selector", [SPARSE, Dense()], ids=["sparse", "dense"])
def test_backends(backend: str, selector: Selector, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := backends.get("triton").missing():
        pytest.skip(why) if backend == "triton" else None
    cu = bounds(130, 1, 30)
    q, k, v = qkv(161)
    launches = one_launch(monkeypatch)
    out = packed(q, k, v, selector, cu, backend=backend)
    assert bool(launches) == (backend in ("sdpa", "reference")), "dense backends would compute all pairs of sequences"
    for at in documents(cu):
        expected = sparse_attention(*(x[:, :, at] for x in (q, k, v)), selector, is_causal=True, backend="reference")
        torch.testing.assert_close(out[:, :, at], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("selector", [s for s in SELECTORS.values() if s.fits_packing], ids=lambda s: type(s).__name__)
def test_neighbours_change_nothing(selector: Selector, poison: float) -> None:
    clean = qkv()
    at = documents()[3]
    spoilt = [x.clone() for x in clean]
    for x in spoilt:
        x[:, :, at] = poison
    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[at] = False
    before, after = packed(*clean, selector), packed(*spoilt, selector)
    assert torch.equal(before[:, :, others], after[:, :, others])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "selector",
    [SELECTORS["MeanSimilarity"], SELECTORS["TopK"], TopK(0.3, local=0, block_q=64, block_k=128), SPARSE],
    ids=["MeanSimilarity", "TopK, 128 x 64", "TopK, 64 x 128", "TopK, 64 x 64"],
)
def test_kernels_select_the_same(selector: Selector, window: int | None) -> None:
    pytest.importorskip("triton")
    if backends.get("triton").missing():
        pytest.skip("no interpreter")
    from spas_attn.fused import run_fused
    from spas_attn.select import parts_of

    cu = bounds(130, 1, 128, 70)
    q, k, v = qkv(329)
    q[:, :, 131:259] = k[:, :, 131:259] = 1e20  # another sequence
    call = Call.make(q, k, v, is_causal=True, window=window, cu_seqlens_q=cu, cu_seqlens_k=cu).aligned()[0]
    mask, _ = run_fused(parts_of(selector, call), call, False)
    assert torch.equal(mask.to_dense(), selector.mask_of(call).to_dense())


def test_gradients_run_dense() -> None:
    q, k, v = (x.double().float().requires_grad_() for x in qkv())
    with pytest.warns(RuntimeWarning, match="gradients are asked for"):
        out = packed(q, k, v, SPARSE)
    out.square().sum().backward()
    for at in documents():
        mine = [x[:, :, at].detach().requires_grad_() for x in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(*mine, is_causal=True, enable_gqa=True)
        alone.square().sum().backward()
        torch.testing.assert_close(out[:, :, at], alone, atol=1e-5, rtol=1e-4)
        for x, part in zip((q, k, v), mine, strict=True):
            torch.testing.assert_close(x.grad[:, :, at], part.grad, atol=1e-4, rtol=1e-3)


class Read(Exception):
    """A value was read on the host."""


def refuse(*args: object, **options: object) -> Any:
    raise Read


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: bounds are not there to be read, and whatever reads a tensor's values fails."""
    monkeypatch.setattr(checks, "is_readable", lambda cu: False)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique"):
        monkeypatch.setattr(Tensor, name, refuse)


@every
def test_nothing_is_read_on_the_host(selector: Selector, monkeypatch: pytest.MonkeyPatch, registry: None) -> None:
    inputs = qkv()
    backends.register(Backend("probe", lambda: None, lambda call: None, lambda call: call.v.repeat(1, 2, 1, 1)))
    with monkeypatch.context() as patched:
        forbid_reading(patched)
        if not selector.fits_packing:
            with pytest.raises(Read):
                packed(*inputs, selector, backend="probe")
            return
        out, stats = packed(*inputs, selector, backend="probe", return_stats=True)
        density = stats.density
    assert torch.equal(out, inputs[2].repeat(1, 2, 1, 1)), "rows come back where they were"
    assert (density > 0).all()


def test_compiles_whole() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return packed(q, k, v, SPARSE, cu)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for cu in (CU, bounds(1, 299, 100, 200, 22, 200)):
        assert torch.equal(compiled(*qkv(), cu), run(*qkv(), cu))


def test_the_aligned_layout() -> None:
    at = layout(CU, sum(LENGTHS))
    starts = [0, 384, 512, 640, 896, 1024]
    assert len(at.source) == aligned_length(sum(LENGTHS), len(LENGTHS)) >= 1024 + 256
    expected = torch.full((len(at.source),), -1)
    for start, part in zip(starts, documents(), strict=True):
        expected[start : start + part.stop - part.start] = torch.arange(part.start, part.stop)
    assert torch.equal(at.valid, expected >= 0)
    assert torch.equal(at.source[at.valid], torch.arange(sum(LENGTHS)))
    assert torch.equal(at.source[at.place], torch.arange(sum(LENGTHS)))
    owner = torch.bucketize(at.source, CU, right=True) - 1
    first = torch.tensor(starts)[owner].masked_fill(torch.arange(len(owner)) >= 1280, -1)
    rows = at.document_start.long().repeat_interleave(128)
    assert torch.equal(rows[:1280], first[:1280]), "gaps hold tokens of their own sequence"
    assert torch.equal(rows[1280:], torch.arange(len(rows))[1280:] // 128 * 128)
    call = Call.make(*qkv(), is_causal=True, cu_seqlens_q=CU, cu_seqlens_k=CU.clone())
    assert call.is_self_packed, "equal bounds that can be read are one"
    aligned, place = call.aligned()
    seen = aligned.token_mask(0, aligned.q_len)[0, 0][place][:, place]
    ids = torch.bucketize(torch.arange(sum(LENGTHS)), CU, right=True)
    assert torch.equal(seen, (ids[:, None] == ids) & torch.ones_like(seen).tril())


@pytest.mark.parametrize("cu", [bounds(300, 0, 522), bounds(300, 100), torch.tensor([1, 822]).int()])
def test_bad_bounds(cu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to the total length 822"):
        packed(*qkv(), SPARSE, cu)
    monkeypatch.setattr(checks, "is_readable", lambda cu: False)
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the total length 822"):
        packed(*qkv(), SPARSE, cu)


def test_explain_speaks_of_the_one_call() -> None:
    q, k, v = qkv()
    shown = explain(q, k, v, SPARSE, is_causal=True, cu_seqlens_q=CU, cu_seqlens_k=CU)
    assert (shown.backend, shown.selects) == ("cpu", True)
