"""Backend `sage`, with a stand-in for the package: what it is called with, and what it is spared."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cases import BF16, F32, HALF, Case
from made_up_gpu import FakeGpu, on_gpu
from torch import Tensor

from spas_attn import Call, backends
from spas_attn.backends import sage, sdpa
from spas_attn.metrics import relative_l1


class Package:
    """A stand-in for sageattention; by default as 1.0.6 behaves: it subtracts the mean from K in place.

    Attributes:
        version: its version; calls: what it was called with.
    """

    def __init__(self) -> None:
        self.version = "1.0.6"
        self.calls: list[dict[str, Any]] = []

    def sageattn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        sm_scale: float | None = None,
        smooth_k: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs
        assert all(x.stride(-1) == 1 for x in (q, k, v)), "Last dim of qkv must be contiguous."
        assert tensor_layout == "HND"
        self.calls.append({"is_causal": is_causal, "sm_scale": sm_scale, "k": k})
        k -= k.mean(dim=2, keepdim=True)
        return sdpa.run(Call(q, k, v, is_causal=is_causal, scale=sm_scale or q.shape[-1] ** -0.5))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    """The stand-in, installed."""
    made = Package()
    monkeypatch.setitem(sys.modules, "sageattention", made)  # type: ignore[arg-type]
    monkeypatch.setattr(sage, "_major", lambda: int(made.version[0]))
    return made


def declines(call: Call) -> str | None:
    return backends.get("sage").declines(call)


@pytest.mark.parametrize(
    "case",
    [
        Case(128, 192, dtype=HALF, density=None),
        Case(130, 130, dtype=BF16, heads=4, k_heads=2, density=None, is_causal=True, layout="NHD"),
        Case(128, 128, dtype=HALF, density=None, scale=0.3, layout="strided"),
    ],
    ids=str,
)
def test_runs_and_leaves_k_alone(case: Case, package: Package) -> None:
    call = case.call()
    before = call.k.clone()
    out = sage.run(call)
    assert torch.equal(call.k, before)
    assert out.shape == call.q.shape
    assert relative_l1(out, sdpa.run(call)) < 0.01
    assert len(package.calls) == 1
    assert package.calls[0]["is_causal"] is case.is_causal
    assert package.calls[0]["sm_scale"] == call.scale


def test_rows_in_one_piece(package: Package) -> None:
    call = Case(64, 64, dtype=HALF, density=None).call()
    turned = call.k.transpose(2, 3).contiguous().transpose(2, 3)
    before = turned.clone()
    sage.run(call.replace(k=turned))
    assert torch.equal(turned, before)


def test_version_2_gets_k_itself(package: Package) -> None:
    package.version = "2.2.0"
    call = Case(64, 64, dtype=HALF, density=None).call()
    sage.run(call)
    assert package.calls[0]["k"] is call.k


def test_an_unknown_version_counts_as_1() -> None:
    if backends.get("sage").missing() is not None:
        assert sage._major() == 1


REFUSED = [
    (Case(128, 128, dtype=HALF), "block mask"),
    (Case(128, 128, dtype=HALF, density=None, padding="left"), "attention mask"),
    (Case(128, 128, dtype=HALF, density=None, is_causal=True, window=32), "window"),
    (Case(64, 128, dtype=HALF, density=None, is_causal=True), "64 and 128"),
    (Case(128, 128, dtype=F32, density=None), "float32"),
    (Case(128, 128, dtype=HALF, density=None), "cpu"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda x: str(x).replace(" ", "_"))
def test_refusals(case: Case, reason: str, package: Package) -> None:
    assert reason in str(declines(case.call()))


SHAPES = [
    # release, compute capability, case, words of the reason (None: served)
    (1, (8, 9), Case(128, 192, dtype=HALF, density=None), None),
    (1, (8, 9), Case(128, 200, dtype=HALF, density=None), "200 keys are no multiple of 64"),
    (1, (8, 9), Case(200, 200, dtype=HALF, density=None, is_causal=True), None),
    (1, (9, 0), Case(128, 128, dtype=HALF, density=None, dim=80), "not 80"),
    (1, (9, 0), Case(128, 128, dtype=HALF, density=None, dim=96), None),
    (2, (9, 0), Case(128, 200, dtype=BF16, density=None, dim=80), None),
    (2, (8, 6), Case(128, 200, dtype=BF16, density=None), "200 keys are no multiple of 64"),
    (2, (8, 6), Case(128, 256, dtype=BF16, density=None), None),
    (2, (9, 0), Case(128, 128, dtype=HALF, density=None, dim=256), "not 256"),
    (2, (7, 5), Case(128, 128, dtype=HALF, density=None), "7.5"),
]


@pytest.mark.parametrize(("release", "capability", "case", "reason"), SHAPES, ids=str)
def test_refusals_by_release(
    release: int, capability: tuple[int, int], case: Case, reason: str | None, gpu_like: FakeGpu, package: Package
) -> None:
    package.version, gpu_like.capability = f"{release}.0.0", capability
    declined = declines(on_gpu(case.call()))
    assert declined is None if reason is None else reason in str(declined)


def test_scale_goes_only_where_it_is_taken(package: Package) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
        return sdpa.run(Call(q, k, v, is_causal=is_causal, scale=q.shape[-1] ** -0.5))

    package.sageattn = sageattn  # type: ignore[method-assign, assignment]
    plain, scaled = (Case(64, 64, dtype=HALF, density=None, scale=scale).call() for scale in (None, 0.3))
    assert "0.3" in str(declines(scaled))
    assert "cpu" in str(declines(plain))
    assert relative_l1(sage.run(plain), sdpa.run(plain)) < 0.01


def test_missing(gpu_like: FakeGpu, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = backends.get("sage").missing
    assert missing() == "no CUDA GPU"
    gpu_like.is_there = True
    assert missing() is None
    monkeypatch.delitem(sys.modules, "sageattention")
    monkeypatch.setattr(sage.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(missing())
