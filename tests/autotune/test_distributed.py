"""Several processes that share the prompts out give the bits of one process that sees all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.storage import digest

WORKER = """
import json, sys
import torch

from autotune.storage import digest
import torch.distributed as dist
torch.set_num_threads(1)
from fake_model import BOUNDS, GRID, FakeModel, Prompt
from autotune import calibrate, extract_sparse_attention_state_dict

folder, world, rank, fail_at, resume = sys.argv[1], *map(int, sys.argv[2:6])
count = int(sys.argv[6])
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}{fail_at}{resume}", rank=rank,
                            world_size=world)
model = FakeModel()
prompts = [Prompt(i, 300 + 30 * i) for i in range(count)]
model.fail_at = fail_at
settings = dict(grid=GRID, query_blocks=3, checkpoint=f"{folder}/checkpoint{world}", resume=bool(resume))
settings |= BOUNDS
with calibrate(model, **settings) as calibration:
    for prompt in calibration.prompts(prompts):
        model(prompt)
name = f"{folder}/result{world}{rank}{count}"
state = extract_sparse_attention_state_dict(model)
torch.save(state, name)
saved = f"{folder}/saved{world}{rank}{count}.pt"
calibration.save(saved)
with open(name + ".json", "w") as file:
    json.dump({"statistics": calibration.statistics, "ran": [p.seed for p in model.ran]}, file)
if world > 1:
    dist.destroy_process_group()
"""
ROOT = Path(__file__).parents[2]


def start(folder: Path, world: int, rank: int, *, fail_at: int = -1, resume: bool = False, count: int = 6) -> Any:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "autotune")])}
    arguments = [str(folder), *(str(int(x)) for x in (world, rank, fail_at, resume, count))]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], env=environment, cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*processes: Any) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output


def results(folder: Path, world: int, rank: int, count: int = 6) -> tuple[dict[str, Any], dict[str, Any]]:
    name = folder / f"result{world}{rank}{count}"
    return torch.load(name, weights_only=True), json.loads(name.with_name(name.name + ".json").read_text())


def compare(folder: Path, count: int) -> None:
    one, facts = results(folder, 1, 0, count)
    ran: list[int] = []
    for rank in (0, 1):
        state, other = results(folder, 2, rank, count)
        assert state.keys() == one.keys()
        for key, value in one.items():
            assert digest(value) == digest(state[key]), key
        assert other["statistics"] == facts["statistics"]
        assert all(seed % 2 == rank for seed in other["ran"])
        ran += other["ran"]
    assert sorted(ran) == sorted(facts["ran"])
    assert any(head["is_sparse"] for entry in facts["statistics"] for head in entry["heads"])
    assert (folder / f"saved20{count}.pt").exists() and not (folder / f"saved21{count}.pt").exists()


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path: Path) -> None:
    finish(start(tmp_path, 1, 0), start(tmp_path, 2, 0), start(tmp_path, 2, 1))
    compare(tmp_path, 6)


@pytest.mark.slow
def test_only_the_second_process_sees_the_prompt_kept_aside_and_both_are_killed_once(tmp_path: Path) -> None:
    # Four prompts: 0 to 2 are fitted, 3 is kept aside and belongs to rank 1.
    first = [start(tmp_path, 2, rank, fail_at=2, count=4) for rank in (0, 1)]
    assert first[0].wait(timeout=120) != 0  # at prompt 2, its second
    try:
        first[1].wait(timeout=1)
    except subprocess.TimeoutExpired:
        pass
    finally:
        first[1].kill()
        for process in first:
            process.communicate()
    files = sorted(path.name for path in tmp_path.glob("checkpoint2.rank*"))
    assert files == ["checkpoint2.rank0", "checkpoint2.rank1"]
    finish(
        start(tmp_path, 1, 0, count=4),
        start(tmp_path, 2, 0, resume=True, count=4),
        start(tmp_path, 2, 1, resume=True, count=4),
    )
    one, facts = results(tmp_path, 1, 0, 4)
    for rank in (0, 1):
        state, other = results(tmp_path, 2, rank, 4)
        assert all(torch.equal(one[key], state[key]) for key in one if key != "_metadata")
        assert other["statistics"] == facts["statistics"]
    assert results(tmp_path, 2, 0, 4)[1]["ran"][0] == 2
    assert 1 not in results(tmp_path, 2, 1, 4)[1]["ran"]
    assert not list(tmp_path.glob("checkpoint2*"))
