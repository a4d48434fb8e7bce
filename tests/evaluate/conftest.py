"""Puts the folders of scripts on the import path, as Python does for the script that it runs; and has no GPU seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EVALUATE = Path(__file__).resolve().parents[2] / "evaluate"
for folder in ("benchmarks", "demos", "studies", "training"):
    sys.path.insert(0, str(EVALUATE / folder))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the programs on the CPU, wherever the tests run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
