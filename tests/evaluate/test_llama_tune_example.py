"""The script that tunes, saves, loads and generates."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import llama_tune_example
import pytest
import torch

from autotune import load
from spas_attn import fallback_counts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "evaluate" / "llama_tune_example.py")
SHORT = ["--max_length", "640", "--num_tune_samples", "6", "--layer_range", "1,3"]


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def command(*arguments: object) -> list[str]:
    return [sys.executable, SCRIPT, *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuned") / "demo.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert llama_tune_example.main(["--tune", *SHORT, "--model_out_path", str(path)]) == 0
    return path


def same(a: Path, b: Path) -> bool:
    one, two = load(a), load(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one if key != "_metadata")


def test_tune_and_generate(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = json.loads(tuned.with_suffix(".json").read_text())
    assert [entry["layer_idx"] for entry in statistics] == [1, 2]
    # The tuned layers are found without --layer_range.
    assert llama_tune_example.main(["--generate", "--model_out_path", str(tuned), "--max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "2/6 attention layers replaced" in shown
    assert "--- 4 new tokens" in shown


@pytest.mark.slow
def test_compile_compiles(tuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compile_in_place = torch.nn.Module.compile

    def compiling(module: torch.nn.Module) -> None:
        compile_in_place(module, backend="eager")  # the tracing is what can fail; inductor takes a minute
        seen.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    arguments = ["--generate", "--model_out_path", str(tuned), "--max_new_tokens", "6", "--prompt", "x = 1\n" * 40]
    before = fallback_counts()
    texts = []
    for more in ([], ["--compile"]):
        assert llama_tune_example.main([*arguments, *more]) == 0
        texts.append(capsys.readouterr().out.split("new tokens")[1].split("\n", 1)[1])
    assert texts[0] == texts[1]
    assert len(seen) == 1 and fallback_counts() == before
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(tuned: Path, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "demo.pt"
    arguments = command("--tune", *SHORT, "--model_out_path", path)
    partial = tmp_path / "demo.pt.partial.rank0"
    halting = [arguments[0], Path(__file__).with_name("paused.py"), *arguments[1:]]
    process = subprocess.Popen(halting, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert any(line == b"halted\n" for line in process.stdout)
    process.send_signal(number)
    _, shown = process.communicate(timeout=100)
    assert partial.exists() and not path.exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert b"--resume" in shown and b"Traceback" not in shown
    resumed = subprocess.run([*arguments, "--resume"], env=environment(), capture_output=True, timeout=100)
    assert resumed.returncode == 0
    assert same(path, tuned)
    assert path.with_suffix(".json").read_text() == tuned.with_suffix(".json").read_text()
    assert not partial.exists()


@pytest.mark.slow
def test_parallel_tune(tuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.pt"
    arguments = command("--parallel_tune", "--generate", *SHORT, "--model_out_path", path, "--max_new_tokens", 2)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "--- 2 new tokens" in done.stdout
    assert same(path, tuned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--tune", "--l1", "0.1", "--pv_l1", "0.05"], "it must exceed l1=0.1"),
        (["--tune", "--tail", "high"], "expected a number or 'none', got 'high'"),
        (["--tune", "--tail", "-1"], "tail must be above 0"),
        (["--tune", "--pool", "24"], "pool must be a divisor"),
        (["--tune", "--layer_range", "4-5"], "expected start,stop"),
        (["--tune", "--max_length", "32"], "--max_length must be at least 64"),
        (["--tune", "--num_tune_samples", "0"], "--num_tune_samples must be at least 1"),
        (["--tune", "--backend", "quick"], "'auto'.*'cpu'"),
        (["--tune", "--model_out_path", ""], "--model_out_path must name a file .* got '': that is empty"),
        (["--tune", "--model_out_path", "/"], "--model_out_path must name a file .* got '/': that is a folder"),
        (["--parallel_tune", "--model_out_path", f"{SCRIPT}/tuned.pt"], "llama_tune_example.py' is no folder"),
    ],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        llama_tune_example.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generate", "--model_out_path", "nowhere.pt"], "no tuned file at 'nowhere.pt': run with --tune first"),
        (["--generate", "--model_name", "/nowhere/model"], "no folder '/nowhere/model'"),
        (["--parallel_tune", "--model_name", "/nowhere/model"], "no folder '/nowhere/model'"),
        (["--tune", "--layer_range", "4,99"], "layer_range must be"),
        (["--tune", "--dataset", "/nowhere/text"], "/nowhere/text"),
    ],
)
def test_user_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llama_tune_example.main(arguments) == 2
    assert message in capsys.readouterr().err
