"""A made-up GPU, so that what is decided by device, registered backends and measured times can be decided here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spas_attn import Call, backends, cost_model
from spas_attn.cost_model import Line, Row


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")


def on_gpu(call: Call) -> Call:
    """The call with tensors that say they are on a GPU."""
    return _moved(call, OnGpu)


def on_cpu(call: Call) -> Call:
    """What such a call really is."""
    return _moved(call, Tensor)


def _moved(call: Call, kind: type[Tensor]) -> Call:
    changes: dict[str, Any] = {name: getattr(call, name).as_subclass(kind) for name in "qkv"}
    if call.mask is not None:
        lists = {name: getattr(call.mask, name).as_subclass(kind) for name in ("counts", "indices")}
        changes["mask"] = dataclasses.replace(call.mask, **lists, trusted=True)
    return call.replace(**changes)


def row(**changes: Any) -> Row:
    """Dense takes 10 per pair; sparse 12 at density 1, and 1 for each million tokens of selection."""
    made = Row(
        "Made-up GPU", (99, 0), 128, False, {"sdpa": Line(0.0, 0.0, 10.0)}, Line(0.1, 1.0, 0.0),
        {"triton/native": Line(0.0, 0.0, 12.0)}, "2026-11-21",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


class FakeGpu:
    """What this machine says of its GPU; nothing in the packaged cost model speaks for it.

    Attributes:
        name, capability: what torch.cuda says; both can be set.
        is_there: whether torch.cuda is available; False, because torch.compile would look for a real GPU.
    """

    def __init__(self, table: Path) -> None:
        self.name, self.capability = "Made-up GPU", (99, 0)
        self.is_there = False
        self._table = table

    def measured(self, *rows: Row) -> None:
        """Make these rows the user's own cost model."""
        cost_model.write(rows, self._table)
        cost_model.forget()

    def serve(self, name: str, like: str, **changes: Any) -> None:
        """Register a backend for this GPU that computes as another one does on a CPU, natively, and serves all."""
        chosen = backends.get(like)
        serving = dataclasses.replace(
            chosen,
            name=name,
            missing=lambda: None,
            declines=lambda call: None,
            run=lambda call: chosen.run(on_cpu(call).replace(precision="native")),
        )
        backends.register(dataclasses.replace(serving, **changes))
