"""Milliseconds of attention against perplexity: the program on the demo LLaMA, and what it makes of its results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cost_quality
import pytest

pytestmark = pytest.mark.usefixtures("no_gpu")


def cell(method: str, setting: str, nats: float, ms: float, captured: bool = True) -> dict[str, Any]:
    long = {"ms": 2 * ms, "captured": True}
    found = {"method": method, "setting": setting, "density": 0.3, "kl": 0.01, "ms": ms, "captured": captured}
    return found | {"by_window": {"x": [nats, nats + 1], "y": [nats]}, "ms_llama": long}


def test_changes_and_times() -> None:
    more = math.log(1.02)
    data = {"cells": [cell("dense", "–", 2.0, 10.0), cell("a", "70%", 2.0 + more, 4.0, captured=False)]}
    assert cost_quality.changes(data)["a", "70%"] == pytest.approx(0.02)
    assert "| a | 70% | 30.0% | +2.00% | 0.0100 | 4.00* | 40% | 8.00 | 40% |" in cost_quality.table(data)


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, rule = next(iter(cost_quality.OURS.items()))
    monkeypatch.setattr(cost_quality, "OURS", {name: rule})
    monkeypatch.setattr(cost_quality, "OTHERS", ("XAttention",))
    arguments = ["--out", str(tmp_path / "cost"), "--length", "512", "--windows", "1", "--calibration_windows", "1"]
    arguments += ["--query_blocks", "2", "--targets", "0.3"]
    assert cost_quality.main([*arguments, "--seconds", "1"]) == 0
    assert cost_quality.main(arguments) == 0
    shown = capsys.readouterr().out
    cells = json.loads((tmp_path / "cost.json").read_text())["cells"]
    assert [cell["method"] for cell in cells] == ["dense", name, "XAttention", "XAttention"]
    assert all(cell["ms"] > 0 and cell["ms_llama"]["ms"] > 0 for cell in cells)
    assert cells[0]["density"] == 1 and all(cell["density"] < 1 for cell in cells[1:])
    assert abs(cells[2]["ms_llama"]["density"] - cells[2]["density"]) < 0.1
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    assert cost_quality.main([*arguments, "--plot"]) == 0
    assert capsys.readouterr().out.strip() in shown
