"""The conditions under which a model is watched: run eagerly, and counted in float32."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """What is compiled runs eagerly meanwhile: traced, every observed call would compile anew."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # from torch 2.6 on
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextlib.contextmanager
def float32(device: str = "cpu") -> Iterator[None]:
    """For sums that are to be exact, and to outlive the inference mode that a model may run in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield
