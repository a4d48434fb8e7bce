"""Interruptions: a calibration goes on where it was killed, and takes over nobody else's work."""

from __future__ import annotations

import copy
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import PROMPTS, FakeModel, Prompt, equal_results, tune
from torch import nn

from autotune import Calibration, Grid
from autotune.checkpoint import identity
from autotune.storage import digest


@pytest.mark.parametrize("fail_at", [1, 3, 4])
def test_resume_runs_only_what_is_unfinished(
    tuned: tuple[FakeModel, Calibration], tmp_path: Path, fail_at: int
) -> None:
    path = tmp_path / "some[1].partial.pt"  # brackets mean something to glob
    model = FakeModel()
    model.fail_at = fail_at
    with pytest.raises(MemoryError):
        tune(model, checkpoint=path)
    assert path.with_name(path.name + ".rank0").exists()
    resumed = FakeModel()
    calibration = tune(resumed, checkpoint=path, resume=True)
    assert [prompt.seed for prompt in resumed.ran[: 6 - fail_at]] == list(range(fail_at, 6))[: 6 - fail_at]
    assert len(resumed.ran) == len(tuned[0].ran) - min(fail_at, 4)
    assert equal_results(resumed, tuned[0])
    assert calibration.statistics == tuned[1].statistics
    calibration.save(tmp_path / "tuned.pt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tuned.html", "tuned.json", "tuned.pt"], (
        "saved: no checkpoint is left"
    )


def test_a_failed_save_costs_nothing(tuned: tuple[FakeModel, Calibration], tmp_path: Path) -> None:
    file, taken = tmp_path / "c.rank0", tmp_path / "tuned.pt"
    calibration = tune(FakeModel(), checkpoint=tmp_path / "c")
    taken.mkdir()
    with pytest.raises(IsADirectoryError):
        calibration.save(taken)
    assert file.exists()
    resumed = FakeModel()
    again = tune(resumed, checkpoint=tmp_path / "c", resume=True)
    assert {prompt.seed for prompt in resumed.ran} == {4, 5}, "only those kept aside are run again"
    assert equal_results(resumed, tuned[0])
    assert again.statistics == tuned[1].statistics
    taken.rmdir()
    again.save(taken)
    assert taken.is_file() and not file.exists()
    file.touch()  # of a later calibration
    again.save(taken)
    assert file.exists()


def interrupted(path: Path, fail_at: int = 2, **changes: Any) -> Path:
    model = FakeModel()
    model.fail_at = fail_at
    with pytest.raises(MemoryError):
        tune(model, checkpoint=path, **changes)
    return path.with_name(path.name + ".rank0")


OTHERS: dict[str, dict[str, Any]] = {
    "prompts": dict(prompts=[*PROMPTS[:5], Prompt(99)]),
    "another order": dict(prompts=PROMPTS[::-1]),
    "fewer prompts": dict(prompts=PROMPTS[:5]),
    "seed": dict(seed=1),
    "sample": dict(query_blocks=5),
    "grid": dict(grid=Grid(cdf=(0.5,))),
    "share kept aside": dict(kept_aside=0.5),
    "steps": dict(every=2),
}


def test_models_of_one_class_are_told_apart() -> None:
    first, second = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)) for _ in range(2))
    assert digest(identity(first)) == digest(identity(copy.deepcopy(first))) != digest(identity(second))
    merged = copy.deepcopy(first)
    with torch.no_grad():
        merged[1].weight *= 1.01  # in the middle, as a merged LoRA is
    others = [merged, copy.deepcopy(first).half(), copy.deepcopy(first).to("meta"), first[:2]]
    assert len({digest(identity(model)) for model in (first, *others)}) == 5


def test_the_checkpoint_of_another_calibration_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "c")
    for other in OTHERS.values():
        model = FakeModel()
        with pytest.raises(ValueError, match="belongs to another calibration"):
            tune(model, checkpoint=tmp_path / "c", resume=True, **other)
        assert not model.ran and all(module.mode == "dense" and module.tuned is None for module in model.inner)


def test_other_bounds_may_use_a_checkpoint(tmp_path: Path) -> None:
    interrupted(tmp_path / "c")
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True, l1=0.05)
    assert model.ran[0].seed == 2


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    file = interrupted(tmp_path / "c")
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint .*c\.rank0' is damaged: delete it or run without resume"):
            tune(FakeModel(), checkpoint=tmp_path / "c", resume=True)
    file.write_bytes(whole)
    content = torch.load(file, weights_only=True)
    content["layers"][0][0]["histogram"][0, 0, 5] += 1
    torch.save(content, file)  # with checksums of its own
    with pytest.raises(ValueError, match=r"checkpoint .*c\.rank0' is damaged"):
        tune(FakeModel(), checkpoint=tmp_path / "c", resume=True)
    torch.save({"fingerprint": "x"}, file)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        tune(FakeModel(), checkpoint=tmp_path / "c", resume=True)


def test_without_resume_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    file = interrupted(tmp_path / "c", fail_at=3)
    file.with_name("c.rank1").write_bytes(file.read_bytes())  # of a run with more processes
    file.with_name(".c.rank1.77.tmp").touch()  # which was killed while it wrote
    interrupted(tmp_path / "c", fail_at=1)
    assert [path.name for path in tmp_path.iterdir()] == ["c.rank0"]
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True)
    assert model.ran[0].seed == 1


def test_checkpoints_of_several_ranks_count_each_prompt_once(
    tuned: tuple[FakeModel, Calibration], tmp_path: Path
) -> None:
    # Rank 0 had taken over the file of rank 1, and was killed before it removed it.
    file = interrupted(tmp_path / "c", fail_at=1)
    old = file.read_bytes()
    file.write_bytes(interrupted(tmp_path / "c", fail_at=3).read_bytes())
    file.with_name("c.rank1").write_bytes(old)
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True)
    assert model.ran[0].seed == 3
    assert equal_results(model, tuned[0])


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    model = FakeModel()
    tune(model, checkpoint=tmp_path / "c", resume=True)
    assert model.ran[0].seed == 0


class Document:
    """A prompt of a class of the user's own."""

    def __init__(self, text: str) -> None:
        self.text = text


def test_digests_tell_prompts_apart(tmp_path: Path) -> None:
    ids, pixels = torch.arange(6), torch.arange(6).numpy()
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text(file.name)
    items: list[Any] = [
        "a text", "another", 3, 3.5, None, b"3", ids, ids + 1, ids.view(2, 3), ids.float(), ids.bfloat16(), ids > 2,
        {"ids": ids}, {"ids": ids + 1}, UserDict(ids=ids + 2), UserDict(ids=ids + 3), [ids], (ids, ids), {1, 2}, {1, 3},
        pixels, pixels + 1, pixels.reshape(2, 3), pixels.astype("float64"), Prompt(1), Prompt(2),
        Document("x"), Document("y"), *files, tmp_path / "absent", tmp_path / "absent too",
    ]  # fmt: skip
    digests = [digest(item) for item in items]
    assert len(set(digests)) == len(items)
    assert digests == [digest(item) for item in items]
    files[1].write_text("a")
    assert digest(files[0]) == digest(files[1]), "a file is what it holds"


def test_prompts_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    loop = Document("x")
    loop.text = loop  # type: ignore[assignment]
    for item in (object(), len, iter([1]), loop, [Document("y"), lambda: None]):
        with pytest.raises(
            ValueError, match="no checkpoint can be kept of these prompts: .* cannot be told from another"
        ):
            tune(FakeModel(), [item], checkpoint=tmp_path / "c")
    assert not list(tmp_path.iterdir())
