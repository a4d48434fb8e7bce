"""`make demo-video` and sweep_video.py, on a demo model of the same form with one small layer and random weights."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import demo_video
import numpy as np
import pytest
import sweep_video
import torch
import train_demo_video
import verify_diffusion_implementation
import wan_example
from _demo_clips import FRAMES, PROMPTS, draw, generate, load_pipeline, parse, to_frames
from _demo_recognise import recognise
from _diffusion import main
from _diffusion_compare import Comparison
from PIL import Image

import autotune
from autotune import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo_wan")
    torch.manual_seed(0)
    transformer = train_demo_video.make_transformer(tiny=True)
    torch.nn.init.normal_(transformer.proj_out.weight, 0, 0.02)
    with torch.no_grad():  # peaked attention, so that blocks matter
        for block in transformer.blocks:
            block.attn1.norm_q.weight.mul_(4)
    train_demo_video.save(transformer, folder)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the demo filled, and what it printed."""
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(torch.cuda, "is_available", lambda: False)
        context.setattr(demo_video, "TAIL", 3.0)
        context.setattr(demo_video, "L1", 0.5)
        context.setattr(demo_video, "PV_L1", 0.6)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            arguments = ["--model_name", str(model), "--out_path", str(folder), "--steps", "4", "--clips", "2"]
            assert demo_video.main([*arguments, "--prompts", "2"]) == 0
    return folder, shown.getvalue()


def test_demo(made: tuple[Path, str]) -> None:
    folder, shown = made
    lines = shown.splitlines()
    assert [line[:3] for line in lines if line[1:3] == "/6"] == [f"{n}/6" for n in range(1, 7)]
    for text in (
        "4096 video tokens",
        "1/1 attention layers replaced",
        "PSNR dB",
        "sparsity   step",
        "recognised: dense",
    ):
        assert text in shown
    found = json.loads((folder / "compare.json").read_text())
    prompts = [clip["prompt"] for clip in found["clips"]]
    assert [len(parse(prompt)) for prompt in prompts] == [1, 2] and not set(prompts) & set(PROMPTS["calibration"])
    for clip in found["clips"]:
        density = np.array(clip["density_by_step_and_layer"])
        assert density.shape == (4, 1) and 0 < density.mean() < 1 and 5 < clip["psnr"] < 99
        assert clip["dense_seconds"] > 0 and clip["sparse_seconds"] > 0
    state = load(folder / "demo_wan.pt")
    assert state["_metadata"]["block_q"] == 64 and state["_metadata"]["prompts"] == 2
    with Image.open(folder / "compare.gif") as picture:
        assert getattr(picture, "n_frames", 1) == FRAMES
    assert all((folder / name).is_file() for name in ("sheet.png", "sparsity.png", "demo_wan.json"))


def test_the_saved_file_serves_the_other_scripts(model: Path, made: tuple[Path, str], tmp_path: Path) -> None:
    file = str(made[0] / "demo_wan.pt")
    arguments = ["--model_name", str(model), "--model_out_path", file, "--steps", "4"]
    script = [wan_example.EXAMPLE, str(wan_example.__file__), wan_example.__doc__]
    options = ["--compare", "--dense_steps", "1", "0", "--out_path", str(tmp_path)]
    assert main(*script, [*arguments, *options]) == 0
    (clip,) = json.loads((tmp_path / "compare.json").read_text())["clips"]
    assert clip["prompt"] == PROMPTS["unseen"][1]
    density = [row[0] for row in clip["density_by_step_and_layer"]]
    assert density[0] == 1 and max(density[1:]) < 1
    assert verify_diffusion_implementation.main([*arguments[:-1], "1"]) == 0


def test_prompts_alternate() -> None:
    assert [len(parse(prompt)) for prompt in demo_video.chosen_prompts(6)] == [1, 2] * 3
    assert sorted(demo_video.chosen_prompts(10)) == sorted(PROMPTS["unseen"])


def test_recogniser_looks_at_both_clips() -> None:
    prompt = "a red circle moves left"
    right, wrong = draw(prompt, 0), draw("a blue square moves up", 0)
    comparison = Comparison(prompt, 0, right, wrong, (1.0, 1.0), [0.0], torch.ones(1, 1))
    assert demo_video.seen(comparison) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--clips", "11"], "--clips must be from 1 to 10"), (["--steps", "0"], "--steps must be from 1")],
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
    assert "demo-video: $(STAMP)\n\t$(PY) evaluate/demo_video.py" in (ROOT / "Makefile").read_text()


def test_the_shipped_model_draws_its_prompt() -> None:
    prompt = "a yellow square bounces and a red triangle moves right"
    clip = to_frames(generate(load_pipeline(), [prompt], seed=1))[0]
    assert recognise(clip) == set(parse(prompt))


def test_sweep(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Without and with guidance, two selectors, two bounds; curves are computed once per guidance and selector."""
    base = ["--out", str(tmp_path / "new" / "sweep"), "--model_name", str(model)]
    names = ["64x64, pool 8", "128x128, block means"]
    bounds = ["--mean_bounds", "0.05", "--tail_bounds", "3"]
    short = ["--clips", "1", "--seeds", "1", "--steps", "2", "--guidance", "1", "2"]
    computed = []
    add_curves = autotune.observe.add_curves

    def counting(*arguments: Any) -> None:
        computed.append(1)
        add_curves(*arguments)

    monkeypatch.setattr(autotune.observe, "add_curves", counting)
    assert sweep_video.main([*base, "--selectors", *names, *bounds, *short]) == 0
    # Three prompts fitted, one of two steps watched, one call without and two with guidance, one layer, two selectors.
    assert len(computed) == 3 * 1 * (1 + 2) * 1 * 2
    data = json.loads((tmp_path / "new" / "sweep.json").read_text())
    settings = [(g, n, t) for g in (1.0, 2.0) for n in names for t in (None, 3.0)]
    assert [(r["guidance"], r["setting"], r["tail"]) for r in data["results"]] == settings
    assert list(data["facts"]["recognised_dense"]) == ["1", "2"] and data["facts"]["dtype"] == "torch.float32"
    for at in range(0, len(settings), 2):
        tight, loose = data["results"][at : at + 2]
        assert tight["sparsity"] < loose["sparsity"] < 1
        assert tight["psnr"][0] > loose["psnr"][0] > 5
    assert all(len(r["sparsity_by_layer"]) == 1 and len(r["sparsity_by_step"]) == 2 for r in data["results"])
    shown = capsys.readouterr().out
    assert sweep_video.main([*base, "--plot"]) == 0
    again = capsys.readouterr().out
    assert again in shown and "| 64x64, pool 8 | 2 | tail |" in again
    assert (tmp_path / "new" / "sweep.png").stat().st_size > 10_000
    assert sweep_video.main(["--out", str(tmp_path / "none"), "--plot"]) == 2


def test_at_aim() -> None:
    def result(sparsity: float, *decibels: float) -> dict[str, Any]:
        return {"setting": "s", "guidance": 1.0, "l1": 0.3, "tail": 0.5, "sparsity": sparsity, "psnr": list(decibels)}

    some = [result(0.5, 24, 28), result(0.3, 30, 38), result(0.4, 28, 32)]
    assert sweep_video.at_aim(some) == pytest.approx((0.4, 28))
    assert sweep_video.at_aim(some, 32.0) == pytest.approx((0.35, 29))
    assert all(math.isnan(value) for value in sweep_video.at_aim(some, 40.0))
    assert [r["sparsity"] for r in sweep_video.lines(some)[1.0, "s", "tail"]] == [0.3, 0.4, 0.5]
    assert sweep_video.kind_of({"l1": 0.06, "tail": 0.4}) == "l1 0.06 and tail"
    assert sweep_video.kind_of({"l1": 0.3, "tail": None}) == "mean"
