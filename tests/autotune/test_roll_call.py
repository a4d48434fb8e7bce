"""A process of a calibration that dies is named by the others, with its prompt, and the calibration can be resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = """
import os, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from fake_model import BOUNDS, GRID, FakeModel, Prompt
from autotune import calibrate, extract_sparse_attention_state_dict, roll_call
roll_call.BEAT, roll_call.SILENCE = 0.1, 2.0

folder, world, rank, how, resume = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{how}{resume}", rank=rank, world_size=world)
model = FakeModel()
settings = dict(grid=GRID, query_blocks=3, checkpoint=f"{folder}/checkpoint{world}{how}", resume=bool(resume))
with calibrate(model, **settings, **BOUNDS) as calibration:
    for prompt in calibration.prompts([Prompt(i, 300) for i in range(6)]):
        if rank == 1 and prompt.seed == 3 and not resume:
            if how == "killed":
                os._exit(1)
            if how == "raises":
                raise KeyError("a prompt of its own")
        model(prompt)
torch.save(extract_sparse_attention_state_dict(model), f"{folder}/state{world}{rank}")
if world > 1:
    dist.destroy_process_group()
"""
ROOT = Path(__file__).parents[2]


def start(folder: Path, world: int, rank: int, how: str, resume: bool = False) -> Any:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "autotune")])}
    arguments = [str(folder), str(world), str(rank), how, str(int(resume))]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], env=environment, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "rank 1 of 2 has died: it was last at prompt 3 of the curves pass"),
        pytest.param(
            "raises",
            "rank 1 of 2 stopped at prompt 3 of the curves pass with KeyError: 'a prompt of its own'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_dead_process_is_named(how: str, message: str, tmp_path: Path) -> None:
    first = [start(tmp_path, 2, rank, how) for rank in (0, 1)]
    try:
        output = first[0].communicate(timeout=60)[0]
    finally:
        first[1].kill()
        first[1].communicate()
    assert first[0].returncode == 1
    assert f"RuntimeError: {message}" in output and "resume from it" in output, output
    assert "this is rank 0, at prompt 2 of the curves pass" in output  # its own prompts are finished
    if how != "killed":
        return
    again = [start(tmp_path, 2, rank, how, resume=True) for rank in (0, 1)]
    for process in again:
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
    one, other = (torch.load(tmp_path / f"state2{rank}", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one if key != "_metadata")
