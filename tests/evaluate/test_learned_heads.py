"""The study of streaming heads: prompts, memory, limits, scores of heads, the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import learned_heads
import learned_heads_results as results_of
import pytest
import retrieval
import torch
from long_results import Results
from long_tasks import Material

from modify_model import patch, stream_heads
from modify_model.cli import tiny

pytestmark = pytest.mark.usefixtures("no_gpu")
SMALL = ["--model_name", "tiny:Llama", "--length", "1024", "--windows", "1", "--calibration_windows", "1"]
SMALL += ["--query_blocks", "2", "--samples", "2", "--tasks", "passkey", "--seeds", "2", "--steps", "2"]
SMALL += ["--served", "128+256", "--sparsities", "0.5"]


def test_prompts() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    material = Material(encode, [], lambda count, seed: encode("x" * count))
    for task in retrieval.TASKS:
        found = retrieval.prompts(task, material, 1500, 5)
        assert {len(sample.ids) for sample in found} == {1500} and len({sample.ids for sample in found}) == 5
        for sample in found:
            text = bytes(sample.ids).decode()
            prompt, answer = text[: -sample.answer], text[-sample.answer :]
            question = prompt.rsplit("\n", 1)[1]
            if task == "passkey":
                assert f"The pass key is {answer}." in prompt
            else:
                assert (
                    f'{question.removeprefix("{")}{answer}", ' in prompt and prompt.count('": "') == int(task[-1]) + 1
                )
            place = text.index("The pass key" if task == "passkey" else "{") / (1500 - len(text.replace("x", "")))
            assert place == pytest.approx(sample.depth, abs=0.01)
    with pytest.raises(ValueError, match="task must be one of json 2"):
        retrieval.prompts("json 3", material, 1500, 1)


@pytest.mark.parametrize(("length", "sink", "window"), [(1000, 128, 256), (1024, 128, 256), (700, 64, 100)])
def test_memory_is_what_the_cache_holds(length: int, sink: int, window: int) -> None:
    model = patch(tiny.llama(), selector=learned_heads.Dense(block_q=128, block_k=128))
    ids = torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(0))
    stream_heads(model, [[1, 0], [1, 1]], sink_tokens=sink, local_tokens=window)
    with torch.no_grad():
        assert results_of.held(model, ids) == results_of.kv_memory(0.25, sink, window, length)
    assert results_of.kv_memory(0.25, sink, window, length) < 0.95
    assert results_of.kv_memory(1.0, 128, 256, 8192) == (128 + 256) / 8192


def test_limits() -> None:
    assert results_of.wilson(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert results_of.wilson(0.0, 20)[0] == pytest.approx(0, abs=1e-12)


def study(tmp_path: Path, *more: str) -> learned_heads.Study:
    args = learned_heads.read_arguments([*SMALL, "--out", str(tmp_path / "study"), *more])
    model, tokenizer = learned_heads.language.load_model(args.model_name, device="cpu")
    return learned_heads.Study(args, Results(tmp_path / "study.json", {}), model, tokenizer)


@torch.no_grad()
def test_scores_without_training(tmp_path: Path) -> None:
    made = study(tmp_path)
    alone, curves = made.scores("alone"), made.scores("curves")
    assert alone.shape == curves.shape == (2, 2) and bool((alone > 0).all()) and len(set(alone.flatten().tolist())) == 4
    exact = made.model.get_decoder()
    learned_heads.restore(made.model)
    (ids, answers), table = made.contexts[0], torch.ones(2, 2)
    table[1, 0] = 0
    hidden = [exact(input_ids=ids).last_hidden_state]
    learned_heads.patch(made.model, selector=learned_heads.Dense(block_q=128, block_k=128))
    stream_heads(made.model, table, sink_tokens=128, local_tokens=256)
    hidden.append(exact(input_ids=ids).last_hidden_state)
    expected = (hidden[0] - hidden[1])[answers].square().mean()
    assert float(alone[1, 0]) == pytest.approx(float(expected), rel=1e-4)
    # A layer's distance is shared out by squares: the sum over its heads is that of the layer, over the group.
    weighted = made.scores("curves, weighted")
    layers = made.distances(range(2))
    torch.testing.assert_close(2 * weighted.sum(1), layers.float())
    assert json.loads((tmp_path / "study.json").read_text())["settings"]["alone"]["scores"] == alone.tolist()


@torch.no_grad()
def test_data_to_learn_from(tmp_path: Path) -> None:
    made = study(tmp_path)
    text, keys, both = (made.rows(data, 4) for data in ("text", "passkeys", "both"))
    assert [len(row["input_ids"]) for row in text] == [1024] * 4 and all(r["labels"] == r["input_ids"] for r in text)
    assert len({len(row["input_ids"]) for row in keys}) == 4 and all(-100 in row["labels"] for row in keys)
    assert both == [text[0], keys[0], text[1], keys[1]]


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--out", str(tmp_path / "study"), "--names", "learned, distill", "random"]
    assert learned_heads.main([*arguments, "--seconds", "1", "--names", "random"]) == 0
    assert learned_heads.main([*arguments, "--window", "128"]) == 2  # another study
    assert learned_heads.main(arguments) == 0
    shown = capsys.readouterr().out
    data: dict[str, Any] = json.loads((tmp_path / "study.json").read_text())
    assert len(data["cells"]) == 3 * (1 + 1 + 2)  # two sources and a task: dense, learned, two seeds
    assert data["settings"]["held 0.5 128+256"]["share"] == results_of.kv_memory(0.5, 128, 256, 1024)
    learned = data["settings"]["learned, distill"]
    assert len(learned["log"]) > 1 and "separate" in learned["separation"]["0.5"]["warning"]  # after two steps
    assert (
        "| random | 50% | 128 + 256 | 69% |" in shown
        and "| learned, distill | 2, " in shown
        and "the gates do not separate" in shown
    )
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert (tmp_path / "study_run" / "masks" / "full_attention_heads.tsv").exists()
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- results -->\n<!-- results -->\nb\n")
    assert learned_heads.main([*arguments, "--plot", "--page", str(page)]) == 0
    assert "| learned, distill | 50% |" in page.read_text()
