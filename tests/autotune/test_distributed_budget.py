"""A budget found by two processes is that of one, sensitivities and rounds of the check included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import json, sys, warnings
import torch
import torch.distributed as dist
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from chain_model import Chain, run
from fake_model import GRID, Prompt
from autotune import extract_sparse_attention_state_dict

folder, world, rank = sys.argv[1], *map(int, sys.argv[2:4])
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
model = Chain((1.0, 4.0))
prompts = [Prompt(i, 320, 0.2 if i < 6 else 3.0) for i in range(8)]
calibration = run(model, prompts, objective="budget", sparsity=0.3, l1=0.04, sensitivity=3, grid=GRID, query_blocks=3)
torch.save(extract_sparse_attention_state_dict(model), f"{folder}/state{world}{rank}")
tradeoff = calibration.tradeoff
facts = [[x.sensitivity for x in tradeoff.layers], tradeoff.predicted, tradeoff.measured]
tighter = [bool((layer.tighter < 1).any()) for layer in calibration.layers]
json.dump([facts, calibration.statistics, tighter], open(f"{folder}/facts{world}{rank}", "w"))
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_the_budget_of_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests" / "autotune")])}
    started = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(world), str(rank)], env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for world, rank in ((1, 0), (2, 0), (2, 1))
    ]  # fmt: skip
    for process in started:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    one = torch.load(tmp_path / "state10", weights_only=True)
    facts, statistics, tighter = json.loads((tmp_path / "facts10").read_text())
    assert any(tighter), "heads must have missed in the check"
    for rank in (0, 1):
        other = torch.load(tmp_path / f"state2{rank}", weights_only=True)
        assert all(torch.equal(one[key], other[key]) for key in one if key != "_metadata")
        shared = json.loads((tmp_path / f"facts2{rank}").read_text())
        assert shared[0][0] == pytest.approx(facts[0], rel=1e-9) and shared[0][1:] == pytest.approx(facts[1:], rel=1e-9)
        assert shared[1:] == [statistics, tighter]
