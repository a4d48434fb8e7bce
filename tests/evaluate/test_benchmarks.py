"""evaluate/benchmarks: what is exact, wrong results are not timed, published models, tables, CSV files and pictures."""

from __future__ import annotations

import csv
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import results
import run
import timing
import torch
from attention import AttentionCase, AttentionSetup, ragged_mask
from registry import CASES, PROVIDERS, Declined, Provider, Runs, Setup
from results import Row
from step_models import StepCase
from torch import Tensor

from spas_attn import backends
from spas_attn.selectors import TopK

pytestmark = pytest.mark.usefixtures("no_gpu")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
GQA = AttentionCase("small", 4, 2, 600, 32, is_causal=True)
STEPS = {name: case for name, case in CASES["steps"].items() if isinstance(case, StepCase)}
# Parameters in thousand millions, as published, and tokens that attend to each other at the usual size.
PUBLISHED = {
    "CogVideoX-2B": (1.69, 17776),
    "Wan2.1-1.3B": (1.42, 32760),
    "Wan2.1-14B": (14.29, 75600),
    "FLUX.1-dev": (11.90, 4608),
    "HunyuanVideo": (12.82, 118800 + 256),
}


def setup_of(case: AttentionCase, density: float = 0.5) -> AttentionSetup:
    return AttentionSetup(case, case.draw(torch.float32, torch.device("cpu")), TopK(density, pool=16), density)


def options(**changes: Any) -> Namespace:
    common: dict[str, Any] = {"ms": 1.0, "turns": 1, "densities": [1.0, 0.5], "pool": 16, "blocks": ["128x128"]}
    common |= {"scores": "means", "kind": "attention"}
    where = {"device": "CPU", "versions": "torch 2"}
    return Namespace(**(common | {"ragged": False, "device": torch.device("cpu"), "where": where} | changes))


def provider(make: Callable[[Setup], Runs], **changes: Any) -> Provider:
    return Provider(**({"name": "made up", "device": "cpu", "make": make, "limit": 1e-3} | changes))


@pytest.mark.parametrize("case", [GQA, AttentionCase("ragged", 2, 2, 1000, 64, batch=2)], ids=str)
def test_truth_is_the_references(case: AttentionCase) -> None:
    setup = setup_of(case)
    masked, dense = (backends.get("reference").run(setup.call(mask)) for mask in (setup.mask, None))
    assert setup.error(masked, dense=False) < 1e-6
    assert setup.error(dense, dense=True) < 1e-6
    assert setup.error(dense, dense=False) > 0.05
    rows = setup.rows()
    assert (rows[0].start, rows[-1].stop) == (0, case.length)
    broken = masked.clone()
    broken[:, -1, rows[1].start] = torch.nan
    assert not PROVIDERS["cpu"].holds(setup.error(broken, dense=False), setup)
    with pytest.raises(ValueError, match="shape"):
        setup.error(masked[:, :1], dense=False)


def test_density_is_what_was_asked_for() -> None:
    case = AttentionCase("x", 2, 2, 2048, 32)
    for density in (1.0, 0.5, 0.25):
        assert setup_of(case, density).kept == pytest.approx(density)
    mask = ragged_mask(case.causal(), 64, 128, 0.5)
    assert torch.allclose(mask.density(True), torch.tensor(0.5), atol=0.01)
    assert len(set(mask.counts[0, 0].tolist())) > 4 and bool((mask.counts > 0).all())


def test_effective_tflops() -> None:
    def tflops(name: str) -> float:
        setup = object.__new__(AttentionSetup)
        setup.case = CASES["attention"][name]  # type: ignore[assignment]
        return setup.tflops(5.33)

    assert (round(tflops("A")), round(tflops("A-causal"))) == (619, 309)


@pytest.mark.parametrize("precision", ["native", "int8_bf16", "int8_fp8"])
@pytest.mark.skipif("torch.cuda.is_available()", reason="Triton's interpreter runs only where there is no GPU")
def test_the_parts_of_a_call_fit_together(precision: str) -> None:
    """The kernel on what quantisation made gives what the whole call gives."""
    setup = setup_of(AttentionCase("x", 2, 1, 256, 32))
    runs = setup.ours("triton", precision)
    quant = set() if precision == "native" else {"ms_quant"}
    assert runs.parts.keys() == {"ms_total", "ms_select", "ms_kernel"} | quant
    tested = PROVIDERS["triton" if precision == "native" else f"triton-{precision}"]
    for out in (runs.output(), runs.parts["ms_kernel"]()):
        assert isinstance(out, Tensor) and tested.holds(setup.error(out, dense=False), setup)


def test_wrong_results_are_not_timed() -> None:
    timed: list[float] = []

    def make(setup: Setup) -> Runs:
        assert isinstance(setup, AttentionSetup)
        out = backends.get("reference").run(setup.call(setup.mask)) * (1.01 if setup.density < 1 else 1.0)
        return Runs(lambda: out, {"ms_total": lambda: timed.append(setup.density)})

    case = AttentionCase("x", 1, 1, 256, 32)
    right, wrong = run.run_case(case, torch.float32, options(providers=[provider(make)]))
    assert set(timed) == {1.0}
    assert right.tflops == pytest.approx(4 * 256**2 * 32 / (right.ms_total or 0) * 1e-9)
    assert (wrong.spent, wrong.tflops, wrong.speedup) == (None, None, None)
    assert wrong.rel_l1 == pytest.approx(0.01, rel=1e-3)


def test_dense_providers_run_once_and_refusals_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    def declines(setup: Setup) -> Runs:
        raise Declined("not today")

    last = provider(PROVIDERS["cpu-sdpa"].make, name="late", dense=True, last_resort=True)
    chosen = [PROVIDERS["cpu-sdpa"], last, provider(declines, name="shy"), PROVIDERS["cpu"]]
    rows = run.run_case(GQA, torch.float32, options(providers=chosen))
    assert [(row.provider, row.density, row.block) for row in rows] == [
        ("SDPA", 1.0, "dense"), ("spas_attn cpu", 1.0, "128x128"), ("spas_attn cpu", 0.5, "128x128"),
    ]  # fmt: skip
    assert rows[2].speedup == pytest.approx((rows[0].ms_total or 0) / (rows[2].ms_total or 0))
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("not today") == 1


def test_table_csv_and_picture(tmp_path: Path) -> None:
    common: dict[str, Any] = {"heads": 2, "head_dim": 64, "layers": "", "precision": "bf16", "device": "GPU"}
    rows = [
        Row("A", 99, density=1.0, kept=1.0, provider="ours", block="128x128", ms_total=2.0, tflops=600.0, **common),
        Row("A", 99, density=0.5, kept=0.6, provider="ours", block="128x128", ms_total=1.0, tflops=1200.0, **common),
        Row("A", 99, density=0.5, kept=0.5, provider="mask", block="64x64", ms_kernel=0.9, tflops=1300.0, **common),
        Row("A", 99, density=1.0, kept=None, provider="dense", block="dense", ms_total=1.9, tflops=620.0, **common),
        Row("B", 99, density=1.0, kept=1.0, provider="wrong", block="128x128", rel_l1=0.5, **common),
    ]
    assert [row.speedup for row in results.with_speedups(rows)] == [0.95, 1.9, 1.9 / 0.9, 1.0, None]
    results.write_csv(rows, tmp_path / "new" / "table.csv")
    assert results.read_csv(tmp_path / "new" / "table.csv") == rows
    text = results.table(rows)
    assert "ms_kernel" in text and "ms_quant" not in text and "1.900" in text
    results.picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.csv"))])
def test_published_tables_can_be_read(name: str) -> None:
    rows, card = results.read_csv(DOCS / name), re.findall("h[12]00", name)[0].upper()
    assert len(rows) >= 10 and all(row.spent is not None and f"NVIDIA {card}" in row.device for row in rows)


def test_attention_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "v1.5" / "cpu"
    run.main(["--tiny", "--cases", "A", "--ms", "1", "--densities", "1", "0.5", "--out", str(out)])
    rows = results.read_csv(tmp_path / "v1.5" / "cpu.csv")
    assert [(row.provider, row.density) for row in rows] == [
        ("SDPA", 1.0),
        ("spas_attn cpu", 1.0),
        ("spas_attn cpu", 0.5),
    ]
    assert all((row.tflops or 0) > 0 and (row.rel_l1 or 0) < 1e-5 for row in rows)
    (tmp_path / "v1.5" / "cpu.png").unlink()
    run.main(["--plot", str(out)])
    assert (tmp_path / "v1.5" / "cpu.png").exists()
    shown = [line for line in capsys.readouterr().out.splitlines() if "spas_attn cpu" in line]
    assert [line[:70] for line in shown[:2]] == [line[:70] for line in shown[2:]] and len(shown) == 4


def test_cpu_suite(tmp_path: Path) -> None:
    """Masks are given, so that no selection is timed; every block size and dtype is."""
    run.main(["cpu", "--shape", "1", "2", "640", "32", "--ms", "1", "--out", str(tmp_path / "cpu")])
    rows = results.read_csv(tmp_path / "cpu.csv")
    blocks = ["dense", "128x128", "128x64", "64x64"]
    assert [(row.precision, row.block) for row in rows] == [
        (dtype, block) for dtype in ("fp32", "bf16") for block in blocks
    ]
    assert all((row.ms_total is None) == (row.block != "dense") and row.ms_select is None for row in rows)


def test_says_what_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = torch.device("cpu")
    assert run.chosen_providers(["cpu", "sage"], cpu) == [PROVIDERS["cpu"]]
    assert "skipped sage: it runs on cuda" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="none of the providers"):
        run.chosen_providers(["sage"], cpu)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--densities", "0", "0.5"], "must lie in (0, 1]"),
        (["steps", "--tiny", "--turns", "0"], "argument --turns"),
        (["steps", "--tiny", "--cases", "A"], "--cases of steps are CogVideoX-2B"),
        (["steps"], "needs a GPU"),
        (["cpu", "--compile"], "for the suite 'steps'"),
    ],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# -- steps ------------------------------------------------------------------------------------------------------------


def step_setups(name: str, *densities: float) -> list[Setup]:
    some = options(densities=list(densities), all_layers=True)
    return list(STEPS[name].tiny().setups(torch.device("cpu"), torch.float32, some))


def tokens(case: StepCase) -> int:
    s = case.shape
    patch = 1 if case.class_name.startswith("Flux") else 2
    attends_to_text = not case.class_name.startswith("Wan")
    return s.frames * (s.height // patch) * (s.width // patch) + attends_to_text * s.text


@pytest.mark.parametrize("name", list(STEPS))
def test_configurations_are_the_published_ones(name: str) -> None:
    case = STEPS[name]
    with torch.device("meta"):
        model = getattr(diffusers, case.class_name)(**case.changes)
    parameters, length = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(parameters, abs=0.01)
    assert tokens(case) == length


@pytest.mark.parametrize("name", list(STEPS))
def test_models_run_in_bfloat16(name: str) -> None:
    """As on a GPU: made in bfloat16, with what the class keeps in float32 in float32."""
    device, small = torch.device("cpu"), STEPS[name].tiny()
    model = small.make(device, torch.bfloat16, every_layer=True)
    assert torch.get_default_dtype() == torch.float32
    kept = set(model._keep_in_fp32_modules or ())  # type: ignore[arg-type]
    for path, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if kept & set(path.split(".")) else torch.bfloat16), path
    with torch.inference_mode():
        out = model(**small.call(device, torch.bfloat16), return_dict=False)[0]
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_layers_that_were_left_out_are_told() -> None:
    assert {name: case.layers_text(False) for name, case in STEPS.items()} == {
        "CogVideoX-2B": "30", "Wan2.1-1.3B": "30", "Wan2.1-14B": "6 of 40", "FLUX.1-dev": "19+38",
        "HunyuanVideo": "2+4 of 20+40",
    }  # fmt: skip
    assert STEPS["HunyuanVideo"].layers_text(True) == "20+40"


def test_steps_without_a_gpu(tmp_path: Path) -> None:
    run.main(["steps", "--tiny", "--turns", "1", "--densities", "0.5", "1", "--out", str(tmp_path / "a.b")])
    with (tmp_path / "a.b.csv").open() as file:
        assert list(next(csv.DictReader(file)))[:3] == ["case", "tokens", "heads"]
    rows = results.read_csv(tmp_path / "a.b.csv")
    assert [row.case for row in rows] == [f"{name} tiny" for name in STEPS for _ in range(3)]
    assert all((row.heads, row.head_dim) == (2, 64) for row in rows)
    assert {row.case.split()[0]: row.tokens for row in rows} == {
        name: tokens(case.tiny()) for name, case in STEPS.items()
    }
    for dense, half, whole in (rows[i : i + 3] for i in range(0, len(rows), 3)):
        assert (dense.provider, dense.block, dense.speedup) == ("SDPA", "dense", 1.0)
        assert half.provider == whole.provider == "spas_attn cpu" and whole.kept == 1.0
        assert 0.5 <= (half.kept or 0) < 0.9  # rounded up, and with the text's blocks
        for row in (dense, half, whole):
            assert (row.ms_total or 0) > (row.ms_attention or 0) > 0
        assert half.speedup == pytest.approx((dense.ms_total or 0) / (half.ms_total or 1), rel=1e-3)


def test_forced_density_is_the_models_own_attention() -> None:
    """With every block kept, a step gives what the unpatched model gives."""
    some = options(densities=[0.3, 1.0], all_layers=True)
    few, every = STEPS["HunyuanVideo"].tiny().setups(torch.device("cpu"), torch.float32, some)
    dense, whole, part = (
        every.sdpa(None).output(),
        every.ours("cpu", "native").output(),
        few.ours("cpu", "native").output(),
    )
    assert torch.allclose(dense, whole, atol=1e-4)
    assert not torch.allclose(dense, part, atol=1e-4)


def test_a_step_that_falls_back_is_no_row() -> None:
    """The cpu backend has no 8 bits: such a step would run dense, so it is left out and said so."""
    (setup,) = (
        STEPS["Wan2.1-1.3B"]
        .tiny()
        .setups(torch.device("cpu"), torch.float32, options(densities=[0.5], all_layers=True))
    )
    with pytest.raises(Declined, match="int8_bf16"), pytest.warns(RuntimeWarning, match="dense attention"):
        setup.ours("cpu", "int8_bf16").output()


@pytest.mark.parametrize("density", [0.25, 0.5])
def test_exact_scores_keep_the_asked_share(density: float) -> None:
    case = AttentionCase("long", 2, 2, 2048, 64)
    given = options(scores="exact", densities=[density], blocks=["64x64"])
    (setup,) = case.setups(torch.device("cpu"), torch.float32, given)
    assert setup.kept == pytest.approx(density, abs=0.02)


def test_a_window_is_the_same_for_all_providers() -> None:
    case = AttentionCase("window", 2, 1, 1024, 64, is_causal=True, window=256)
    chosen = [PROVIDERS["cpu-sdpa"], PROVIDERS["cpu"]]
    dense, ours = run.run_case(case, torch.float32, options(providers=chosen, densities=[1.0]))
    assert dense.ms_total is not None and ours.ms_total is not None, "a wrong result is not timed"
    assert dense.tflops == pytest.approx(4 * 2 * 256 * (1024 - 128) * 64 / dense.ms_total * 1e-9)


def test_blocks_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **given: compiled.append((block, given)))
    case = replace(STEPS["FLUX.1-dev"].tiny(), compiled=True)
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would take the setting away at its end
        (setup,) = case.setups(torch.device("cpu"), torch.float32, options(densities=[0.5], all_layers=True))
        assert torch._dynamo.config.recompile_limit > 8
    model = setup.model
    blocks = [*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks]
    assert compiled == [(block, {"fullgraph": True}) for block in blocks]
    dense, sparse = setup.sdpa(None), setup.ours("cpu", "native")
    assert dense.within == sparse.within == {}, "a clock would break the graph"
    assert not torch.allclose(dense.output(), sparse.output())
    assert setup.facts()["tokens"] == tokens(case)


@pytest.mark.gpu
def test_runs_are_prepared_before_they_are_timed_on_a_gpu() -> None:
    """The runs of a compiled model share it."""
    x, state = torch.randn(64, 64, device="cuda"), [""]
    seen: dict[str, set[str]] = {"a": set(), "b": set()}

    def runs(name: str) -> Runs:
        def call() -> Tensor:
            seen[name].add(state[0])
            return x + 1

        return Runs(call, {"ms_total": call}, before=lambda: state.__setitem__(0, name))

    timing.medians([runs("a"), runs("b")], torch.device("cuda"), 2.0, 1)
    assert seen == {"a": {"a"}, "b": {"b"}}


@pytest.mark.gpu
def test_facts_of_a_call_on_a_gpu() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    facts = timing.call_facts(lambda: torch.relu(x) + 1, 5.0)
    assert facts["launches"] == 2
    assert 0 < facts["ms_graph"] < 5
    assert 4 <= facts["peak_MiB"] <= 8
    assert facts["us_host"] > 0


def test_auto_is_timed_whatever_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it takes dense attention its output is compared with that, and all its blocks count as kept."""
    case = AttentionCase("auto", 2, 2, 512, 64)
    auto = replace(PROVIDERS["auto"], device="cpu")
    given = options(providers=[PROVIDERS["cpu-sdpa"], auto], densities=[0.5])
    _, sparse = run.run_case(case, torch.float32, given)
    assert sparse.ms_total is not None and sparse.kept is not None and sparse.kept < 0.7
    monkeypatch.setattr(AttentionSetup, "dense_by_choice", lambda self, precision: "sdpa")
    _, wrong = run.run_case(case, torch.float32, given)
    assert wrong.ms_total is None and wrong.kept == 1.0, "it ran sparse, which is not what dense attention gives"
