"""Backend `cudnn`: what it is called with (a stand-in for the package), and what it refuses."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BF16, F32, HALF, Case
from made_up_gpu import FakeGpu, on_gpu
from torch import Tensor

from spas_attn import BlockMask, backends
from spas_attn.backends import cudnn, reference
from spas_attn.call import Call
from spas_attn.metrics import relative_l1

SERVED = [
    Case(256, 384, dtype=BF16, block_q=64, block_k=64),
    Case(256, 256, dtype=HALF, dim=128, heads=4, k_heads=2),
    Case(128, 512, dtype=BF16, dim=96, batch=2),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module that computes what its lists say, as the package documents them; yields what it got."""
    seen: list[dict[str, Any]] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, q2k_block_nums: Tensor, sparse_block_size: int,
        softmax_scale: float,
    ) -> dict[str, Tensor]:  # fmt: skip
        seen.append({"block": sparse_block_size, "counts": q2k_block_nums})
        for x in (index, q2k_block_nums):
            assert x.dtype == torch.int32
            assert x.is_contiguous()
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        mask = BlockMask(q2k_block_nums, index, sparse_block_size, sparse_block_size, q.shape[2], k.shape[2])
        out, lse = reference.run_with_lse(Call(q, k, v, scale=softmax_scale, mask=mask))
        return {"o_tensor": out, "lse_tensor": lse}

    monkeypatch.setattr(cudnn, "_module", lambda: SimpleNamespace(block_sparse_attention_forward=forward))
    return seen


@pytest.mark.parametrize("case", SERVED, ids=str)
def test_equals_reference(case: Case, calls: list[dict[str, Any]]) -> None:
    call = case.call()
    out, lse = backends.get("cudnn").compute_with_lse(call)
    wanted, wanted_lse = reference.run_with_lse(call)
    assert (out.shape, out.dtype) == (call.q.shape, call.q.dtype)
    assert relative_l1(out, wanted) < 0.003
    torch.testing.assert_close(lse, wanted_lse)
    assert calls[0]["block"] == case.block_q


def test_takes_other_strides(calls: list[dict[str, Any]]) -> None:
    call = SERVED[0].call()
    turned = call.replace(q=call.q.transpose(-1, -2).contiguous().transpose(-1, -2))
    assert torch.equal(cudnn.run(turned), cudnn.run(call))


def test_compiles_without_a_graph_break(calls: list[dict[str, Any]]) -> None:
    call = SERVED[0].call()
    assert torch.equal(torch.compile(cudnn.run, fullgraph=True, backend="eager")(call), cudnn.run(call))


HOPPER = (9, 0)
REFUSED = [
    # compute capability, case, changes, words of the reason (None: served)
    *((HOPPER, case, {}, None) for case in SERVED),
    (HOPPER, Case(256, 256, dtype=BF16, is_causal=True), {}, "causality"),
    (HOPPER, Case(256, 256, dtype=BF16, padding="left"), {}, "padding"),
    (HOPPER, Case(256, 256, dtype=BF16, density=None), {}, "there is none"),
    (HOPPER, Case(256, 256, dtype=BF16, dim=80), {}, "not 80"),
    (HOPPER, Case(256, 256, dtype=BF16, block_q=128, block_k=64), {}, "not 128 x 64"),
    (HOPPER, Case(300, 256, dtype=BF16), {}, "multiples of 128, not 300 and 256"),
    (HOPPER, Case(256, 256, dtype=F32), {}, "float32"),
    (HOPPER, Case(256, 256, dtype=BF16), {"precision": "int8_fp8"}, "int8_fp8"),
    ((10, 0), Case(256, 256, dtype=BF16), {}, "capability 10.0"),
]


@pytest.mark.parametrize(("capability", "case", "changes", "reason"), REFUSED, ids=str)
def test_refusals(
    capability: tuple[int, int], case: Case, changes: dict[str, object], reason: str | None, gpu_like: FakeGpu
) -> None:
    gpu_like.capability = capability
    declined = backends.get("cudnn").declines(on_gpu(case.call(**changes)))
    assert declined is None if reason is None else reason in str(declined)


def test_refuses_a_cpu() -> None:
    assert "cpu" in str(backends.get("cudnn").declines(SERVED[0].call()))


def test_missing(gpu_like: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem() -> str | None:
        cudnn._import_problem.cache_clear()  # type: ignore[attr-defined]
        return backends.get("cudnn").missing()

    assert problem() == "no CUDA GPU"
    gpu_like.is_there = True
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: None)
    assert "pip install nvidia-cudnn-frontend" in str(problem())
    monkeypatch.setattr(cudnn.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cudnn", None)  # an older release, or a part of it is absent
    cudnn._module.cache_clear()
    assert "no block-sparse attention here" in str(problem())
    cudnn._import_problem.cache_clear()  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif("backends.get('cudnn').missing() is not None", reason="nvidia-cudnn-frontend is not installed")
@pytest.mark.parametrize("case", [*SERVED, Case(4096, 4096, dim=128, dtype=BF16, heads=8, density=0.2)], ids=str)
def test_on_a_gpu(case: Case) -> None:
    call = case.call(device="cuda")
    out, lse = backends.get("cudnn").compute_with_lse(call)
    wanted, wanted_lse = reference.run_with_lse(call)
    assert relative_l1(out, wanted) < 0.003
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-3, atol=1e-3)
