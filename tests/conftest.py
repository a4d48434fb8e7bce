"""Settings that every test needs, made before anything imports Triton."""

from __future__ import annotations

import os

# Under the interpreter numpy multiplies small matrices; its thread pool would fight the other test process for them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two threads in all: one for each process under pytest-xdist.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# The same examples every time, and no time limit on a shared machine.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
