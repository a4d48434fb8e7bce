"""The public calls: arguments, layouts, packing, fallbacks, gradients, statistics and `explain`."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import spas_attn
import spas_attn.plan as plan
from spas_attn import BlockMask, Call, backends, block_sparse_attention, explain, sparse_attention
from spas_attn.block_mask import visible_blocks
from spas_attn.metrics import relative_l1
from spas_attn.selectors import Dense, MeanSimilarity, Streaming, TopK

SPARSE = TopK(0.4, local=0)


@pytest.fixture(autouse=True)
def fresh_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts with no fallback counted, so that it sees its own first warning."""
    monkeypatch.setattr(plan, "_fallbacks", Counter())


@pytest.fixture(autouse=True)
def unexpected_warnings() -> Iterator[None]:
    """A fallback that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def qkv(
    q_len: int = 300, k_len: int = 300, heads: int = 4, k_heads: int = 2, dim: int = 32, batch: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, q_len), (k_heads, k_len), (k_heads, k_len)
    q, k, v = (torch.randn(batch, h, n, dim, generator=generator) for h, n in shapes)
    return 2 * q, k, v


def truth(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = None, **more: Any) -> Tensor:
    return backends.get("reference").run(Call.make(q, k, v, mask=mask, **more))


class TestResults:
    @pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "reference"])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_selects_and_computes(self, backend: str, is_causal: bool) -> None:
        q, k, v = qkv(300, 420)
        out, stats = sparse_attention(q, k, v, SPARSE, is_causal=is_causal, backend=backend, return_stats=True)
        mask = SPARSE.select(q, k, is_causal=is_causal)
        assert stats.backend == ("cpu" if backend == "auto" else backend)
        assert stats.mask is not None
        assert torch.equal(stats.mask.to_dense(), mask.to_dense())
        expected = truth(q, k, v, mask, is_causal=is_causal)
        assert relative_l1(out, expected) < 1e-5
        assert relative_l1(truth(q, k, v, is_causal=is_causal), expected) > 0.05
        given = block_sparse_attention(q, k, v, mask, is_causal=is_causal, backend=backend)
        assert torch.equal(out, given)

    @pytest.mark.parametrize("dim", [16, 24, 64, 80, 96, 128, 256])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_head_dims_and_dtypes(self, dim: int, dtype: torch.dtype) -> None:
        q, k, v = (x.to(dtype) for x in qkv(200, 200, dim=dim, batch=1))
        out = sparse_attention(q, k, v, SPARSE, is_causal=True)
        assert (out.dtype, out.shape, out.device) == (dtype, q.shape, q.device)
        expected = truth(q, k, v, SPARSE.select(q, k, is_causal=True), is_causal=True)
        assert relative_l1(out, expected) < (1e-5 if dtype == torch.float32 else 0.003)

    @pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
    def test_layouts_agree(self, backend: str) -> None:
        q, k, v = qkv()
        out, stats = sparse_attention(q, k, v, SPARSE, is_causal=True, backend=backend, return_stats=True)
        nhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        other = sparse_attention(*nhd, SPARSE, is_causal=True, backend=backend, layout="NHD")
        assert other.shape == nhd[0].shape
        assert relative_l1(other.transpose(1, 2), out) < 1e-6
        assert stats.mask is not None
        given = block_sparse_attention(*nhd, stats.mask, is_causal=True, backend=backend, layout="NHD")
        assert torch.equal(given, other)

    def test_scale_is_used_in_selection_and_softmax(self) -> None:
        q, k, v = qkv(700, 700)
        selector = MeanSimilarity(0.6, block_q=64, block_k=64)
        out, stats = sparse_attention(q, k, v, selector, scale=0.5, return_stats=True)
        mask = selector.select(q, k, is_causal=False, scale=0.5)
        assert stats.mask is not None
        assert torch.equal(stats.mask.to_dense(), mask.to_dense())
        assert not torch.equal(mask.to_dense(), selector.select(q, k, is_causal=False).to_dense())
        assert relative_l1(out, truth(q, k, v, mask, scale=0.5)) < 1e-5
        assert relative_l1(out, sparse_attention(q * 0.5 * 32**0.5, k, v, selector)) < 1e-5
        assert relative_l1(out, sparse_attention(q, k, v, selector)) > 0.1

    def test_window(self) -> None:
        q, k, v = qkv(300, 500)
        out = sparse_attention(q, k, v, Dense(), is_causal=True, window=50)
        i, j = torch.arange(300)[:, None] + 200, torch.arange(500)
        seen = (j <= i) & (j > i - 50)
        assert relative_l1(out, truth(q, k, v, attn_mask=seen.expand(2, 1, -1, -1))) < 1e-5
        out, stats = sparse_attention(
            q, k, v, Streaming(0, 50, sink=False), is_causal=True, window=50, return_stats=True
        )
        assert stats.backend == "cpu"
        assert relative_l1(out, truth(q, k, v, is_causal=True, window=50)) < 1e-5
        assert (stats.density == 1).all(), "density counts the blocks that the window leaves"

    @pytest.mark.parametrize("shape", ["2-D", "4-D"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_key_padding(self, shape: str, side: str) -> None:
        """Rows of a padded batch are what they are alone."""
        q, k, v = qkv(batch=1)
        pad = (0, 0, 128, 0) if side == "left" else (0, 0, 0, 128)
        padded = [torch.nn.functional.pad(x, pad, value=9.0) for x in (q, k, v)]
        valid = torch.nn.functional.pad(torch.ones(1, 300, dtype=torch.bool), pad[2:])
        rows = slice(128, None) if side == "left" else slice(None, 300)
        attn_mask = valid if shape == "2-D" else valid[:, None, None]
        for is_causal in (False, True):
            out = sparse_attention(*padded, MeanSimilarity(0.7), is_causal=is_causal, attn_mask=attn_mask)
            assert (
                relative_l1(out[:, :, rows], sparse_attention(q, k, v, MeanSimilarity(0.7), is_causal=is_causal)) < 1e-5
            )
            if side == "left" and is_causal:
                assert (out[:, :, :128] == 0).all()

    @pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("layout", ["HND", "NHD"])
    def test_packed_equals_one_by_one(self, backend: str, is_causal: bool, layout: Any) -> None:
        lengths = [(300, 300), (1, 129), (130, 257)]
        parts = [qkv(a, b, batch=1, seed=a) for a, b in lengths]
        q, k, v = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        if layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        cu_q, cu_k = torch.tensor([0, 300, 301, 431]).int(), torch.tensor([0, 300, 429, 686]).int()
        more: dict[str, Any] = {"is_causal": is_causal, "backend": backend, "layout": layout}
        out, stats = sparse_attention(
            q, k, v, SPARSE, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_stats=True, strict=True, **more
        )
        assert out.shape == q.shape
        assert stats.mask is not None
        assert torch.equal(out, block_sparse_attention(q, k, v, stats.mask, **more))
        heads_first = out.transpose(1, 2) if layout == "NHD" else out
        kept = possible = torch.zeros(())
        for part, (start, stop) in zip(parts, ((0, 300), (300, 301), (301, 431)), strict=True):
            alone, one = sparse_attention(*part, SPARSE, is_causal=is_causal, backend=backend, return_stats=True)
            assert torch.equal(heads_first[:, :, start:stop], alone)
            assert one.mask is not None
            grid = visible_blocks(part[0].shape[2], part[1].shape[2], 128, 128, is_causal=is_causal)
            kept, possible = kept + (one.mask.to_dense() & grid).sum((-1, -2)), possible + grid.sum()
        assert torch.allclose(stats.density, kept / possible)

    def test_dense_selector(self) -> None:
        q, k, v = qkv(200, 300)
        out, stats = sparse_attention(q, k, v, Dense(), is_causal=True, return_stats=True, strict=True)
        assert relative_l1(out, truth(q, k, v, is_causal=True)) < 1e-5
        assert (stats.backend, stats.mask) == ("sdpa", None)
        assert torch.equal(stats.density, torch.ones(2, 4))

    def test_density(self) -> None:
        q, k, v = qkv(700, 900)
        for is_causal in (False, True):
            _, stats = sparse_attention(q, k, v, SPARSE, is_causal=is_causal, return_stats=True)
            kept = SPARSE.select(q, k, is_causal=is_causal).to_dense()
            i, j = torch.arange(6)[:, None] * 128 + 127, torch.arange(8) * 128
            possible = (j <= i.clamp(max=699) + 200) if is_causal else torch.ones(6, 8, dtype=torch.bool)
            assert torch.allclose(stats.density, (kept & possible).sum((-1, -2)) / possible.sum())
            assert (stats.density < 0.7).all()

    def test_inputs_stay_and_results_repeat(self) -> None:
        q, k, v = qkv()
        before = [x.clone() for x in (q, k, v)]
        outs = [sparse_attention(q, k, v, MeanSimilarity(0.8, 0.3), is_causal=True) for _ in range(2)]
        assert torch.equal(*outs)
        assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))

    def test_head_by_head_thresholds(self) -> None:
        q, k, v = qkv(600, 600)
        thresholds = torch.tensor([0.1, 0.4, 0.7, 1.0])
        _, stats = sparse_attention(q, k, v, MeanSimilarity(thresholds), return_stats=True)
        assert (stats.density.diff(dim=1) > 0).all()
        assert (stats.density[:, 3] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "reference"])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """The inputs' dtype and ``precision`` say what is computed in, whatever surrounds the call."""
    q, k, v = qkv()
    selector = MeanSimilarity(0.6, 0.2)
    mask = selector.select(q, k, is_causal=True)
    for attend in (
        lambda: sparse_attention(q, k, v, selector, is_causal=True, backend=backend, strict=True),
        lambda: sparse_attention(q, k, v, Dense(), backend=backend, strict=True),
        lambda: block_sparse_attention(q, k, v, mask, is_causal=True, backend=backend, strict=True),
        lambda: block_sparse_attention(q, k, v, mask, is_causal=True, return_lse=True)[0],
    ):
        expected = attend()
        with torch.autocast("cpu", dtype=dtype):
            out = attend()
        assert out.dtype == torch.float32
        assert torch.equal(out, expected)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_keys_are_never_repeated(backend: str, is_causal: bool) -> None:
    q, k, v = qkv(32, 3000, heads=8, k_heads=1, dim=128, batch=1)
    repeated = 8 * 3000 * 128
    for selector in (Dense(), TopK(0.2)):
        with Largest() as seen:
            sparse_attention(q, k, v, selector, is_causal=is_causal, backend=backend)
        assert 0 < seen.elements < repeated / 2
    with Largest() as seen:
        k.repeat_interleave(8, 1)
    assert seen.elements >= repeated, "the measurement sees nothing"


class TestFallbacks:
    MASK = torch.rand(2, 1, 300, 300, generator=torch.Generator().manual_seed(0)) < 0.5

    @pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "reference"])
    @pytest.mark.parametrize("heads", [1, 4])
    def test_full_masks_run_dense_and_exact(self, backend: str, heads: int) -> None:
        q, k, v = qkv()
        mask = self.MASK.expand(2, heads, -1, -1)
        with pytest.warns(RuntimeWarning, match="full 4-D mask"):
            out, stats = sparse_attention(q, k, v, SPARSE, attn_mask=mask, backend=backend, return_stats=True)
        assert relative_l1(out, truth(q, k, v, attn_mask=mask)) < 1e-5
        assert (stats.backend, stats.mask) == ("sdpa", None)
        assert torch.equal(stats.density, torch.ones(2, 4))
        (reason,) = spas_attn.fallback_counts()
        assert "4-D" in reason
        with pytest.raises(RuntimeError, match="strict=True.*4-D"):
            sparse_attention(q, k, v, SPARSE, attn_mask=mask, backend=backend, strict=True)

    def test_counted_each_time_and_warned_once(self) -> None:
        q, k, v = qkv()
        with pytest.warns(RuntimeWarning, match="full 4-D mask"):
            sparse_attention(q, k, v, SPARSE, attn_mask=self.MASK)
        for _ in range(2):
            sparse_attention(q, k, v, SPARSE, attn_mask=self.MASK)  # a second warning would be an error
        assert list(spas_attn.fallback_counts().values()) == [3]
        with pytest.warns(RuntimeWarning, match="another reason"):
            spas_attn.count_fallback("another reason")
        counts = spas_attn.fallback_counts()
        assert counts["another reason"] == 1
        counts.clear()
        assert len(spas_attn.fallback_counts()) == 2, "the caller got the counter itself"

    def test_nothing_is_counted_without_a_fallback(self) -> None:
        q, k, v = qkv()
        for selector in (SPARSE, Dense()):
            sparse_attention(q, k, v, selector)
        sparse_attention(q, k, v, Dense(), attn_mask=self.MASK)
        assert spas_attn.fallback_counts() == {}

    def test_a_given_mask_meets_a_full_mask(self) -> None:
        q, k, v = qkv()
        mask = SPARSE.select(q, k, is_causal=False)
        with pytest.warns(RuntimeWarning, match="4-D"):
            out = block_sparse_attention(q, k, v, mask, attn_mask=self.MASK)
        assert relative_l1(out, truth(q, k, v, mask, attn_mask=self.MASK)) < 1e-5

    def test_a_declined_precision(self) -> None:
        q, k, v = qkv()
        with pytest.warns(RuntimeWarning, match="int8_bf16.*not available on a CPU"):
            out, stats = sparse_attention(q, k, v, SPARSE, precision="int8_bf16", return_stats=True)
        assert relative_l1(out, truth(q, k, v, stats.mask)) < 1e-5
        for backend in ("auto", "cpu", "sdpa", "reference"):
            for selector in (SPARSE, Dense()):
                with pytest.raises(RuntimeError, match=r"strict=True.*int8_bf16"):
                    sparse_attention(q, k, v, selector, precision="int8_bf16", backend=backend, strict=True)
        with pytest.warns(RuntimeWarning, match="int8_bf16.*computes exactly"):
            sparse_attention(q, k, v, Dense(), precision="int8_bf16", backend="sdpa")
        assert len(spas_attn.fallback_counts()) == 2

    def test_a_backend_that_cannot_run_here(self, registry: None) -> None:
        q, k, v = qkv()

        def never(call: Call) -> Tensor:
            raise AssertionError("an absent backend ran")

        absent = backends.Backend("absent", lambda: "no such machine", lambda call: None, never)
        backends.register(absent)
        with pytest.warns(RuntimeWarning, match="no such machine"):
            out = sparse_attention(q, k, v, SPARSE, backend="absent")
        assert relative_l1(out, truth(q, k, v, SPARSE.select(q, k, is_causal=False))) < 1e-5
        with pytest.raises(RuntimeError, match="no such machine"):
            sparse_attention(q, k, v, SPARSE, backend="absent", strict=True)
        assert explain(q, k, v, SPARSE, backend="absent").declined == {"absent": "no such machine"}


class TestGradients:
    @pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "reference"])
    def test_flow_and_equal_dense(self, backend: str) -> None:
        q, k, v = (x.requires_grad_() for x in qkv(200, 260))
        weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
        exact = (truth(q, k, v, is_causal=True) * weight).sum()
        expected = torch.autograd.grad(exact, (q, k, v))
        with pytest.warns(RuntimeWarning, match="gradients are asked for"):
            out, stats = sparse_attention(q, k, v, SPARSE, is_causal=True, backend=backend, return_stats=True)
        assert (stats.density == 1).all()
        for ours, theirs in zip(torch.autograd.grad((out * weight).sum(), (q, k, v)), expected, strict=True):
            assert relative_l1(ours, theirs) < 1e-4
        with pytest.raises(RuntimeError, match="strict=True.*gradients"):
            sparse_attention(q, k, v, SPARSE, is_causal=True, backend=backend, strict=True)

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_any_input_counts(self, which: int) -> None:
        inputs = qkv()
        inputs[which].requires_grad_()
        with pytest.raises(RuntimeError, match="gradients"):
            sparse_attention(*inputs, SPARSE, strict=True)
        with torch.no_grad():
            out, stats = sparse_attention(*inputs, SPARSE, strict=True, return_stats=True)
        assert stats.backend == "cpu"
        assert not out.requires_grad

    def test_through_a_given_mask(self) -> None:
        """A given BlockMask is part of what is computed: it is honoured, and differentiated through."""
        q, k, v = qkv(200, 260)
        mask = SPARSE.select(q, k, is_causal=True)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = block_sparse_attention(q, k, v, mask, is_causal=True, strict=True)
        expected = truth(q, k, v, mask, is_causal=True)
        assert relative_l1(out, expected) < 1e-5
        ours = torch.autograd.grad(out.square().sum(), (q, k, v))
        theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
        assert all(relative_l1(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.parametrize("backend", ["sdpa", "reference"])
    def test_rows_that_see_nothing_have_no_gradient(self, backend: str) -> None:
        q, k, v = (x.requires_grad_() for x in qkv())
        valid = torch.ones(2, 300, dtype=torch.bool)
        valid[1] = False
        out = sparse_attention(q, k, v, Dense(), attn_mask=valid, backend=backend)
        for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
            assert gradient.isfinite().all()
            assert (gradient[1] == 0).all()
            assert gradient[0].abs().sum() > 0


class TestExplain:
    def test_says_what_runs(self) -> None:
        q, k, v = qkv()
        for more in ({}, {"backend": "sdpa"}, {"backend": "reference"}, {"backend": "cpu"}, {"is_causal": True}):
            _, stats = sparse_attention(q, k, v, SPARSE, return_stats=True, **more)  # type: ignore[call-overload]
            said = explain(q, k, v, SPARSE, **more)  # type: ignore[arg-type]
            assert said.backend == stats.backend
            assert said.declined == {}
            assert f"backend {stats.backend}: " in str(said)
        assert "asked for by name" in explain(q, k, v, SPARSE, backend="cpu").reason
        assert "first choice on cpu" in explain(q, k, v, SPARSE).reason
        assert explain(q, k, v).backend == explain(q, k, v, Dense()).backend == "sdpa"

    def test_says_what_falls_back_and_counts_nothing(self) -> None:
        q, k, v = qkv()
        said = explain(q, k, v, SPARSE, attn_mask=TestFallbacks.MASK)
        assert said.backend == "sdpa"
        assert "4-D" in str(said.fallback)
        assert "4-D" in str(said)
        said = explain(q, k, v, SPARSE, precision="int8_bf16", backend="cpu")
        assert said.backend == "sdpa"
        assert "not cpu: precision 'int8_bf16'" in str(said)
        assert "gradients" in str(explain(q.requires_grad_(), k, v, SPARSE))
        assert spas_attn.fallback_counts() == {}

    def test_says_that_pv_skip_is_left_out(self) -> None:
        q, k, v = qkv()
        assert "leaves PV skip out" in str(explain(q, k, v, SPARSE, pv_threshold=4.0, backend="sdpa"))
        for backend in ("auto", "cpu", "reference"):
            assert "PV skip" not in str(explain(q, k, v, SPARSE, pv_threshold=4.0, backend=backend))
        assert "PV skip" not in str(explain(q, k, v, SPARSE, backend="sdpa"))
        sparse_attention(q, k, v, SPARSE, pv_threshold=4.0, backend="sdpa", strict=True)  # and it is no fallback
        assert spas_attn.fallback_counts() == {}

    def test_sees_what_the_call_will_bring(self, registry: None) -> None:
        q, k, v = qkv()
        seen = []

        def declines(call: Call) -> str | None:
            seen.append((call.blocks, call.scale))
            return "it takes no block mask" if call.blocks is not None else None

        def left_out(call: Call) -> str:
            assert call.blocks is not None
            return f"{call.blocks[0]} does not fit"

        picky = dataclasses.replace(backends.get("cpu"), name="picky", declines=declines)
        tight = dataclasses.replace(backends.get("cpu"), name="tight", pv_skip_left_out=left_out)
        for backend in (picky, tight):
            backends.register(backend)
        selector = TopK(0.5, block_q=64, block_k=128)
        assert explain(q, k, v, selector, backend="picky", scale=0.5).backend == "sdpa"
        assert explain(q, k, v, backend="picky").backend == "picky"
        assert seen == [((64, 128), 0.5), (None, 32**-0.5)]
        assert explain(q, k, v, selector, backend="tight", pv_threshold=4.0).pv_skip_left_out == "64 does not fit"
        assert explain(q, k, v, selector, backend="tight").pv_skip_left_out is None
        cu = torch.tensor([0, 100, 300], dtype=torch.int32)
        assert explain(q[:1], k[:1], v[:1], selector, cu_seqlens_q=cu, cu_seqlens_k=cu).backend == "cpu"

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_pv_threshold_reaches_the_backend(self, backend: str) -> None:
        q, k, v = qkv()
        k = k * torch.linspace(2.0, 0.1, 300)[:, None]  # later keys fall behind
        off, on = (sparse_attention(q, k, v, TopK(1.0), pv_threshold=t, backend=backend) for t in (50.0, 0.01))
        assert not torch.equal(off, on)
        per_head = torch.tensor([50.0, 0.01, 50.0, 0.01])
        mixed = sparse_attention(q, k, v, TopK(1.0), pv_threshold=per_head, backend=backend)
        assert torch.equal(mixed[:, ::2], off[:, ::2])
        assert torch.equal(mixed[:, 1::2], on[:, 1::2])


Q, K, V = qkv(100, 100)
CU = torch.tensor([0, 60, 100], dtype=torch.int32)
MASK = SPARSE.select(Q, K, is_causal=False)


def call(**changes: Any) -> Any:
    return sparse_attention(**{"q": Q, "k": K, "v": V, "selector": SPARSE, **changes})


def packed(**changes: Any) -> Any:
    inputs = {"q": Q[:1], "k": K[:1], "v": V[:1], "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    return call(**{**inputs, **changes})


def given(**changes: Any) -> Any:
    return block_sparse_attention(**{"q": Q, "k": K, "v": V, "mask": MASK, **changes})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: call(q=[1]), TypeError, "q must be a tensor, got list"),
        (lambda: call(k=K[0]), ValueError, r"k must have 4 dimensions.*\(2, 100, 32\)"),
        (lambda: call(q=Q.double()), TypeError, "q must be float16, bfloat16 or float32, got torch.float64"),
        (lambda: call(v=V.half()), ValueError, "v must have q's dtype and device .*float32.*got torch.float16"),
        (lambda: call(k=K.to("meta")), ValueError, "k must have q's dtype and device .*cpu.*got .*meta"),
        (lambda: call(v=V[:, :, :50]), ValueError, r"\(2, 2, 100, 32\).*\(2, 2, 50, 32\)"),
        (lambda: call(k=K[:1], v=V[:1]), ValueError, r"\(2, 4, 100, 32\).*\(1, 2, 100, 32\)"),
        (lambda: call(k=K[..., :16], v=V[..., :16]), ValueError, r"\(2, 4, 100, 32\).*\(2, 2, 100, 16\)"),
        (lambda: call(q=Q[:, :3]), ValueError, "multiple of KV heads, got 3 and 2"),
        (lambda: call(q=Q[:, :, :0]), ValueError, r"must not be empty, got \(2, 4, 0, 32\)"),
        (lambda: call(k=K[:, :, :0], v=V[:, :, :0]), ValueError, "must not be empty"),
        (lambda: call(**dict.fromkeys("qkv", Q[..., :8])), ValueError, "head dim must be 16 to 256, got 8"),
        (
            lambda: call(**dict.fromkeys("qkv", torch.zeros(1, 1, 5, 300))),
            ValueError,
            "head dim must be 16 to 256, got 300",
        ),
        (lambda: call(k=K[:, :, :60], v=V[:, :, :60], is_causal=True), ValueError, "Lq <= Lk.*Lq=100, Lk=60"),
        (lambda: call(selector=0.5), TypeError, "selector must be a Selector, got float"),
        (lambda: call(layout="BHND"), ValueError, "layout must be one of .*'HND', 'NHD'.*got 'BHND'"),
        (lambda: call(precision="fp4"), ValueError, "precision must be one of .*'native'.*got 'fp4'"),
        (lambda: call(backend="quick"), ValueError, "backend must be 'auto' or one of .*'cpu'.*got 'quick'"),
        (lambda: call(scale="big"), TypeError, "scale must be a number or None, got str"),
        (lambda: call(scale=float("nan")), ValueError, "scale must be finite and above 0, got nan"),
        *[
            (lambda scale=scale: call(scale=scale), ValueError, "scale must be finite and above 0, got")
            for scale in (0, 0.0, -0.1, float("inf"))
        ],
        (lambda: call(scale=True), TypeError, "scale must be a number or None, got bool"),
        (lambda: call(window=True, is_causal=True), ValueError, "window must be a positive number .*got True"),
        (lambda: call(window=0, is_causal=True), ValueError, "window must be a positive number .*got 0"),
        (lambda: call(window=2.5, is_causal=True), ValueError, "window must be a positive number .*got 2.5"),
        (lambda: call(window=64), ValueError, "window needs is_causal=True"),
        (lambda: call(pv_threshold=torch.ones(3)), ValueError, r"pv_threshold must be .*\[4\].*\(3,\)"),
        (lambda: call(pv_threshold="high"), TypeError, "pv_threshold must be a number or a tensor .*, got str"),
        (lambda: call(pv_threshold=float("nan")), ValueError, r"pv_threshold must be in \(0, inf\], got nan"),
        *[
            (lambda value=value: call(pv_threshold=value), ValueError, r"pv_threshold must be in \(0, inf\], got")
            for bad in (0.0, -1.0, float("nan"))
            for value in (bad, torch.tensor([5.0, bad, 5.0, 5.0]), torch.tensor(bad))
        ],
        (lambda: call(pv_threshold=torch.ones(1, 4)), ValueError, r"pv_threshold must be .*\(1, 4\)"),
        (lambda: call(pv_threshold=torch.ones(4).bool()), TypeError, "pv_threshold must be a tensor of numbers"),
        (lambda: call(error_bound=0.0), ValueError, "error_bound must be a number above 0 .*got 0.0"),
        (lambda: call(error_bound=float("nan")), ValueError, "error_bound must be a number above 0 .*got nan"),
        (lambda: call(expected_density=float("nan")), ValueError, r"expected_density must be in \[0, 1\], got nan"),
        (lambda: call(expected_density="low"), TypeError, "expected_density must be a number or None, got str"),
        (lambda: call(expected_density=7.0), ValueError, r"expected_density must be in \[0, 1\], got 7"),
        (
            lambda: call(selector=MeanSimilarity(float("nan"))),
            ValueError,
            r"cdf_threshold must be in \[0, 1\], got nan",
        ),
        (lambda: call(selector=MeanSimilarity(1.5)), ValueError, r"cdf_threshold must be in \[0, 1\], got 1.5"),
        (lambda: call(attn_mask=[True]), TypeError, "attn_mask must be a boolean tensor or None, got list"),
        (lambda: packed(cu_seqlens_q=[0, 100]), TypeError, "cu_seqlens_q must be an int32 tensor.*got list"),
        (lambda: explain(Q, K, V, 0.5), TypeError, "selector must be a Selector or None, got float"),  # type: ignore
        (lambda: call(attn_mask=torch.ones(2, 100)), TypeError, "attn_mask must be boolean.*float32"),
        (lambda: call(attn_mask=torch.ones(2, 99).bool()), ValueError, r"attn_mask must be .*Lk=100, got \(2, 99\)"),
        (lambda: call(attn_mask=torch.ones(2, 3, 100, 100).bool()), ValueError, r"attn_mask.*got \(2, 3, 100, 100\)"),
        (
            lambda: call(attn_mask=torch.ones(2, 100, device="meta").bool()),
            ValueError,
            "attn_mask.*device cpu, got meta",
        ),
        (lambda: packed(cu_seqlens_k=None), ValueError, "cu_seqlens_q and cu_seqlens_k go together"),
        (lambda: packed(cu_seqlens_q=CU.long()), ValueError, r"cu_seqlens_q must be int32 \[n \+ 1\], got torch.int64"),
        (lambda: packed(cu_seqlens_k=CU[:2]), ValueError, r"cu_seqlens_k must rise from 0 to .*100, got \[0, 60\]"),
        (
            lambda: packed(cu_seqlens_q=torch.tensor([0, 60, 60, 100]).int()),
            ValueError,
            r"cu_seqlens_q must rise .*\[0, 60, 60, 100\]",
        ),
        (lambda: packed(cu_seqlens_q=torch.tensor([0, 100]).int()), ValueError, "one length, got 2 and 3"),
        (
            lambda: packed(cu_seqlens_q=torch.tensor([0, 70, 100]).int(), is_causal=True),
            ValueError,
            "Lq <= Lk.*Lq=70, Lk=60",
        ),
        (lambda: call(cu_seqlens_q=CU, cu_seqlens_k=CU), ValueError, "batch of 1, got 2"),
        (lambda: packed(attn_mask=torch.ones(1, 100).bool()), ValueError, "attn_mask cannot be combined with packed"),
        (lambda: given(mask=torch.ones(2)), TypeError, "mask must be a BlockMask, got Tensor"),
        (lambda: given(q=Q[:, :, :50]), ValueError, "lengths 100 x 100, but q and k have 50 x 100"),
        (lambda: given(q=Q[:, :2]), ValueError, r"mask has .*\[2, 4\], but q has \[2, 2\]"),
        (lambda: given(mask=MASK.to("meta")), ValueError, "mask is on meta, but q is on cpu"),
        (lambda: explain(Q, K, V[:, :, :50]), ValueError, r"\(2, 2, 50, 32\)"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    """Every refusal names the argument, what came and what is allowed."""
    with pytest.raises(error, match=message):
        make()


def test_good_arguments_pass() -> None:
    """Guards the test above: the calls that it spoils are good."""
    for out in (call(), packed(), given(), packed(is_causal=True)):
        assert out.isfinite().all()


def test_causal_and_window_bounds_are_inclusive() -> None:
    assert call(is_causal=True, window=1).isfinite().all()
    out = sparse_attention(Q, K, V, Dense(), is_causal=True, window=1)
    assert relative_l1(out, V.repeat_interleave(2, 1)) < 1e-6, "with a window of one key, a query sees its own value"


def test_public_names() -> None:
    assert set(spas_attn.__all__) >= {
        "AttentionStats",
        "BlockMask",
        "Call",
        "Plan",
        "block_sparse_attention",
        "explain",
        "fallback_counts",
        "metrics",
        "sparse_attention",
    }
    assert all(hasattr(spas_attn, name) for name in spas_attn.__all__)
