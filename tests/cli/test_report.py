"""`spas-attn report` and `evaluate/report.py`, and the page that `spas-attn tune` writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autotune import load, report

Run = Callable[..., int]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def file(tuned: Callable[[str], Path]) -> Path:
    return tuned("tiny:Llama")


def test_tune_writes_the_page_and_says_so(file: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    assert file.with_suffix(".html").is_file()
    assert load(file)["_metadata"]["about"] == {"model": "tiny:Llama", "prompts": "the default ones, 640 tokens each"}
    assert run("report", file, "--out_path", tmp_path / "new" / "page.html") == 0
    out = capsys.readouterr().out
    assert out.startswith(report.summary(file)) and out.rstrip().endswith(f"page: {tmp_path / 'new' / 'page.html'}")
    assert (tmp_path / "new" / "page.html").read_text("utf-8") == file.with_suffix(".html").read_text("utf-8")


def test_the_page_goes_beside_the_file(file: Path, run: Run, tmp_path: Path) -> None:
    for suffix in (".pt", ".json"):
        shutil.copy(file.with_suffix(suffix), tmp_path)
    assert run("report", tmp_path / file.name) == 0
    assert (tmp_path / file.with_suffix(".html").name).is_file()


def test_what_cannot_be_used(file: Path, run: Run, tmp_path: Path, capsys: Any) -> None:
    assert run("report", tmp_path / "none.pt") == 2
    assert "no tuned file at" in capsys.readouterr().err
    alone = shutil.copy(file, tmp_path / "alone.pt")
    assert run("report", alone) == 2
    assert "spas-attn report: error: no statistics beside" in capsys.readouterr().err
    assert run("report", file, "--out_path", tmp_path) == 2
    assert "that is a folder" in capsys.readouterr().err
    assert run("report") == 2
    assert not list(tmp_path.glob("*.html"))


def test_script(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "evaluate/report.py", str(file), "--out_path", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "of the blocks left out" in done.stdout and (tmp_path / "page.html").is_file()


def test_the_page_may_not_be_a_folder(run: Run, tmp_path: Path, capsys: Any) -> None:
    """Known before any work."""
    (tmp_path / "taken.html").mkdir()
    assert run("tune", "--model_name", "tiny:Llama", "--model_out_path", tmp_path / "taken.pt") == 2
    assert "model_out_path (its page)" in capsys.readouterr().err
