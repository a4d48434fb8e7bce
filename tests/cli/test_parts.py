"""What the command is made of: texts, sizes, schedules, comparisons and pictures."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autotune import Tuned, dense
from autotune.module import sparse_modules
from autotune.tuned import PV_OFF
from modify_model import patch
from modify_model.cli.compare import Comparison, Densities, compare, table
from modify_model.cli.diffusion import PIPELINES, PROMPTS, Sampler, Size, check_size, load
from modify_model.cli.driver import selector_of, tune
from modify_model.cli.language import DEMO, encode, load_model, token_windows
from modify_model.cli.pictures import panel, write
from modify_model.cli.tiny import TINY
from spas_attn.selectors import ExactKeys, MeanSimilarity


def tiny_sampler(steps: int = 3) -> Sampler:
    return load("tiny:Wan", steps=steps, device="cpu")


def set_thresholds(pipe: Any, threshold: float) -> None:
    """The same thresholds for every head of a patched pipeline."""
    for module in sparse_modules(pipe).values():
        full = torch.ones(module.heads or 0)
        module.set_thresholds(Tuned(full.bool(), full * threshold, -full, full * PV_OFF))


def test_a_selector_keeps_what_the_arguments_leave_out() -> None:
    usual = ExactKeys(0.995, pool=16, queries="sample", rank="peak", block_q=64, block_k=64)
    assert selector_of(argparse.Namespace(selector=None, block=None, pool=None), usual) == usual
    named = selector_of(argparse.Namespace(selector="exactkeys", block=128, pool=32), usual)
    assert named == ExactKeys(0.995, pool=32, queries="sample", rank="peak")
    other = selector_of(argparse.Namespace(selector="exactkeys", block=None, pool=None), MeanSimilarity(pool=8))
    assert other == ExactKeys()


# -- language models --------------------------------------------------------------------------------------------------


class _Words:
    """A tokenizer of words that puts a beginning-of-text token, as real LLaMA tokenizers do."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [2 + len(word) for word in text.split()]}


def test_token_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a " * 300)
    (tmp_path / "b.py").write_text("bb " * 300)
    bytes_ = load_model("tiny:Llama", device="cpu")[1]
    for tokenizer in (_Words(), bytes_):
        for source in (None, tmp_path, tmp_path / "a.txt"):
            found = token_windows(tokenizer, source, 100, 3, seed=1)
            assert [tuple(ids.shape) for ids in found] == [(1, 100)] * 3
            again = token_windows(tokenizer, source, 100, 3, seed=1)
            assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    halves = [token_windows(_Words(), tmp_path, 50, 4, seed=0, group=group) for group in ("calibration", "unseen")]
    assert [{int(ids[0, 1]) for ids in half} for half in halves] == [{3}, {4}]
    assert encode(_Words(), "a bb").tolist() == [[1, 3, 4]]
    assert encode(bytes_, "ab").tolist() == [[100, 101]]
    with pytest.raises(ValueError, match="fewer than one window"):
        token_windows(_Words(), tmp_path / "a.txt", 1000, 1, seed=0)
    with pytest.raises(ValueError, match="group must be"):
        token_windows(_Words(), None, 10, 1, seed=0, group="test")
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(ValueError, match="pip install datasets"):
            token_windows(_Words(), "no/such", 10, 1, seed=0)


def test_without_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed command has no demo texts; Python's own library serves."""
    monkeypatch.setattr("modify_model.cli.language.DEMO", tmp_path / "nowhere")
    (window,) = token_windows(_Words(), None, 100, 1, seed=0, group="unseen")
    assert window.shape == (1, 100)


def test_rows_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"content": "w " * 200}] * 7
    module = type("datasets", (), {"load_dataset": staticmethod(lambda *_, **options: iter(rows))})
    monkeypatch.setitem(__import__("sys").modules, "datasets", module)
    assert token_windows(_Words(), "owner/name:part", 100, 2, seed=0, group="unseen")[1].shape == (1, 100)


def test_load_model() -> None:
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        load_model(DEMO, device="nowhere")
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(DEMO, dtype="int8")
    model, _ = load_model(DEMO, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("CogVideoX", (264, 256, 9, 1), "--height must be a multiple of 16 .*, got 264; nearest: 256 and 272"),
        ("Flux", (512, 8, None, 1), "--width must be a multiple of 16 for this model, got 8; nearest: 16"),
        ("HunyuanDiT", (1032, 512, None, 1), "--height must be a multiple of 16 .*; nearest: 1024 and 1040"),
        ("LTX-Video", (512, 720, 161, 1), "--width must be a multiple of 32 .*, got 720; nearest: 704 and 736"),
        ("LTX-Video", (512, 704, 160, 1), "--frames must be a multiple of 8 plus 1 .*; nearest: 153 and 161"),
        ("Mochi", (480, 848, 20, 1), "--frames must be a multiple of 6 plus 1 .*; nearest: 19 and 25"),
        ("SD3", (1024, 1000, None, 1), "--width must be a multiple of 16 .*; nearest: 992 and 1008"),
        ("Wan", (480, 832, 10, 1), "--frames must be a multiple of 4 plus 1 .*, got 10; nearest: 9 and 13"),
    ],
)
def test_sizes(family: str, size: tuple[Any, ...], message: str) -> None:
    pipe = TINY[family].make()
    check_size(pipe, PIPELINES[type(pipe).__name__])
    with pytest.raises(ValueError, match=message):
        check_size(pipe, Size(*size))


def test_too_small_a_picture_is_named() -> None:
    sampler = tiny_sampler(steps=2)
    patch(sampler.pipe)
    sampler.size = Size(32, 48, 5, 2)
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"fewer than 128 queries.*\(see --height\)"):
        tune(sampler, sampler.items(PROMPTS[:1], 0), show=False, hint="see --height")


@pytest.mark.parametrize("family", ["Flux", "Wan"])
def test_tiny_models_have_the_dtype_asked_for(family: str) -> None:
    sampler = load(f"tiny:{family}", steps=1, device="cpu", dtype="bfloat16")
    layers = [module for path, module in sampler.pipe.transformer.named_modules() if path.endswith("to_q")]
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    assert bool(sampler.frames("x", 0).isfinite().all())


def test_shares_of_steps_use_the_pipelines_schedule() -> None:
    sampler = tiny_sampler(steps=5)
    shares = sampler.shares_of_steps(2, 1)
    levels = sampler.pipe.scheduler.timesteps.double() / 1000
    patch(sampler.pipe, dense_steps=shares)
    set_thresholds(sampler.pipe, 0.3)
    with Densities(sampler.pipe) as densities:
        sampler.watch("x", 0)
    timesteps, density = densities.result()
    assert [round(level / 1000, 3) for level in timesteps] == [round(float(level), 3) for level in levels]
    assert (density == 1).all(1).tolist() == [True, True, False, False, True]


# -- comparisons ------------------------------------------------------------------------------------------------------


def test_compare_uses_one_noise() -> None:
    sampler = tiny_sampler()
    before = sampler.frames("x", 5)
    patch(sampler.pipe)
    set_thresholds(sampler.pipe, 1.0)
    items = [("x", 5, item) for item in sampler.items(["x"], 5)]
    (same_noise,) = compare(sampler, items, warm_up=True)
    assert same_noise.figures["PSNR dB"] > 60 and same_noise.sparsity == pytest.approx(0, abs=1e-6)
    assert torch.equal(same_noise.dense, before)
    set_thresholds(sampler.pipe, 0.3)
    assert not torch.equal(sampler.frames("x", 5), before)
    with dense(sampler.pipe):
        assert torch.equal(sampler.frames("x", 5), before)


def comparison(noise: float, frames: int = 2) -> Comparison:
    torch.manual_seed(0)
    exact = torch.rand(frames, 32, 48, 3)
    other = (exact + noise * torch.rand_like(exact)).clamp(0, 1)
    figures = Sampler.figures(None, (), exact, other)  # type: ignore[arg-type]
    density = torch.tensor([[0.5, 1.0], [0.25, float("nan")]])
    return Comparison("p", 3, exact, other, figures, (2.0, 1.0), [9.0, 5.0], density)


def test_measures() -> None:
    c, worse = comparison(0.2), comparison(0.5)
    assert c.sparsity == pytest.approx(1 - (0.5 + 1 + 0.25) / 3)
    expected = float(10 * torch.log10(1 / (c.sparse - c.dense).square().mean()))
    assert c.figures["PSNR dB"] == pytest.approx(expected, abs=1e-4)
    assert 0.5 < worse.figures["SSIM"] < c.figures["SSIM"] < 1 and comparison(0.0).figures["SSIM"] == pytest.approx(1)
    lines = table([c, worse]).splitlines()
    assert lines[0] == "prompt  seed  PSNR dB    SSIM  sparsity  dense s  sparse s"
    assert "0.50 of the dense ones'" in lines[-1] and lines[-2].startswith("worst")
    assert f"{worse.figures['PSNR dB']:.2f}" in lines[-2]


@pytest.mark.parametrize("frames", [1, 2])
def test_pictures(frames: int, tmp_path: Path) -> None:
    c = comparison(0.0, frames)
    paths = write([c, c, c], tmp_path / "new", {"model": "m"})
    assert all(path.stat().st_size for path in paths)
    assert json.loads((tmp_path / "new" / "compare.json").read_text())["clips"][0]["psnr"] is None  # infinite
    picture = torch.from_numpy(np.array(panel([c, c, c], [0]))).float() / 255
    cell = 4 * 48  # 48 pixels are enlarged to 192
    left, right = (picture[20 : 20 + 4 * 32, x : x + cell] for x in (0, cell + 6))
    exact = c.dense[0].repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (left - exact).abs().max() < 0.01 and torch.equal(left, right)
