"""Puts the folders of scripts on the import path, as Python does for the script that it runs; a small demo model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("evaluate", "evaluate/benchmarks", "evaluate/demos", "evaluate/studies", "evaluate/training")
sys.path[:0] = [str(ROOT / folder) for folder in (*FOLDERS, "models_dict/demo_wan")]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the programs on the CPU, wherever the tests run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a demo Wan of one layer and random weights."""
    import train_video

    folder = tmp_path_factory.mktemp("demo_wan")
    torch.manual_seed(0)
    transformer = train_video.make_transformer(tiny=True)
    torch.nn.init.normal_(transformer.proj_out.weight, 0, 0.02)
    with torch.no_grad():  # peaked attention, so that blocks matter
        for block in transformer.blocks:
            block.attn1.norm_q.weight.mul_(4)
    train_video.save(transformer, folder)
    return folder
