"""evaluate/hunyuan3d_example.py from end to end on small random models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modify_model.cli.shape_pictures import shaded
from modify_model.cli.shapes import EXACT, KEYS, PLAIN, SPARSE

pytest.importorskip("trimesh")
FILE = Path(__file__).parents[2] / "evaluate" / "hunyuan3d_example.py"
SMALL = ["--resolution", "16", "--steps", "3", "--device", "cpu"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script with arguments; returns its exit code."""
    monkeypatch.delenv("USE_SAGEATTN", raising=False)
    monkeypatch.delenv("CA_USE_SAGEATTN", raising=False)
    spec = importlib.util.spec_from_file_location("hunyuan3d_example", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main(str(FILE), module.__doc__, [*arguments])


def test_tune_and_compare(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tmp_path / "tuned.pt"
    given = ["--model_path", "tiny:2.0", "--out_path", str(tmp_path), "--model_out_path", str(tuned), *SMALL]
    assert script("--tune", "--compare", *given) == 0
    text = capsys.readouterr()
    assert "tuning" in text.err and "denoising" in text.err and "decoding" in text.err, "progress bars"
    assert "stays dense until you calibrate it" in text.err
    ways = json.loads((tmp_path / "0_compare.json").read_text())["ways"]
    assert list(ways) == [PLAIN, EXACT, KEYS, SPARSE]
    assert ways[EXACT]["latents error"] < 1e-5 and ways[EXACT]["field error"] < 1e-5
    assert 0 < ways[KEYS]["field error"] < 1
    for way in ways.values():
        assert Path(way["mesh"]).stat().st_size > 1000
    assert (tmp_path / "0_compare.png").stat().st_size > 1000 and tuned.with_suffix(".json").exists()
    assert script("--compare", *given) == 0, "from the saved file"
    assert SPARSE in capsys.readouterr().out


@pytest.mark.parametrize("name", ["turbo", "2.1"])
def test_other_models_write_a_mesh(name: str, script: Any, tmp_path: Path) -> None:
    given = ["--model_path", f"tiny:{name}", "--out_path", str(tmp_path), "--format", "obj", *SMALL]
    assert script(*given) == 0
    assert (tmp_path / "shape_0.obj").read_text().count("\nf ") > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path", "tiny:9"], "a tiny model is one of 2.0, turbo, 2.1"),
        (["--model_path", "no/such/model"], "no weights found at"),
        (["--model_path", "tiny:2.0", "--image", "a.png"], "takes no --image"),
        (["--model_path", "tiny:2.0", "--model_out_path", "none.pt"], "run with --tune first"),
        (["--model_path", "tiny:2.0", "--engine", "sage"], "pip install sageattention"),
    ],
)
def test_errors_of_the_user(arguments: list[str], message: str, script: Any, capsys: Any, tmp_path: Path) -> None:
    assert script(*arguments, "--out_path", str(tmp_path), *SMALL) == 2
    assert message in capsys.readouterr().err


def test_shading_shows_the_near_side() -> None:
    """A half space and a bump: ground where nothing is, and the nearer side of the volume is what is seen."""
    field = torch.full((9, 9, 9), -1.0)
    field[2:7, 2:7, :5] = 1.0  # along z, from below to the middle
    picture = shaded(field, 2)
    assert picture.shape == (9, 9)
    assert np.array_equal(picture == 1.0, np.flipud((field > 0).any(2).numpy().T) == 0)
    assert picture[4, 4] == pytest.approx(shaded(field.flip(0), 2)[4, 4])
    assert picture[4, 4] != pytest.approx(shaded(field.flip(2), 2)[4, 4]), "nearer is lighter"
