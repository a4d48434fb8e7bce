"""The study of the frontier: curves of many selectors at once, choices for a sparsity, probes, the programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import curves
import frontier
import frontier_results
import frontier_settings
import frontier_video
import numpy as np
import pytest
import torch
from curves import Curves
from probes import Probe

from autotune import Grid, SparseAttention
from autotune.accumulate import PromptTally, add_curves
from autotune.choose import mean_error, tail_error
from spas_attn.call import Call
from spas_attn.selectors import ExactKeys, MeanSimilarity, Selector

pytestmark = pytest.mark.usefixtures("no_gpu")
SMALL: Any = {"block_q": 64, "block_k": 64}


def call(length: int = 700, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, length, 32, generator=generator) for heads in (4, 2, 2))
    return Call.make(2 * q, k, v, is_causal=True)


def test_curves_are_those_of_a_calibration() -> None:
    selectors: dict[str, Selector] = {"a": MeanSimilarity(pool=8, **SMALL), "b": ExactKeys(pool=32, **SMALL)}
    group = {name: (selector, selector.candidates) for name, selector in selectors.items()}
    counts = [len(selector.candidates) for selector in selectors.values()]
    both, blocks = PromptTally(4, sum(counts)), [0, 3, 7, 10]
    curves.add(both, group, call(), blocks)
    together = both.close(0)
    for at, selector in enumerate(selectors.values()):
        alone = PromptTally(4, counts[at])
        add_curves(alone, SparseAttention(selector=selector), call(), Grid(), blocks)
        expected, part = alone.close(0), slice(sum(counts[:at]), sum(counts[: at + 1]))
        assert torch.equal(together.density()[:, part], expected.density())
        for of in (mean_error, tail_error):  # products of other shapes round otherwise
            torch.testing.assert_close(of(together)[:, part], of(expected), rtol=1e-5, atol=1e-6)
        assert expected.density().min() < 0.6 and mean_error(expected).max() > 0.1


def test_mean_square_of_the_queries() -> None:
    tally, errors = PromptTally(1, 1), torch.tensor([0.5, 0.02, 0.0, 0.9]).view(1, 1, 1, 4)
    ones = torch.ones(1, 1, 4)
    tally.add_errors(slice(None), errors, ones, ones.bool())
    assert float(curves.mean_square(tally.close(0))) == pytest.approx(float(errors.square().mean()), rel=0.2)


def toy(seed: int = 0) -> Curves:
    """Two layers of three heads: error falls with density, each head at its own rate."""
    density = torch.linspace(0.05, 0.95, 40, dtype=torch.float64).expand(2, 3, -1)
    rate = torch.tensor([[1.0, 2.0, 4.0], [8.0, 3.0, 1.5]], dtype=torch.float64)[..., None]
    error = (1 - density) ** rate
    share = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64)
    return Curves(
        torch.linspace(0.1, 0.99, 40, dtype=torch.float64), error, 4 * error, 2 * error.square(), density, share
    )


def test_choices_for_a_sparsity() -> None:
    curve = toy()
    found = {"uniform": curve.uniform(0.6), "budget": curve.budget(0.6)}
    for chosen in found.values():
        assert 1 - float(curve.kept(chosen).mean()) == pytest.approx(0.6, abs=0.02)
    squares = {name: float(curve.errors(chosen).square().mean()) for name, chosen in found.items()}
    assert squares["budget"] < squares["uniform"]
    uniform = curve.errors(found["uniform"])
    assert float(uniform.max() - uniform.min()) < 0.25 < float(curve.errors(found["budget"]).amax())
    # A tail that binds gives what a mean of a quarter of it gives, here; one that does not changes nothing.
    assert torch.equal(curve.uniform(0.6, l1=1.0, tail=4.0), found["uniform"])
    assert torch.equal(curve.uniform(0.6, l1=1.0, tail=9.0), found["uniform"])
    weights = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(curve.budget(0.6, weights), found["budget"])
    # Twice the square, as the mean of the queries' squares is here, is another λ and no other choice.
    assert torch.equal(curve.budget(0.6, of_queries=True), found["budget"])
    weights[0, 0] = 100
    assert curve.errors(curve.budget(0.6, weights))[0, 0] < curve.errors(found["budget"])[0, 0]


def test_probes() -> None:
    given, plain = call(), ExactKeys(pool=16, queries="sample", **SMALL)
    levels, visible = plain.levels(given), plain.visible(given)
    assert torch.allclose(Probe(pool=16, queries="sample", **SMALL).levels(given), levels, atol=1e-6)
    kept = Probe(pool=16, cdf_threshold=0.3, floor=0.4, **SMALL).kept(given)
    assert bool((kept.sum(-1) >= 0.4 * visible.sum(-1)).all())
    fewer = Probe(pool=16, cdf_threshold=0.3, **SMALL).kept(given)
    assert not bool((fewer.sum(-1) >= 0.4 * visible.sum(-1)).all())
    # With the best blocks judged by the rows and the others by the mean query, either judges alone at the ends.
    assert torch.allclose(Probe(pool=16, alive=0.9999, **SMALL).levels(given), Probe(pool=16, **SMALL).levels(given))
    coarse = ExactKeys(pool=64, **SMALL)
    half = Probe(pool=16, alive=0.5, **SMALL).levels(given)
    worst = coarse.levels(given).masked_fill(~visible, -1).argmax(-1)  # judged by the mean query
    last = half.masked_fill(~visible, -1).gather(-1, worst[..., None])[:, :, 4:, 0]
    assert bool((last > 0.6).all()) and not torch.allclose(half, coarse.levels(given))
    # Far blocks keep the shares that the coarser look gives them, near ones those of the rows.
    far = Probe(pool=16, near=128, coarse=32, **SMALL)
    everything = Probe(pool=16, near=10_000, coarse=32, **SMALL).levels(given)
    assert torch.allclose(everything, Probe(pool=16, **SMALL).levels(given))
    assert torch.allclose(far.levels(given)[:, :, :3], everything[:, :, :3])  # nothing is far yet
    assert not torch.allclose(far.levels(given)[:, :, 4:], everything[:, :, 4:])
    mixed = Probe(pool=16, means=32, **SMALL).levels(given)
    assert mixed.shape == levels.shape and not torch.equal(mixed, levels)
    peak = Probe(pool=1, power=torch.inf, order="share", **SMALL).levels(
        given
    )  # 1 minus the most that any query puts there
    scores = (given.q.float() @ given.k.float().repeat_interleave(2, 1).mT) * given.scale
    probs = scores.masked_fill(~given.token_mask(0, 700), -torch.inf).softmax(-1)  # type: ignore[operator]
    probs = torch.nn.functional.pad(probs, (0, 4, 0, 4)).unflatten(-1, (-1, 64)).sum(-1)
    torch.testing.assert_close(1 - peak, probs.unflatten(2, (-1, 64)).amax(3), rtol=1e-4, atol=1e-5)


def test_the_query_that_speaks() -> None:
    given = call(640)
    for name, of in (("longest", lambda x: x), ("farthest", lambda x: x - x.mean(3, keepdim=True))):
        vectors, _ = Probe(pool=16, pick=name, **SMALL).vectors(given)
        stretches = given.q.unflatten(2, (-1, 16))
        best = of(stretches).norm(dim=-1).argmax(-1)
        expected = torch.stack([stretches[0, 1, n, best[0, 1, n]] for n in range(40)])
        assert torch.equal(vectors[0, 1], expected)


def cell(method: str, choice: str, source: str, density: float, nats: list[float]) -> dict[str, Any]:
    return {"method": method, "setting": choice, "length": 64, "task": source, "density": density, "by_window": nats,
            "kl": 0.01}  # fmt: skip


def test_sparsity_at_a_change() -> None:
    cells = [cell("dense", "–", source, 1.0, [2.0, 3.0]) for source in ("x", "y")]
    for target, change in ((0.5, 0.001), (0.7, 0.005), (0.8, 0.02)):
        for source in ("x", "y"):
            more = math.log1p(change)
            cells.append(cell("a", f"budget {target}", source, 1 - target, [2 + more, 3 + more]))
    cells.append(cell("a", "budget 0.9", "x", 0.1, [9.0, 9.0]))  # not judged on both yet
    line = frontier_results.lines({"cells": cells})["a", "budget"]
    np.testing.assert_allclose(line.change(), [0.001, 0.005, 0.02])
    assert line.at(0.003) == pytest.approx(0.6) and math.isnan(line.at(0.03))
    shown = frontier_results.tables({"cells": cells})
    assert "| a | budget | 60.0% | 60.0 to 60.0 | +0.0 to +0.0 |" in shown


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--out", str(tmp_path / "study"), "--length", "768", "--windows", "1", "--calibration_windows", "1"]
    arguments += ["--query_blocks", "2", "--samples", "1", "--tasks", "copy", "--targets", "0.2", "0.3"]
    arguments += ["--retrieve_at", "0.3", "--settings", "exact 32", "128x64, exact 32"]
    settings = {name: frontier_settings.exact(32, *sizes, plans=("budget", "bounds")[:count])
                for name, sizes, count in (("exact 32", (), 2), ("128x64, exact 32", (128,), 1))}  # fmt: skip
    monkeypatch.setattr(frontier, "SETTINGS", settings)
    assert frontier.main([*arguments, "--seconds", "1"]) == 0
    assert "run again to go on" in capsys.readouterr().out
    assert frontier.main(arguments) == 0
    shown = capsys.readouterr().out
    data = json.loads((tmp_path / "study.json").read_text())
    assert len(data["cells"]) == 3 + (2 * 2 + 2) * 2 + 2 and data["facts"]["judge_on"] == ["readmes", "torch"]
    dense = [cell for cell in data["cells"] if cell["method"] == "dense" and "kl" in cell]
    assert all(abs(cell["kl"]) < 1e-3 and cell["density"] == 1 for cell in dense)
    sparse = [cell for cell in data["cells"] if cell["method"] != "dense" and "kl" in cell]
    assert all(1e-6 < cell["kl"] < 0.5 and 0.5 < cell["density"] < 0.98 for cell in sparse)
    assert "| exact 32 | bounds |" in shown and (tmp_path / "study.png").stat().st_size > 10_000
    assert frontier.main([*arguments, "--plot"]) == 0
    assert capsys.readouterr().out in shown
    assert frontier.main([*arguments, "--windows", "2"]) == 2  # another study


def test_the_program_for_video(tiny_demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model_name", str(tiny_demo), "--out", str(tmp_path / "video"), "--clips", "2", "--seeds", "1"]
    arguments += ["--query_blocks", "2", "--settings", "exact 32"]
    usual = [*arguments, "peak mass", "--steps", "2", "--targets", "0.3", "0.6"]
    assert frontier_video.main(usual) == 0
    data = json.loads((tmp_path / "video.json").read_text())
    assert len(data["cells"]) == 2 * 2 * 2 and all(len(cell["psnr"]) == 2 for cell in data["cells"])
    by_target = [cell["density"] for cell in data["cells"]][:2]
    assert by_target[0] > by_target[1] and "| exact 32 | budget |" in capsys.readouterr().out
    # One of four steps is dense, the others are so much sparser that the mean is the same.
    phases = [*arguments, "--steps", "4", "--targets", "0.45", "--dense_first", "0", "0.25", "--plans", "steps1"]
    assert frontier_video.main(phases) == 0
    found = {cell["setting"]: cell["density"] for cell in json.loads((tmp_path / "video.json").read_text())["cells"]}
    assert found["steps1 0.45"] == pytest.approx(found["steps1+1 0.45"], abs=0.06)
    assert frontier_video.main([*arguments, "--plans", "steps0", "--targets", "0.2", "--steps", "3"]) == 2


def test_at_aim_of_video() -> None:
    cells = [{"psnr": [aim, aim + 4], "density": 1 - sparsity} for aim, sparsity in ((33, 0.3), (29, 0.5))]
    assert frontier_video.at_aim(cells) == pytest.approx((0.4, 31))
    assert all(map(math.isnan, frontier_video.at_aim(cells[:1])))
