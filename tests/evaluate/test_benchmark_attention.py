"""benchmark_attention.py: what is exact, wrong results are not timed, the table, the picture, a run without a GPU."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_attention
import pytest
import torch
from _benchmark_cases import CASES, Case, Setup
from _benchmark_providers import PROVIDERS, Declined, Provider, Runs, _ours
from _benchmark_report import Row, picture, read_csv, write_csv
from torch import Tensor

from spas_attn import backends

ROOT = Path(__file__).resolve().parents[2]
GQA = Case("small", 4, 2, 600, 32, is_causal=True)


def setup_of(case: Case, density: float = 0.5, pool: int = 16) -> Setup:
    return Setup.of(case, case.draw(torch.float32, "cpu"), density, pool)


@pytest.mark.parametrize("case", [GQA, Case("ragged", 2, 2, 1000, 64, batch=2)], ids=str)
def test_truth_is_the_references(case: Case) -> None:
    setup = setup_of(case)
    masked = backends.get("reference").run(setup.call())
    dense = backends.get("reference").run(setup.call().replace(mask=None))
    assert setup.error(masked, masked=True) < 1e-6
    assert setup.error(dense, masked=False) < 1e-6
    assert setup.error(dense, masked=True) > 0.05
    rows = setup.rows()
    assert (rows[0].start, rows[-1].stop) == (0, case.length)
    broken = masked.clone()
    broken[:, -1, rows[1].start] = torch.nan
    assert not setup.error(broken, masked=True) <= 1.0
    with pytest.raises(ValueError, match="shape"):
        setup.error(masked[:, :1], masked=True)


def test_density_is_what_was_asked_for() -> None:
    for density in (1.0, 0.5, 0.25):
        setup = setup_of(Case("x", 2, 2, 2048, 32), density)
        assert torch.allclose(setup.mask.density(), torch.tensor(density))


def test_effective_tflops() -> None:
    assert CASES["A"].tflops(5.33) == pytest.approx(619, abs=1)
    assert CASES["A-causal"].tflops(5.33) == pytest.approx(309, abs=1)
    assert CASES["Llama-3.1-8B-128K"].heads == 4 * CASES["Llama-3.1-8B-128K"].k_heads
    assert CASES["A"].causal() == CASES["A-causal"] == CASES["A-causal"].causal()


@pytest.mark.parametrize("precision", ["bf16", "int8_bf16", "int8_fp8"])
@pytest.mark.skipif("torch.cuda.is_available()", reason="Triton's interpreter runs only where there is no GPU")
def test_the_parts_of_a_call_fit_together(precision: str) -> None:
    """The kernel on what quantisation made gives what the whole call gives."""
    setup = setup_of(Case("x", 2, 1, 256, 32))
    runs = _ours(setup, "triton", precision)
    assert runs.total is not None
    assert runs.select is not None
    assert runs.kernel is not None
    assert (runs.quant is None) == (precision == "bf16")
    limit = PROVIDERS[f"triton-{precision}"].limit
    out, alone = runs.output(), runs.kernel()
    assert isinstance(alone, Tensor)
    assert setup.error(out, masked=True) <= limit
    assert setup.error(alone, masked=True) <= limit
    if runs.quant is not None:
        runs.quant()


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"ms": 1.0, "densities": [1.0, 0.5], "pool": 16, **changes})


def provider(make: Callable[[Setup], Runs], **changes: Any) -> Provider:
    return Provider(**{"name": "made up", "precision": "fp32", "device": "cpu", "limit": 1e-3,
                       "missing": lambda: None, "make": make, **changes})  # fmt: skip


def test_wrong_results_are_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[float] = []

    def make(setup: Setup) -> Runs:
        wrong = backends.get("reference").run(setup.call()) * (1.01 if setup.density < 1 else 1.0)
        return Runs(lambda: wrong, lambda: calls.append(setup.density))

    rows, wrong = benchmark_attention.run_case(Case("x", 1, 1, 256, 32), options(), [provider(make)])
    assert set(calls) == {1.0}
    right, bad = rows
    assert right.ms_total is not None
    assert right.tflops == pytest.approx(4 * 256**2 * 32 / right.ms_total * 1e-9)
    assert (bad.ms_total, bad.tflops) == (None, None)
    assert bad.rel_l1 == pytest.approx(0.01, rel=1e-3)
    assert len(wrong) == 1
    assert "made up" in wrong[0]
    assert "WRONG" in capsys.readouterr().out


def test_dense_providers_run_once_and_refusals_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    def declines(setup: Setup) -> Runs:
        raise Declined("not today")

    chosen = [PROVIDERS["cpu-sdpa"], provider(declines, name="shy")]
    rows, wrong = benchmark_attention.run_case(GQA, options(), chosen)
    assert [(row.provider, row.density, row.block) for row in rows] == [("SDPA", 1.0, "dense")]
    assert wrong == []
    assert capsys.readouterr().out.count("not today") == 1


def test_table_and_picture(tmp_path: Path) -> None:
    common = {"device": "GPU", "versions": "torch 2"}
    rows = [
        Row("A", 1.0, "ours", "bf16", "128x128", 2.0, 0.1, None, 1.9, 600.0, 0.002, **common),
        Row("A", 0.5, "ours", "bf16", "128x128", 1.0, 0.1, 0.2, 0.9, 1200.0, 0.002, **common),
        Row("A", 0.5, "mask", "bf16", "128x128", None, None, None, 0.9, 1300.0, 0.002, **common),
        Row("A", 1.0, "dense", "bf16", "dense", 1.9, None, None, None, 620.0, 0.002, **common),
        Row("B", 1.0, "wrong", "int8", "128x128", None, None, None, None, None, 0.5, **common),
    ]
    write_csv(rows, tmp_path / "new" / "table.csv")
    assert read_csv(tmp_path / "new" / "table.csv") == rows
    header = (tmp_path / "new" / "table.csv").read_text().splitlines()[0]
    assert header == (
        "case,density,provider,precision,block,ms_total,ms_select,ms_quant,ms_kernel,tflops,rel_l1,device,versions"
    )
    picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "1.900" in str(rows[0])


def test_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "evaluate/benchmark_attention.py", "--ms", "1", "--densities", "1", "0.5"]
    command += ["--cases", "cpu", "--providers", "cpu", "cpu-sdpa", "--out", str(tmp_path / "v1.5" / "cpu")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "no CUDA GPU: a small case" in done.stdout
    with (tmp_path / "v1.5" / "cpu.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["provider"], float(row["density"])) for row in table] == [
        ("spas_attn cpu", 1.0), ("SDPA", 1.0), ("spas_attn cpu", 0.5),
    ]  # fmt: skip
    assert all(float(row["tflops"]) > 0 and float(row["rel_l1"]) < 1e-5 for row in table)
    assert (tmp_path / "v1.5" / "cpu.png").exists()


def test_says_what_cannot_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options(providers=["cpu", "sage"])
    assert benchmark_attention.chosen_providers(asked, "cpu") == [PROVIDERS["cpu"]]
    assert "skipped sage: it runs on cuda" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="none of the providers"):
        benchmark_attention.chosen_providers(options(providers=["sage"]), "cpu")
    monkeypatch.setattr(sys, "argv", ["benchmark_attention.py", "--densities", "0", "0.5"])
    with pytest.raises(SystemExit):
        benchmark_attention.main()
    assert r"must lie in (0, 1]" in capsys.readouterr().err
