"""Fixtures: a registry of backends to fill, and a made-up GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_up_gpu import FakeGpu

from spas_attn import backends, cost_model, replay


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """What a test replaces in the library must not meet the plan of an earlier test's call."""
    replay.forget()


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(backends.base, "_REGISTRY", {name: backends.get(name) for name in backends.names()})


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch, registry: None, tmp_path: Path) -> Iterator[FakeGpu]:
    """A made-up GPU, without backends of its own and without measurements."""
    gpu = FakeGpu(tmp_path / "cost_model.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu.is_there)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu.capability)
    monkeypatch.setenv(cost_model.ENVIRONMENT, str(tmp_path / "cost_model.json"))
    cost_model.forget()
    yield gpu
    cost_model.forget()
