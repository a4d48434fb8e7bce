"""The sweeps: calibrations without and with guidance, curves that are computed once, tables and pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sweep
import sweep_llama
import sweep_scores
import sweep_video
import torch

import autotune
from autotune.module import sparse_modules
from modify_model import patch
from modify_model.cli.tiny import llama
from spas_attn.selectors import MeanSimilarity, PeakMass

pytestmark = pytest.mark.usefixtures("no_gpu")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


@pytest.mark.slow
def test_sweep_of_video(
    tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two guidances, two selectors, two bounds; curves are computed once per guidance and selector."""
    base = ["--out", str(tmp_path / "new" / "sweep"), "--model_name", str(tiny_demo)]
    names = ["64x64, pool 8", "128x128, block means"]
    bounds = ["--mean_bounds", "0.05", "--tail_bounds", "3"]
    short = ["--clips", "1", "--seeds", "1", "--steps", "2", "--guidance", "1", "2"]
    computed = []
    add_curves = autotune.passes.add_curves
    monkeypatch.setattr(autotune.passes, "add_curves", lambda *args: (computed.append(1), add_curves(*args)))
    main = sweep_video.VideoSweep, sweep_video.__doc__
    assert sweep.main(*main, [*base, "--selectors", *names, *bounds, *short]) == 0
    # Three prompts fitted, one of two steps watched, one call without and two with guidance, one layer, two selectors.
    assert len(computed) == 3 * 1 * (1 + 2) * 1 * 2
    data = json.loads((tmp_path / "new" / "sweep.json").read_text())
    settings = [(g, n, t) for g in (1.0, 2.0) for n in names for t in (None, 3.0)]
    assert [(r["guidance"], r["selector"], r["tail"]) for r in data["results"]] == settings
    assert list(data["facts"]["recognised_dense"]) == ["1", "2"] and data["facts"]["dtype"] == "torch.float32"
    for at in range(0, len(settings), 2):
        tight, loose = data["results"][at : at + 2]
        assert tight["sparsity"] < loose["sparsity"] < 1
        assert tight["psnr_mean"] > loose["psnr_mean"] > 5
    assert all(len(r["sparsity_by_layer"]) == 1 and len(r["sparsity_by_step"]) == 2 for r in data["results"])
    shown = capsys.readouterr().out
    assert sweep.main(*main, [*base, "--plot"]) == 0
    again = capsys.readouterr().out
    assert again in shown and "| 64x64, pool 8 | 2 | tail |" in again
    assert (tmp_path / "new" / "sweep.png").stat().st_size > 10_000
    assert sweep.main(*main, ["--out", str(tmp_path / "none"), "--plot"]) == 2


@pytest.mark.parametrize(
    ("kind", "name"),
    [(sweep_llama.LlamaSweep, "64x64, peak mass"), (sweep_scores.ScoreSweep, "16:quest0.3+union:64")],
)
def test_sweep_of_language(
    kind: type[sweep_llama.LlamaSweep], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = sweep.Setting(kind.settings[name].selector, ((0.05, None), (1.0, 0.6)))
    monkeypatch.setitem(kind.settings, name, small)
    short = ["--max_length", "512", "--samples", "2", "--unseen", "2", "--copies", "2"]
    assert sweep.main(kind, "", ["--out", str(tmp_path / "sweep"), "--selectors", name, *short]) == 0
    data = json.loads((tmp_path / "sweep.json").read_text())
    mean, tail = data["results"]
    assert 0.5 < data["facts"]["bits_per_byte"] < 1.5 and mean["copy_dense"] >= 0.5
    for row in (mean, tail):
        assert 0 < row["sparsity"] < 1 and len(row["sparsity_by_layer"]) == 6
        assert row["top1"] > 0.9 and 0 <= row["kl"] < 0.2 and row["within_unseen"] > 0.5
    assert mean["mean_error"] < 0.1 and tail["tail_error"] <= 0.6
    assert (tmp_path / "sweep.png").is_file()


@pytest.mark.parametrize("kind", [sweep_llama.LlamaSweep, sweep_video.VideoSweep])
def test_published_results_can_be_shown(
    kind: type[sweep.Sweep], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "published.json").write_text((DOCS / f"{Path(kind.out).name}.json").read_text())
    assert sweep.main(kind, "", ["--out", str(tmp_path / "published"), "--plot"]) == 0
    assert capsys.readouterr().out.count("| 64x64, peak mass |") >= 4
    assert (tmp_path / "published.png").stat().st_size > 50_000


def test_at_aim() -> None:
    def result(sparsity: float, mean: float, worst: float) -> dict[str, Any]:
        return {"selector": "s", "guidance": 1.0, "l1": 0.3, "tail": 0.5, "sparsity": sparsity, "psnr_mean": mean,
                "psnr_worst": worst}  # fmt: skip

    some = [result(0.5, 26, 24), result(0.3, 34, 30), result(0.4, 30, 28)]
    assert sweep_video.at_aim(some) == pytest.approx((0.4, 28))
    assert sweep_video.at_aim(some, 32.0) == pytest.approx((0.35, 29))
    assert all(math.isnan(value) for value in sweep_video.at_aim(some, 40.0))
    assert [r["sparsity"] for r in sweep_video.lines(some)[1.0, "s", "tail"]] == [0.3, 0.4, 0.5]
    assert sweep_video.kind_of({"l1": 0.06, "tail": 0.4}) == "l1 0.06 and tail"
    assert sweep_video.kind_of({"l1": 0.3, "tail": None}) == "mean"


JOINED = ["8:mean", "8:power2", "8:union+mix", "16:quest0.3+union", "1:max"]
SCORED = ["8:anti", "16:kvar+qvar", "8:kvar+max+window2"]


@pytest.mark.parametrize("variant", [*JOINED, *SCORED])
def test_variants_are_selectors(variant: str) -> None:
    selector = sweep_scores.setting(f"{variant}:64").selector
    assert isinstance(selector, sweep_scores.Variant)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 512, 16, generator=generator), torch.randn(1, 2, 512, 16, generator=generator)
    few, many = (
        sweep_scores.Variant.from_dict(selector.to_dict() | {"cdf_threshold": share}).select(q, k, is_causal=True)
        for share in (0.3, 0.9)
    )
    assert few.density(True).mean() < many.density(True).mean()
    assert bool((few.counts > 0).all())


def test_variants_that_the_library_has() -> None:
    """The defaults of the library, written as variants."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 512, 16, generator=generator) for _ in range(2))
    sizes = {"block_q": 64, "block_k": 64, "local": 128}
    for variant, known in (
        ("8:mean+window2:64", MeanSimilarity(0.9, pool=8, **sizes)),
        ("8:kvar+max+window2:64", PeakMass(0.9, pool=8, **sizes)),
    ):
        mine = sweep_scores.setting(variant).selector
        mine.cdf_threshold = 0.9  # type: ignore[attr-defined]
        ours, theirs = (selector.select(q, k, is_causal=True).to_dense() for selector in (mine, known))
        assert torch.equal(ours, theirs)


def test_errors_on_unseen_windows() -> None:
    """Nothing is left out, nothing is wrong."""
    model = patch(llama(), selector=MeanSimilarity(block_q=64, block_k=64), backend="cpu")
    for module in sparse_modules(model).values():
        one = torch.ones(module.heads or 0)
        module.set_thresholds(autotune.Tuned(one.bool(), one, -one, 50 * one))
    windows = [torch.randint(3, 259, (1, 256), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        found = sweep_llama.errors_on(model, windows)
    assert found.keys() == sparse_modules(model).keys()
    for tally in found.values():
        assert len(tally.sums) == 2 and float(tally.density().min()) == 1.0 and int(tally.histogram[..., 1:].sum()) == 0
