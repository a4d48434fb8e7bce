"""Backend `sage`, with a stand-in for the package: what it is called with, and what it is spared."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import BF16, F32, HALF, Case
from torch import Tensor

from spas_attn.backends import Call, sage, sdpa
from spas_attn.metrics import relative_l1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module `sageattention` as 1.0.6 behaves: it subtracts the mean from K in place. Yields the calls it got."""
    seen: list[dict[str, Any]] = []

    def sageattn(
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
        seen.append({"is_causal": is_causal, "sm_scale": sm_scale, "k": k})
        k -= k.mean(dim=2, keepdim=True)
        return sdpa.run(Call(q, k, v, is_causal=is_causal, scale=sm_scale or q.shape[-1] ** -0.5))

    install(monkeypatch, sageattn)
    return seen


def install(monkeypatch: pytest.MonkeyPatch, sageattn: Any, version: int = 1) -> None:
    module = ModuleType("sageattention")
    module.sageattn = sageattn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", module)
    monkeypatch.setattr(sage, "_major", lambda: version)


@pytest.mark.parametrize(
    "case",
    [
        Case(128, 192, dtype=HALF, density=None),
        Case(130, 130, dtype=BF16, heads=4, k_heads=2, density=None, is_causal=True, layout="NHD"),
        Case(128, 128, dtype=HALF, density=None, scale=0.3, layout="strided"),
    ],
    ids=str,
)
def test_runs_and_leaves_k_alone(case: Case, calls: list[dict[str, Any]]) -> None:
    call = case.call()
    before = call.k.clone()
    out = sage.run(call)
    assert torch.equal(call.k, before)
    assert out.shape == call.q.shape
    assert relative_l1(out, sdpa.run(call)) < 0.01
    assert len(calls) == 1
    assert calls[0]["is_causal"] is case.is_causal
    assert calls[0]["sm_scale"] == call.scale


def test_rows_in_one_piece(calls: list[dict[str, Any]]) -> None:
    call = Case(64, 64, dtype=HALF, density=None).call()
    turned = call.k.transpose(2, 3).contiguous().transpose(2, 3)
    before = turned.clone()
    sage.run(call.replace(k=turned))
    assert torch.equal(turned, before)


def test_version_2_gets_k_itself(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    monkeypatch.setattr(sage, "_major", lambda: 2)
    call = Case(64, 64, dtype=HALF, density=None).call()
    sage.run(call)
    assert calls[0]["k"] is call.k


def test_an_unknown_version_counts_as_1() -> None:
    assert sage._major() in (1, 2)
    if "sageattention" not in sys.modules:
        assert sage._major.__wrapped__() == 1 or sage._missing() is None


REFUSED = [
    (Case(128, 128, dtype=HALF), "block mask"),
    (Case(128, 128, dtype=HALF, density=None, padding="left"), "attention mask"),
    (Case(128, 128, dtype=HALF, density=None, is_causal=True, window=32), "window"),
    (Case(64, 128, dtype=HALF, density=None, is_causal=True), "64 and 128"),
    (Case(128, 128, dtype=F32, density=None), "float32"),
    (Case(128, 128, dtype=HALF, density=None), "cpu"),
]


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=lambda x: str(x).replace(" ", "_"))
def test_refusals(case: Case, reason: str, calls: list[dict[str, Any]]) -> None:
    assert reason in str(sage._declines(case.call()))


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, so that what is asked about devices can be asked here."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


def on_gpu(case: Case) -> Call:
    call = case.call()
    return call.replace(**{name: getattr(call, name).as_subclass(OnGpu) for name in "qkv"})


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
    release: int,
    capability: tuple[int, int],
    case: Case,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[dict[str, Any]],
) -> None:
    monkeypatch.setattr(sage, "_major", lambda: release)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    declined = sage._declines(on_gpu(case))
    assert declined is None if reason is None else reason in str(declined)


def test_scale_goes_only_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False) -> Tensor:
        return sdpa.run(Call(q, k, v, is_causal=is_causal, scale=q.shape[-1] ** -0.5))

    install(monkeypatch, sageattn)
    plain, scaled = (Case(64, 64, dtype=HALF, density=None, scale=scale).call() for scale in (None, 0.3))
    assert "0.3" in str(sage._declines(scaled))
    assert "cpu" in str(sage._declines(plain))
    assert relative_l1(sage.run(plain), sdpa.run(plain)) < 0.01


def test_missing(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sage._missing() == "no CUDA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sage._missing() is None
    monkeypatch.delitem(sys.modules, "sageattention")
    monkeypatch.setattr(sage.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(sage._missing())
