"""benchmark_steps.py: real configurations without weights, and the whole program on small ones."""

from __future__ import annotations

import csv
from pathlib import Path

import benchmark_steps
import diffusers
import pytest
import torch
from _step_models import MODELS, StepModel

# Parameters in thousand millions, as published, and tokens that attend to each other at the usual size.
PUBLISHED = {
    "CogVideoX-2B": (1.69, 17776),
    "Wan2.1-1.3B": (1.42, 32760),
    "Wan2.1-14B": (14.29, 75600),
    "FLUX.1-dev": (11.90, 4608),
    "HunyuanVideo": (12.82, 118800 + 256),
}


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def tokens(model: StepModel) -> int:
    s = model.shape
    patch = 1 if model.class_name.startswith("Flux") else 2
    attends_to_text = not model.class_name.startswith("Wan")
    return s.frames * (s.height // patch) * (s.width // patch) + attends_to_text * s.text


@pytest.mark.parametrize("name", list(MODELS))
def test_configurations_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, MODELS[name].class_name)(**MODELS[name].config)
    parameters, length = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(parameters, abs=0.01)
    assert tokens(MODELS[name]) == length


@pytest.mark.parametrize("name", list(MODELS))
def test_models_run_in_bfloat16(name: str) -> None:
    """As on a GPU: made in bfloat16, with what the class keeps in float32 in float32."""
    device, small = torch.device("cpu"), MODELS[name].small()
    model = small.make(device, torch.bfloat16, everything=True)
    assert torch.get_default_dtype() == torch.float32
    kept = set(model._keep_in_fp32_modules or ())  # type: ignore[arg-type]
    for path, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if kept & set(path.split(".")) else torch.bfloat16), path
    with torch.inference_mode():
        out = model(**small.call(device, torch.bfloat16), return_dict=False)[0]
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--device", "cpu", "--repeats", "1", "--density", "0.5", "1", "--out", str(tmp_path / "a.b")]
    assert benchmark_steps.main(arguments) == 0
    with (tmp_path / "a.b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["model", "tokens", "layers"]
    assert [row["model"] for row in rows] == [f"{name} tiny" for name in MODELS for _ in range(3)]
    for row in rows:
        assert float(row["ms_step"]) > float(row["ms_attention"]) > 0 and row["peak_GiB"] == ""
        assert float(row["attention_share"]) == pytest.approx(
            float(row["ms_attention"]) / float(row["ms_step"]), rel=1e-3
        )
        assert (row["heads"], row["head_dim"]) == ("2", "64")
    for dense, half, whole in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        assert (dense["provider"], dense["kept"], dense["speedup"]) == ("SDPA", "1", "1")
        assert whole["kept"] == "1" and 0.5 <= float(half["kept"]) < 0.9  # rounded up, and with the text's blocks
        assert half["provider"] == whole["provider"] == "spas_attn cpu"
        assert float(half["speedup"]) == pytest.approx(float(dense["ms_step"]) / float(half["ms_step"]), rel=1e-3)
    shown = capsys.readouterr().out
    assert shown.count("SDPA") == len(MODELS) and "1+1" in shown
    lengths = {row["model"].split()[0]: int(row["tokens"]) for row in rows}
    assert lengths == {name: tokens(model.small()) for name, model in MODELS.items()}


def test_forced_density_is_the_models_own_attention() -> None:
    """With every block kept, a step gives what the unpatched model gives."""
    model, device = MODELS["HunyuanVideo"].small(), torch.device("cpu")
    args = benchmark_steps.parse_arguments(["--tiny", "--repeats", "1"])
    bench = benchmark_steps.Bench(model, device, args)
    outputs = []
    for keep in (None, 1.0, 0.3):
        bench.set(keep=keep)
        with torch.inference_mode():
            outputs.append(bench.transformer(**bench.inputs, return_dict=False)[0])
    torch.manual_seed(0)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)


def test_layers_that_were_left_out_are_told() -> None:
    args = benchmark_steps.parse_arguments([])
    bench = object.__new__(benchmark_steps.Bench)
    bench.args, texts = args, {}
    for name, model in MODELS.items():
        bench.model = model
        texts[name] = bench.layers_text()
    assert texts == {
        "CogVideoX-2B": "30", "Wan2.1-1.3B": "30", "Wan2.1-14B": "6 of 40", "FLUX.1-dev": "19+38",
        "HunyuanVideo": "2+4 of 20+40",
    }  # fmt: skip
    args.all_layers = True
    assert bench.layers_text() == "20+40"


def test_a_declined_call_is_no_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cpu backend has no 8 bits: such a step would run dense, so it is left out and said so."""
    arguments = ["--tiny", "--repeats", "1", "--models", "Wan2.1-1.3B", "--density", "0.5", "--precision", "int8_bf16"]
    with pytest.warns(RuntimeWarning, match="running exact dense attention"):
        assert benchmark_steps.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "skipped int8_bf16: precision 'int8_bf16' is not available" in shown and "spas_attn cpu" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--density", "1.5"], "must lie in (0, 1]"), (["--repeats", "0"], "at least 1"), (["--models", "X"], "invalid")],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark_steps.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_real_size_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_steps.main([]) == 2
    assert "need a GPU" in capsys.readouterr().err
