"""evaluate/long_context.py and its neighbours: tasks, scores, the search for a density, resuming, tables, lm_eval."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import _long  # noqa: F401
import benchmark_generation
import long_context
import long_judge
import long_methods
import long_results
import pytest
import run_lm_eval
import torch
import torch.nn.functional as F
from long_tasks import ASKED, DEPTHS, RETRIEVAL, Material, samples

import autotune
from modify_model import patch, restore
from modify_model.cli import tiny
from spas_attn.selectors import Dense, Streaming

pytestmark = pytest.mark.usefixtures("no_gpu")
SIZES = {"needle": 0, "multikey": 4, "kv": 8, "copy": 0}


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(ids: tuple[int, ...]) -> str:
    return bytes(ids).decode()


MATERIAL = Material(encode, [7], lambda count, seed: [ord("~")] * count)


@pytest.fixture(scope="module")
def model() -> Any:
    return patch(tiny.llama())


@pytest.mark.parametrize("task", RETRIEVAL)
def test_the_answer_stands_in_the_prompt_once_at_its_depth(task: str) -> None:
    found = samples(task, MATERIAL, 4000, 5, size=SIZES[task])
    assert found == samples(task, MATERIAL, 4000, 5, size=SIZES[task])
    assert found != samples(task, MATERIAL, 4000, 5, seed=1, size=SIZES[task])
    for sample, depth in zip(found, DEPTHS, strict=True):
        assert len(sample.ids) == 4000
        text = decode(sample.ids)
        prompt, answer = text[: -sample.answer], text[-sample.answer :]
        asked = prompt[prompt.rindex("\n") :]  # the question's line
        assert prompt.count(answer) == 1 and prompt.count(asked) == 2
        assert prompt.index(answer) == prompt.index(asked) + len(asked)
        assert sample.depth == depth or task == "kv"
        assert prompt.index(asked) / 4000 == pytest.approx(sample.depth, abs=0.12)


def test_sizes_of_tasks() -> None:
    (few,), (many,) = (samples("multikey", MATERIAL, 1500, 1, size=size) for size in (2, 8))
    assert [decode(x.ids).count("The secret number") for x in (few, many)] == [3, 9]
    (pairs,) = samples("kv", MATERIAL, 1500, 1, size=8)
    assert decode(pairs.ids).count(":") == 9
    (copy,) = samples("copy", MATERIAL, 1500, 1)
    assert len(decode(copy.ids)[-copy.answer :].split()) == ASKED


@pytest.mark.parametrize(
    ("task", "length", "size", "message"),
    [
        ("needles", 1500, 0, "task must be one of needle"),
        ("kv", 1500, 0, "size must be above 1"),
        ("needle", 1500, 4, "size must be above 1"),
        ("kv", 300, 99, "fewer than the 99 asked for"),
        ("copy", 128, 0, "too short"),
    ],
)
def test_tasks_that_cannot_be_made(task: str, length: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samples(task, MATERIAL, length, 1, size=size)


class Oracle(torch.nn.Module):
    """Says the next token of ``ids`` surely, but at some positions another one."""

    def __init__(self, ids: torch.Tensor, wrong: dict[int, set[int]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids, self.wrong = ids, wrong

    def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: Any) -> Any:
        (row,) = (self.ids[:, : input_ids.shape[1]] == input_ids).all(1).nonzero()[0].tolist()
        target = self.ids[row, 1 : input_ids.shape[1] + 1].clone()
        for position in self.wrong.get(row, ()):
            target[position - 1] = 0
        logits = 20.0 * F.one_hot(target, 256).float()
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return types.SimpleNamespace(logits=logits[None, keep])


@pytest.fixture
def any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    monkeypatch.setattr(
        autotune, "record_density", lambda model: contextlib.nullcontext(types.SimpleNamespace(mean=0.5))
    )


@pytest.mark.usefixtures("any_density")
def test_an_answer_is_found_when_every_token_is() -> None:
    found = samples("needle", MATERIAL, 600, 5)
    ids = torch.tensor([sample.ids for sample in found])
    size = found[0].answer
    oracle = Oracle(ids, {1: {599}, 3: {600 - size}, 4: {600 - size - 1, 5}})  # the last one: outside of the answer
    scores = long_judge.answers(oracle, found, batch=1)
    assert scores["exact"] == pytest.approx(3 / 5)
    assert scores["tokens"] == pytest.approx(1 - 2 / (5 * size))
    assert scores["by_depth"] == {"0.1": 1.0, "0.3": 0.0, "0.5": 1.0, "0.7": 0.0, "0.9": 1.0}


def test_perplexity_is_the_plain_loss(model: Any) -> None:
    ids = torch.randint(3, 200, (3, 257), generator=torch.Generator().manual_seed(0))
    found = long_judge.perplexity(model, list(ids.split(1)), batch=2)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[:, :-1]
    plain = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 256)
    assert found["nats"] == pytest.approx(float(plain.mean()), rel=1e-5)
    assert found["by_position"] == pytest.approx(plain.mean(0).view(8, 32).mean(1).tolist(), rel=1e-4)
    assert found["density"] == 1.0


def test_search_meets_a_density_or_says_how_near_it_comes() -> None:
    x, found = long_methods.search(lambda x: 1 / (1 + math.exp(-x)), 0.3)
    assert found == pytest.approx(0.3, abs=0.01) and x == pytest.approx(math.log(3 / 7), abs=0.1)
    assert long_methods.search(lambda x: 0.4 + 0.01 * (x > 0), 0.2) == (long_methods.LOW, 0.4)
    assert long_methods.search(lambda x: 0.4 + 0.01 * (x > 0), 0.9)[1] == pytest.approx(0.41)


@pytest.mark.parametrize("name", list(long_methods.METHODS))
def test_every_method_keeps_more_at_a_higher_setting(name: str, model: Any) -> None:
    window = torch.randint(3, 200, (1, 2048), generator=torch.Generator().manual_seed(0))
    densities = []
    for x in (long_methods.LOW, 0.0, long_methods.HIGH):
        long_methods.install(model, long_methods.METHODS[name].at(x))
        densities.append(long_methods.density_of(model, window))
    restore(model)
    patch(model)
    assert densities == sorted(densities) and densities[0] < densities[2] - 0.1, densities


def test_install_runs_the_selector_as_it_is(model: Any) -> None:
    window = torch.randint(3, 200, (1, 640), generator=torch.Generator().manual_seed(0))
    selector = Streaming(sink_tokens=128, local_tokens=128)
    long_methods.install(model, selector)
    # Two key blocks of row i at most before the diagonal: the sink, and the local one.
    assert long_methods.density_of(model, window) == pytest.approx((1 + 2 + 3 + 3 + 3) / 15)
    long_methods.install(model, Dense())
    assert long_methods.density_of(model, window) == 1.0
    restore(model)
    patch(model)


def arguments(out: Path, *more: str) -> list[str]:
    small = ["--samples", "2", "--windows", "1", "--calibration_windows", "2", "--methods", "TopK", "Streaming"]
    return ["--model_name", "tiny:Llama", "--lengths", "1024", "--densities", ".7", "--out", str(out), *small, *more]


def test_from_model_to_page_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "new" / "long.1", tmp_path / "page.md"
    page.write_text(f"# Title\n\n{long_results.MARK}\n\nold\n\n{long_results.MARK}\n\nEnd.\n")
    more = ["--tasks", "needle", "perplexity", "--calibrate", ".3,.9"]
    assert long_context.main(arguments(out, *more, "--page", str(page))) == 0
    data = long_results.read(tmp_path / "new" / "long.1.json")
    assert out.with_name("long.1.png").stat().st_size > 10_000
    cells = {(cell["method"], cell["setting"], cell["task"]) for cell in data["cells"]}
    tasks = ("needle", "prose", "code")
    settings = [("dense", "–"), ("calibrated", "l1 0.3, tail 0.9"), ("TopK", "published"), ("Streaming", "published")]
    assert {(method, setting, task) for method, setting in settings for task in tasks} <= cells
    assert all(abs(known["density"] - 0.7) < 0.04 for known in data["settings"].values())
    text = page.read_text()
    assert "old" not in text and text.startswith("# Title") and text.endswith("End.\n")
    assert "no evidence" in text and "perplexity, prose" in text  # random weights find no needle
    # A cell that was lost is computed again, and no other; the same numbers come out.
    lost = next(cell for cell in data["cells"] if (cell["method"], cell["task"]) == ("TopK", "code"))
    kept = [{**cell, "kept": True} for cell in data["cells"] if cell is not lost]
    path = tmp_path / "new" / "long.1.json"
    path.write_text(json.dumps({**data, "cells": kept}))
    assert long_context.main(arguments(out, *more)) == 0
    again = long_results.read(path)["cells"]
    assert [cell for cell in again if "kept" not in cell] == [lost] and len(again) == len(data["cells"])
    capsys.readouterr()
    assert long_context.main([*arguments(out, *more), "--seed", "1"]) == 2
    assert "holds results with seed 0, not 1" in capsys.readouterr().err


def test_it_stops_in_time_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(long_context.time, "perf_counter", lambda: next(clock))
    given = arguments(tmp_path / "a", "--tasks", "needle", "copy", "--methods", "--seconds", "5")
    counts = []
    for _ in range(2):
        assert long_context.main(given) == 0
        counts.append(len(long_results.read(tmp_path / "a.json")["cells"]))
    assert counts == [1, 1]  # the cell that is there counts as done at once
    assert long_context.main(given[:-2]) == 0
    assert len(long_results.read(tmp_path / "a.json")["cells"]) == 2


def test_unsolved_tasks_are_no_evidence() -> None:
    def cell(method: str, task: str, **figures: float) -> dict[str, Any]:
        return {"method": method, "setting": "–", "length": 9, "task": task, "density": 0.5, **figures}

    cells = [
        cell("dense", "kv", exact=0.7, tokens=0.9), cell("dense", "copy", exact=0.0, tokens=0.9),
        cell("dense", "prose", nats=2.0), cell("m", "kv", exact=1.0, tokens=1.0),
        cell("m", "copy", exact=0.0, tokens=0.5), cell("m", "prose", nats=2.1),
    ]  # fmt: skip
    row = long_results.summaries(cells)[1]
    assert (row["kv"], row["copy"], row["prose"]) == (None, 0.5, pytest.approx(math.exp(0.1) - 1))
    assert "| no evidence | 50% | +10.52% |" in long_results.table(cells)


@pytest.mark.parametrize(
    "given", [["--densities", "0"], ["--calibrate", "0.1"], ["--calibrate", "0,none"], ["--methods", "Best"]]
)
def test_refuses_arguments(given: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        long_context.main(given)
    assert stopped.value.code == 2


# -- generation and lm_eval -------------------------------------------------------------------------------------------


def test_generation_by_prompt_length(tmp_path: Path) -> None:
    given = ["--model_name", "tiny:Llama", "--lengths", "640", "--method", "Streaming", "--backend", "cpu"]
    out = str(tmp_path / "g")
    assert benchmark_generation.main([*given, "--max_new_tokens", "3", "--runs", "1", "--out", out]) == 0
    data = json.loads((tmp_path / "g.json").read_text())
    dense, sparse = data["rows"]
    assert (dense["attention"], dense["density"], sparse["attention"]) == ("dense", 1.0, "Streaming")
    assert all(row["first_token_ms"] > 0 and row["tokens_per_second"] > 0 for row in data["rows"])
    assert dense["peak_GiB"] is None and dense["warm_up_ms"] > 0


def test_decoding_goes_on_where_the_prompt_ends(model: Any) -> None:
    ids = torch.randint(3, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    cache, token = benchmark_generation.prefill(model, ids)
    benchmark_generation.decode(model, cache, token, 5)
    assert cache.get_seq_length() == 305
    assert token.item() == int(model(input_ids=ids).logits[0, -1].argmax())


class Harness:
    """Stands for lm_eval: notes what it is given, and runs the model once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[str, Any] = {}
        package, huggingface = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.models.huggingface")
        package.simple_evaluate = self.evaluate  # type: ignore[attr-defined]
        huggingface.HFLM = dict  # type: ignore[attr-defined]
        models = types.ModuleType("lm_eval.models")
        for module in (package, models, huggingface):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def evaluate(self, **given: Any) -> dict[str, Any]:
        self.given = given
        with torch.no_grad():
            given["model"]["pretrained"](input_ids=torch.arange(3, 643)[None] % 200 + 3)
        return {"results": {"ruler_vt": {"alias": "ruler_vt", "acc": 0.5}}}


@pytest.mark.parametrize(("how", "density"), [([], None), (["--dense"], 1.0), (["--method", "Streaming"], None)])
def test_lm_eval_gets_the_patched_model(
    how: list[str], density: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(monkeypatch)
    given = ["--model_name", "tiny:Llama", "--tasks", "ruler_vt", "--lengths", "640", "--limit", "3"]
    assert run_lm_eval.main([*given, *how, "--out", str(tmp_path / "l")]) == 0
    assert harness.given["tasks"] == ["ruler_vt"] and harness.given["limit"] == 3
    assert harness.given["metadata"]["max_seq_lengths"] == [640]
    wrapped = harness.given["model"]
    assert wrapped["batch_size"] == 1 and wrapped["max_length"] >= 640 + 256
    modes = {module.mode for module in autotune.module.sparse_modules(wrapped["pretrained"]).values()}
    assert modes == {"dense" if how == ["--dense"] else "sparse"}
    content = json.loads((tmp_path / "l.json").read_text())
    assert content["results"]["ruler_vt"]["acc"] == 0.5
    assert content["density"] == density if density else content["density"] <= 1


def test_lm_eval_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_lm_eval.main(["--model_name", "tiny:Llama"]) == 2
    assert 'pip install "lm_eval[hf,ruler]"' in capsys.readouterr().err
