"""What the diffusion scripts are made of: schedules, watched steps, comparisons, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flux_example
import numpy as np
import pytest
import torch
import wan_example
from _diffusion import PROMPTS, EveryNth, shares_of_steps, tune
from _diffusion_compare import Comparison, Densities, animation, compare, dense, ssim, table, write
from _diffusion_models import Sampler, Size, _check_size, _sized, load
from _diffusion_tiny import TINY
from verify_diffusion_implementation import ANY

import autotune
from autotune.module import Thresholds, sparse_modules
from modify_model import patch
from spas_attn.metrics import psnr


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def tiny_sampler(steps: int = 3) -> Sampler:
    return load(wan_example.EXAMPLE, "tiny:Wan", steps=steps, device="cpu")


def set_thresholds(pipe: Any, cdf: float) -> None:
    """The same thresholds for every head of a patched pipeline."""
    for module in sparse_modules(pipe).values():
        heads = module.heads or 0
        on, off = torch.ones(heads, dtype=torch.bool), torch.full((heads,), 50.0)
        module.set_thresholds(Thresholds(on, torch.full((heads,), cdf), torch.full((heads,), -1.0), off))


def test_video_options_of_pictures() -> None:
    usual = flux_example.EXAMPLE.pipelines["FluxPipeline"]
    given: dict[str, int | None] = {"height": 512, "width": None, "frames": None, "steps": None}
    assert str(_sized(usual, given)) == "1024 x 512"
    with pytest.raises(ValueError, match="makes pictures"):
        _sized(usual, {**given, "frames": 9})


REFUSED = [
    (
        "CogVideoX",
        Size(264, 256, 9, 1),
        "--height must be a multiple of 16 for this model, got 264; nearest: 256 and 272",
    ),
    ("Flux", Size(512, 8, None, 1), "--width must be a multiple of 16 for this model, got 8; nearest: 16"),
    ("HunyuanDiT", Size(1032, 512, None, 1), "--height must be a multiple of 16 .*, got 1032; nearest: 1024 and 1040"),
    ("LTX-Video", Size(512, 720, 161, 1), "--width must be a multiple of 32 .*, got 720; nearest: 704 and 736"),
    ("LTX-Video", Size(512, 704, 160, 1), "--frames must be a multiple of 8 plus 1 .*, got 160; nearest: 153 and 161"),
    ("Wan", Size(480, 832, 10, 1), "--frames must be a multiple of 4 plus 1 .*, got 10; nearest: 9 and 13"),
]


@pytest.mark.parametrize(("family", "size", "message"), REFUSED)
def test_sizes_that_a_pipeline_cannot_make(family: str, size: Size, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _check_size(TINY[family].make(), size)


@pytest.mark.parametrize("family", list(TINY))
def test_usual_sizes_are_accepted(family: str) -> None:
    pipe = TINY[family].make()
    _check_size(pipe, ANY.pipelines[type(pipe).__name__])


def test_too_small_a_picture_is_named() -> None:
    sampler = tiny_sampler(steps=2)
    patch(sampler.pipe)
    sampler.size = Size(32, 48, 5, 2)
    with pytest.raises(
        ValueError, match=r"--height.* at 48 x 32, 5 frames a layer has 12 tokens, and one block has 128"
    ):
        tune(sampler, PROMPTS[:1], show=False)


@pytest.mark.parametrize("family", ["Flux", "Wan"])
def test_tiny_models_have_the_dtype_asked_for(family: str) -> None:
    sampler = load(ANY, f"tiny:{family}", steps=1, device="cpu", dtype="bfloat16")
    layers = [module for path, module in sampler.pipe.transformer.named_modules() if path.endswith("to_q")]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert bool(sampler.frames("x", 0).isfinite().all())


def test_the_warm_up_compiles_everything() -> None:
    sampler = tiny_sampler(steps=1)
    patch(sampler.pipe)
    set_thresholds(sampler.pipe, 0.3)
    timed, graphs = [False], []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(timed[0])
        return graph.forward

    frames = sampler.frames

    def timing(*arguments: Any) -> Any:
        timed[0] = True
        return frames(*arguments)

    sampler.frames = timing  # type: ignore[method-assign]
    torch._dynamo.reset()
    sampler.pipe.transformer.compile(backend=counting)
    found = compare(sampler, ["x", "y"], [1, 2], warm_up=True)
    torch._dynamo.reset()
    assert graphs and not any(graphs), f"{sum(graphs)} of {len(graphs)} graphs were compiled in timed runs"
    assert all(c.density.shape == (1, 2) and bool((c.density < 1).all()) for c in found)


def test_shares_of_steps_use_the_pipelines_schedule() -> None:
    sampler = tiny_sampler(steps=5)
    shares = shares_of_steps(sampler, "x", 2, 1)
    levels = sampler.pipe.scheduler.timesteps.double() / 1000
    patch(sampler.pipe, dense_steps=shares)
    set_thresholds(sampler.pipe, 0.3)
    with Densities(sampler.pipe) as densities:
        sampler.watch("x", 0)
    timesteps, density = densities.result()
    assert [round(level / 1000, 3) for level in timesteps] == [round(float(level), 3) for level in levels]
    assert (density == 1).all(1).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(("every", "watched"), [(1, {0, 1, 2, 3, 4}), (2, {1, 3}), (3, {1, 4}), (7, {3})])
def test_every_nth_step(every: int, watched: set[int]) -> None:
    sampler = tiny_sampler(steps=5)
    patch(sampler.pipe)
    set_thresholds(sampler.pipe, 0.3)
    with EveryNth(sampler.pipe, every) as steps, Densities(sampler.pipe) as densities:
        for _ in range(2):
            steps.restart()
            sampler.watch("x", 0)
    _, density = densities.result()
    assert {step for step, row in enumerate(density) if bool((row < 1).any())} == watched
    assert not any(module.dense_now for module in sparse_modules(sampler.pipe).values())


def test_every_nth_step_keeps_the_dense_schedule() -> None:
    sampler = tiny_sampler(steps=5)
    patch(sampler.pipe, dense_steps=shares_of_steps(sampler, "x", 2, 0))
    set_thresholds(sampler.pipe, 0.3)
    with EveryNth(sampler.pipe, 2), Densities(sampler.pipe) as densities:
        sampler.watch("x", 0)
    assert [bool((row < 1).all()) for row in densities.result()[1]] == [False, False, False, True, False]


def test_tuning_watches_what_it_says(tmp_path: Path) -> None:
    """Every second step only: half as many calls are seen, and the pipeline is as it was afterwards."""
    sampler = tiny_sampler(steps=4)
    patch(sampler.pipe, l1=0.3, pv_l1=0.35, tail=2.0)
    with pytest.raises(ValueError, match="it must exceed"):
        tune(sampler, PROMPTS[:2], show=False, l1=0.1, pv_l1=0.05)
    calls: list[int] = []
    observe = autotune.calibration.Calibration._observe

    def counting(self: Any, layer: Any, *args: Any, **options: Any) -> None:
        calls.append(layer.index)
        observe(self, layer, *args, **options)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(autotune.calibration.Calibration, "_observe", counting)
        calibration = tune(sampler, PROMPTS[:2], every=2, show=False)
    passes = calibration.expected_passes
    assert passes == 3 and len(calls) == passes * 2 * 2 * 2  # two of four steps, with guidance two calls, two layers


def test_dense_is_the_unpatched_pipeline() -> None:
    sampler = tiny_sampler()
    before = sampler.frames("x", 1)
    patch(sampler.pipe)
    set_thresholds(sampler.pipe, 0.3)
    assert not torch.equal(sampler.frames("x", 1), before)
    with dense(sampler.pipe):
        assert torch.equal(sampler.frames("x", 1), before)
    assert all(module.mode == "sparse" for module in sparse_modules(sampler.pipe).values())
    assert not torch.equal(sampler.frames("x", 2), sampler.frames("x", 1))


def comparison(noise: float, frames: int = 2) -> Comparison:
    torch.manual_seed(0)
    exact = torch.rand(frames, 32, 48, 3)
    return Comparison("p", 3, exact, (exact + noise * torch.rand_like(exact)).clamp(0, 1), (2.0, 1.0), [9.0, 5.0],
                      torch.tensor([[0.5, 1.0], [0.25, float("nan")]]))  # fmt: skip


def test_measures() -> None:
    c = comparison(0.2)
    assert c.sparsity == pytest.approx(1 - (0.5 + 1 + 0.25) / 3)
    assert c.psnr == pytest.approx(float(10 * torch.log10(1 / (c.sparse - c.dense).square().mean())), abs=1e-4)
    assert c.psnr == pytest.approx(float(psnr(c.sparse, c.dense)))
    assert 0.5 < c.ssim < 1 and ssim(c.dense, c.dense) == pytest.approx(1)
    assert comparison(0.5).ssim < c.ssim
    lines = table([c, comparison(0.5)]).splitlines()
    assert "0.50 of the dense ones'" in lines[-1] and lines[-2].startswith("worst")
    assert f"{comparison(0.5).psnr:.2f}" in lines[-2]


@pytest.mark.parametrize("frames", [1, 2])
def test_pictures(frames: int, tmp_path: Path) -> None:
    c = comparison(0.0, frames)
    paths = write([c, c, c], tmp_path / "new", {"model": "m"}, columns=2)
    assert all(path.stat().st_size for path in paths)
    assert json.loads((tmp_path / "new" / "compare.json").read_text())["clips"][0]["psnr"] is None  # infinite
    shown = animation([c, c, c], 2)
    assert len(shown) == frames
    picture = torch.from_numpy(np.array(shown[0])).float() / 255
    cell = 4 * 48  # 48 pixels are enlarged to 192
    left, right = (picture[40 : 40 + 4 * 32, x : x + cell] for x in (6, 6 + cell + 6))
    exact = c.dense[0].repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (left - exact).abs().max() < 0.01 and torch.equal(left, right)


def test_compare_uses_one_noise() -> None:
    sampler = tiny_sampler()
    patch(sampler.pipe)
    set_thresholds(sampler.pipe, 1.0)
    (same_noise,) = compare(sampler, ["x"], [5], warm_up=True)
    assert same_noise.psnr > 60 and same_noise.sparsity == pytest.approx(0, abs=1e-6)
    assert torch.equal(same_noise.dense, tiny_sampler().frames("x", 5))
