"""Backend `flashinfer`, with a stand-in for the package: what it is called with, and what it is spared."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_up_gpu import FakeGpu, on_gpu
from torch import Tensor

from spas_attn import Call, backends
from spas_attn.backends import flashinfer, sdpa
from spas_attn.prefill import Full_prefill


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the stand-in, which is installed, was called with. As the package does, it ignores `causal` beside a mask,
    and gives NaN for a query that sees nothing.
    """
    calls: list[dict[str, Any]] = []

    def prefill(
        q: Tensor, k: Tensor, v: Tensor, *, custom_mask: Tensor | None, causal: bool, kv_layout: str, sm_scale: float
    ) -> Tensor:
        calls.append({"custom_mask": custom_mask, "causal": causal})
        assert kv_layout == "NHD" and all(x.is_contiguous() for x in (q, k, v))
        group, offset = q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
        seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(offset) if causal else custom_mask
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.repeat_interleave(group, 1).float()) * sm_scale
        probs = (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
        return torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(group, 1).float()).to(q.dtype)

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(single_prefill_with_kv_cache=prefill))
    return calls


def call(**options: Any) -> Call:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 60, 64, generator=generator).half()
    k, v = torch.randn(2, 2, 2, 100, 64, generator=generator).half()
    return Call.make(q, k, v, **options)


PADDING = torch.ones(2, 100, dtype=torch.bool)
PADDING[1, :70] = False  # the first 30 queries of the second prompt see nothing
FULL = torch.rand(2, 1, 60, 100, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({"is_causal": True}, False),
        ({}, False),
        ({"is_causal": True, "scale": 0.3}, False),
        ({"is_causal": True, "window": 20}, True),
        ({"is_causal": True, "attn_mask": PADDING}, True),
        ({"attn_mask": FULL}, True),
        ({"is_causal": True, "attn_mask": FULL[:1]}, True),
    ],
)
def test_equals_sdpa(options: dict[str, Any], masked: bool, called: list[dict[str, Any]]) -> None:
    made = call(**options)
    torch.testing.assert_close(flashinfer.run(made), sdpa.run(made), atol=2e-3, rtol=2e-3)
    assert len(called) == 2  # one sequence at a time
    for arguments in called:
        assert (arguments["custom_mask"] is not None) == masked
        assert arguments["causal"] == (made.is_causal and not masked)


def test_what_it_declines(gpu_like: FakeGpu) -> None:
    backend = backends.get("flashinfer")
    gpu_like.capability = (9, 0)
    declines = backend.declines
    assert declines(on_gpu(call(is_causal=True))) is None
    assert "on CUDA tensors" in str(declines(call()))
    assert "no block mask" in str(declines(on_gpu(call().replace(blocks=(128, 128)))))
    assert "one mask for all heads" in str(declines(on_gpu(call(attn_mask=FULL.expand(2, 4, 60, 100)))))
    assert "fp16 and bf16" in str(declines(on_gpu(call().replace(q=torch.zeros(1, 2, 60, 64)))))
    assert "head dims" in str(declines(on_gpu(call().replace(q=torch.zeros(1, 2, 60, 80).half()))))
    assert "int8" in str(declines(on_gpu(call(precision="int8_bf16"))))
    gpu_like.capability = (7, 5)
    assert "this GPU has 7.5" in str(declines(on_gpu(call())))


def test_full_prefill_by_name() -> None:
    """Where the package is not installed, or not here: refused, not replaced."""
    made = call()
    with pytest.raises(RuntimeError, match="flashinfer"):
        Full_prefill(made.q, made.k, made.v, backend="flashinfer")
