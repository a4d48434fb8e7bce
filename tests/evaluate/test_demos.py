"""`make demo` and `make demo-video`: the whole path on little; the video on a random model of one layer."""

from __future__ import annotations

import json
from pathlib import Path

import demo_llama
import demo_video
import numpy as np
import pytest
import torch
import wan_example
from clips import FRAMES, draw
from PIL import Image
from prompts import PROMPTS, parse

from autotune import load
from modify_model.cli.compare import Comparison

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("no_gpu")


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--samples", "2", "--max_length", "640", "--evaluate", "1"]
    demo_llama.main(["--out_path", str(tmp_path / "demo.pt"), *short])
    shown = capsys.readouterr().out
    assert [line[:3] for line in shown.splitlines() if line[1:5] == "/6  "] == [f"{n}/6" for n in range(1, 7)]
    for text in (
        "6/6 attention layers replaced",
        "worst tail error",
        "perplexity",
        "prefill, ms",
        "     | import json",
    ):
        assert text in shown
    assert (tmp_path / "demo.pt").is_file() and len(json.loads((tmp_path / "demo.json").read_text())) == 6


def test_demo_video(
    tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo, and its tuned file in the script for real models, with a dense step."""
    monkeypatch.setattr(demo_video, "BOUNDS", {"l1": 0.5, "pv_l1": 0.6, "tail": 3.0})
    model = ["--model_name", str(tiny_demo), "--steps", "4"]
    assert demo_video.main([*model, "--out_path", str(tmp_path), "--clips", "2", "--prompts", "2"]) == 0
    shown = capsys.readouterr().out
    assert [line[:3] for line in shown.splitlines() if line[1:5] == "/6  "] == [f"{n}/6" for n in range(1, 7)]
    for text in (
        "4096 video tokens",
        "1/1 attention layers replaced",
        "PSNR dB",
        "sparsity   step",
        "recognised: dense",
    ):
        assert text in shown
    found = json.loads((tmp_path / "compare.json").read_text())
    prompts = [clip["prompt"] for clip in found["clips"]]
    assert [len(parse(prompt)) for prompt in prompts] == [1, 2] and not set(prompts) & set(PROMPTS["calibration"])
    for clip in found["clips"]:
        density = np.array(clip["density_by_step_and_layer"])
        assert density.shape == (4, 1) and 0 < density.mean() < 1
    state = load(tmp_path / "demo_wan.pt")
    assert state["_metadata"]["selector"]["class"] == "PeakMass"
    with Image.open(tmp_path / "compare.gif") as picture:
        assert getattr(picture, "n_frames", 1) == FRAMES
    assert all((tmp_path / name).is_file() for name in ("sheet.png", "sparsity.png", "demo_wan.json"))

    file = ["--model_out_path", str(tmp_path / "demo_wan.pt"), "--out_path", str(tmp_path / "again")]
    assert wan_example.SCRIPT.main([*model, *file, "--compare", "--dense_steps", "1", "0"]) == 0
    (clip,) = json.loads((tmp_path / "again" / "compare.json").read_text())["clips"]
    density = [row[0] for row in clip["density_by_step_and_layer"]]
    assert density[0] == 1 and max(density[1:]) < 1


def test_prompts_alternate() -> None:
    assert [len(parse(prompt)) for prompt in demo_video.chosen_prompts(6)] == [1, 2] * 3
    assert sorted(demo_video.chosen_prompts(10)) == sorted(PROMPTS["unseen"])


def test_recogniser_looks_at_both_clips() -> None:
    prompt = "a red circle moves left"
    right, wrong = draw(prompt, 0), draw("a blue square moves up", 0)
    comparison = Comparison(prompt, 0, right, wrong, {}, (1.0, 1.0), [0.0], torch.ones(1, 1))
    assert demo_video.seen(comparison) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--clips", "11"], "from 1 to 10"), (["--steps", "0"], "--steps"), (["--prompts", "5"], "from 1 to 4")],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo_video.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_video.main(["--model_name", str(tmp_path)]) == 2
    assert "no demo model in" in capsys.readouterr().err
    assert demo_video.main(["--model_name", str(tmp_path), "--device", "nowhere"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_make_runs_them() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target, script in (
        ("demo", "demo_llama.py"),
        ("demo-smollm2", "demo_smollm2.py"),
        ("demo-video", "demo_video.py"),
    ):
        assert f"{target}: $(STAMP)\n\t$(PY) evaluate/demos/{script}" in makefile
        assert (ROOT / "evaluate" / "demos" / script).is_file()
