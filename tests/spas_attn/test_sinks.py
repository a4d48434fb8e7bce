"""Attention sinks: a logit per head in the softmax's denominator, against float64 and on every backend that can."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import spas_attn.plan as plan
from spas_attn import BlockMask, Call, backends, block_sparse_attention, explain, sparse_attention
from spas_attn.backends import Backend
from spas_attn.selectors import Dense, TopK

SINKS = torch.tensor([-3.0, 0.5, 2.0, 9.0])
SPARSE = TopK(0.4, local=0, block_q=64, block_k=64)


@pytest.fixture(autouse=True)
def fresh_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees its own first warning."""
    monkeypatch.setattr(plan, "_fallbacks", Counter())


def qkv(length: int = 200, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, h, length, 32, generator=generator) for h in (4, 2, 2))
    return 2 * q, k, v


def truth(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: BlockMask | None = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys and one more column, causal, in float64; and the log of its denominator."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None]
    visible = visible if seen is None else visible & seen[:, None, None]
    visible = visible if mask is None else visible & mask.token_mask()
    scores = scores.masked_fill(~visible, -torch.inf)
    scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v, scores.logsumexp(-1)


def usable(backend: str) -> bool:
    return backend == "auto" or backends.get(backend).missing() is None


@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "reference", "triton"])
@pytest.mark.parametrize("padding", [False, True])
def test_against_float64(backend: str, padding: bool) -> None:
    if not usable(backend):
        pytest.skip("no such backend here")
    length = 70 if backend == "triton" else 200  # interpreted
    q, k, v = qkv(length)
    seen = None
    if padding:
        seen = torch.ones(2, length, dtype=torch.bool)
        seen[0, : length // 2] = False
    options: Any = {"is_causal": True, "sinks": SINKS, "backend": backend, "attn_mask": seen}
    dense = sparse_attention(q, k, v, Dense(), **options)
    torch.testing.assert_close(dense, truth(q, k, v, SINKS, seen=seen)[0].float(), atol=1e-5, rtol=1e-4)
    assert (dense - sparse_attention(q, k, v, Dense(), **(options | {"sinks": None}))).abs().max() > 0.1
    out, stats = sparse_attention(q, k, v, SPARSE, return_stats=True, strict=True, **options)
    expected, lse = truth(q, k, v, SINKS, stats.mask, seen)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)
    given, told = block_sparse_attention(q, k, v, stats.mask, return_lse=True, **options)
    torch.testing.assert_close(given, expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(told, lse.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference", "triton"])
def test_every_backend_that_can_tells_its_lse(backend: str) -> None:
    if not usable(backend):
        pytest.skip("no such backend here")
    q, k, v = qkv(70, 1)
    mask = SPARSE.select(q, k, is_causal=True)
    nothing = torch.full((4,), -torch.inf)
    out, lse = block_sparse_attention(q, k, v, mask, is_causal=True, return_lse=True, backend=backend)
    expected, expected_lse = truth(q, k, v, nothing, mask)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse.float(), atol=1e-5, rtol=1e-4)


def test_partial_results_merge_when_one_of_them_takes_the_sinks() -> None:
    q, k, v = qkv(192)
    near = torch.eye(3, dtype=torch.bool).expand(2, 4, 3, 3)
    halves = [
        block_sparse_attention(
            q, k, v, BlockMask.from_dense(kept, 192, 192, 64, 64), is_causal=True, return_lse=True, sinks=sinks
        )
        for kept, sinks in ((near, SINKS), (~near, None))
    ]
    total = torch.logaddexp(halves[0][1], halves[1][1])
    out = sum(part * (lse - total).exp()[..., None] for part, lse in halves)
    expected, lse = truth(q, k, v, SINKS)
    torch.testing.assert_close(out, expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(total, lse.float(), atol=1e-5, rtol=1e-4)


def test_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(100))
    sinks = SINKS.clone().requires_grad_()
    seen = torch.ones(2, 100, dtype=torch.bool)
    seen[0, :20] = False  # the first queries see nothing: no gradient may be NaN
    with pytest.warns(RuntimeWarning, match="gradients"):
        out = sparse_attention(q, k, v, SPARSE, is_causal=True, sinks=sinks, attn_mask=seen)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
    expected = truth(q, k, v, sinks, seen=seen)[0]
    for mine, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v, sinks)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    q, k, v = qkv(100)
    sparse_attention(q, k, v, SPARSE, is_causal=True, sinks=sinks).sum().backward()  # of the sinks alone
    assert sinks.grad is not None and (sinks.grad != 0).all()


def test_packed_sequences() -> None:
    q, k, v = qkv(330, 1)
    cu = torch.tensor([0, 129, 130, 330]).int()
    out = sparse_attention(q, k, v, SPARSE, is_causal=True, sinks=SINKS, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for a, b in ((0, 129), (129, 130), (130, 330)):
        part = [x[:, :, a:b] for x in (q, k, v)]
        alone = sparse_attention(*part, SPARSE, is_causal=True, sinks=SINKS)
        torch.testing.assert_close(out[:, :, a:b], alone, atol=1e-5, rtol=1e-4)


def test_who_cannot_declines(registry: None) -> None:
    backends.register(Backend("mute", lambda: None, lambda call: None, lambda call: call.q))
    q, k, v = qkv()
    why = "attention sinks need the log-sum-exp"
    assert why in (explain(q, k, v, SPARSE, backend="mute", sinks=SINKS).fallback or "")
    assert explain(q, k, v, SPARSE, backend="mute").fallback is None
    with pytest.raises(RuntimeError, match=why):
        sparse_attention(q, k, v, SPARSE, backend="mute", sinks=SINKS, strict=True)
    shown = explain(q, k, v, SPARSE, sinks=SINKS, pv_threshold=5.0)
    assert "attention sinks" in (shown.pv_skip_left_out or "")


def test_compiles_whole() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return sparse_attention(q, k, v, SPARSE, is_causal=True, sinks=sinks)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*qkv(), SINKS), run(*qkv(), SINKS))


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (SINKS[:3], ValueError, r"sinks must be \[Hq\] = \[4\], got \(3,\)"),
        (SINKS.long(), TypeError, "sinks must be floating-point logits, got torch.int64"),
        (1.0, TypeError, "sinks must be a tensor .*got float"),
    ],
)
def test_bad_sinks(sinks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Call.make(*qkv(), sinks=sinks)


def test_sinks_come_in_any_precision() -> None:
    assert Call.make(*qkv(), sinks=SINKS.bfloat16()).sinks.dtype == torch.float32  # type: ignore[union-attr]
