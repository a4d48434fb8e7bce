"""The demo LLaMA's texts: names to be copied from afar, and its training."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import texts
import torch
import train_llama
from transformers import AutoModelForCausalLM

from modify_model.cli.language import DEMO, read_texts


def test_windows_are_whole_lines_of_all_files() -> None:
    found = texts.byte_windows([f"{letter}\n" * 200 for letter in "abc"], 100, 6, seed=0)
    assert [len(window) for window in found] == [100] * 6
    assert {window[:1] for window in found[:3]} == {b"a", b"b", b"c"}  # every file once before any is used again
    assert found == texts.byte_windows([f"{letter}\n" * 200 for letter in "abc"], 100, 6, seed=0)
    with pytest.raises(ValueError, match="fewer than one window"):
        texts.byte_windows(["a" * 10], 100, 1, seed=0)


def test_a_name_to_copy_is_defined_once_far_above() -> None:
    tests = texts.copy_tests(read_texts(DEMO / "heldout", "unseen"), 8, distance=1500, length=2048, seed=3)
    assert len({test.prompt for test in tests}) == 8
    for test in tests:
        name = test.prompt[-texts.GIVEN :] + test.answer
        assert len(test.prompt + test.answer) == 2048 and 8 <= len(name) <= 16
        words = re.findall(rb"\b" + re.escape(name[: texts.GIVEN]) + rb"\w*", test.prompt)
        assert words == [name, name[: texts.GIVEN]]
        assert abs(len(test.prompt) - texts.GIVEN - test.prompt.find(name) - 1500) <= 50
    with pytest.raises(ValueError, match="distance"):
        texts.copy_tests(["x"], 1, distance=100)


def test_planted_names_are_used_again() -> None:
    code = b"def f(x):\n    return x\n\n" * 250
    made = texts.plant_names(code, 4097, random.Random(0))
    assert len(made) == 4097 and made != code[:4097]
    assert made == texts.plant_names(code, 4097, random.Random(0))


def test_held_out_files_are_not_trained_on() -> None:
    heldout = train_llama.heldout_texts()
    assert heldout.keys() == train_llama.heldout_groups().keys()
    assert set(train_llama.heldout_groups().values()) == {"calibration", "unseen"}
    files, report = train_llama.training_files(heldout, (), tiny=True)
    assert files.keys() == {"stdlib"} and len(files["stdlib"]) == 200 == report["files"]["stdlib"]
    held = {text.encode() for text in heldout.values()}
    assert not held & set(files["stdlib"])


@pytest.mark.slow
def test_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_llama.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert "training 100%" in capsys.readouterr().err
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["stages"][0]["training"]["steps"] == 4 and training["evaluation"]["copy_tests"] == 8
    assert 6 < training["evaluation"]["bits_per_byte"] < 9
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
