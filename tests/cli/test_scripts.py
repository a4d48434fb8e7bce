"""The scripts under the names that users know, and what the command does not have: recordings and their comparison."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cogvideo_example
import compare_results
import diffusers
import flux_example
import hunyuan_example
import llama_tune_example
import numpy as np
import pytest
import torch
import verify_diffusion_implementation
import verify_llama_implementation
import wan_example
from short_runs import LOOSE, SHORT_PIPELINE

from autotune import Tuned, extract_sparse_attention_state_dict, load, save
from autotune.module import sparse_modules
from autotune.tuned import PV_OFF
from modify_model.cli import tiny
from modify_model.cli.language import DEMO, load_model
from modify_model.modify_llama import set_spas_sage_attn_llama

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = (cogvideo_example, flux_example, hunyuan_example, wan_example)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples(example: ModuleType, tmp_path: Path, capsys: Any) -> None:
    assert example.__file__ is not None and len(Path(example.__file__).read_text().splitlines()) < 40
    assert all(hasattr(diffusers, name) for name in example.SCRIPT.pipelines)
    with pytest.raises(SystemExit) as stopped:
        example.SCRIPT.main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--tune_every" in out and "--max_length" not in out
    assert example.SCRIPT.main(["--resume"]) == 2
    assert "give both" in capsys.readouterr().err


def test_flags_of_a_pipelines_script(tmp_path: Path, capsys: Any) -> None:
    """--tune --compare in one go; without a flag, a picture of the tuned file."""
    files = ["--model_name", "tiny:Flux", "--model_out_path", tmp_path / "tuned.pt", "--out_path", tmp_path]
    arguments = [str(argument) for argument in (*files, *SHORT_PIPELINE)]
    assert flux_example.SCRIPT.main(["--tune", "--compare", *arguments, *LOOSE]) == 0
    assert load(tmp_path / "tuned.pt")["_metadata"]["family"] == "Flux" and (tmp_path / "compare.json").exists()
    assert flux_example.SCRIPT.main(arguments) == 0
    assert (tmp_path / "sparse_2.png").exists()
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert flux_example.SCRIPT.main(["--tune", "--model_name", str(tmp_path), "--model_out_path", str(files[3])]) == 2
    assert "it is a WanPipeline, and this command runs FluxPipeline" in capsys.readouterr().err


def test_demo_wan(tmp_path: Path, capsys: Any) -> None:
    """The pipeline without a text encoder is known to the scripts."""
    demo = [
        "--model_name",
        str(ROOT / "models_dict" / "demo_wan"),
        "--tune",
        "--model_out_path",
        str(tmp_path / "x.pt"),
    ]
    assert wan_example.SCRIPT.main([*demo, "--height", "64"]) == 2
    assert "the demo has one size" in capsys.readouterr().err
    assert wan_example.SCRIPT.main([*demo, "--dense_layers", "6"]) == 2
    assert "numbers from 0 to 5, got [6]" in capsys.readouterr().err
    assert verify_diffusion_implementation.SCRIPT.special is wan_example.demo


def test_flags_of_the_llama_scripts(capsys: Any) -> None:
    """The file that ships with the demo model is the default."""
    assert llama_tune_example.SCRIPT.main(["--generate", "--max_new_tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "6/6 attention layers replaced" in out and "--- 3 new tokens" in out
    arguments = ["--max_length", "640", "--max_new_tokens", "2", "--layer_range", "1,3", "--prompt", "x = "]
    assert verify_llama_implementation.SCRIPT.main(arguments) == 0
    assert "2 layers replaced, 4 left on purpose" in capsys.readouterr().out


# -- recordings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    """tests/test_llama_output_accuracy.py as a module."""
    spec = importlib.util.spec_from_file_location("recorder", ROOT / "tests" / "test_llama_output_accuracy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuned_file(model: Any, path: Path) -> Path:
    """A tuned file with hand-set thresholds."""
    set_spas_sage_attn_llama(model)
    for module in sparse_modules(model).values():
        full = torch.ones(module.heads or 0)
        module.set_thresholds(Tuned(full.bool(), full * 0.9, -full, full * PV_OFF, 0.7))
    save(extract_sparse_attention_state_dict(model), path)
    return path


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory, recorder: ModuleType) -> tuple[Path, Path]:
    """The demo model, dense and sparse."""
    folder = tmp_path_factory.mktemp("recordings")
    before, after = folder / "before.json", folder / "after.json"
    file = tuned_file(load_model(DEMO, device="cpu")[0], folder / "tuned.pt")
    arguments = ["--device", "cpu", "--num_samples", "1", "--max_length", "640", "--max_new_tokens", "6"]
    assert recorder.main([*arguments, "--output", str(before)]) == 0
    assert recorder.main([*arguments, "--output", str(after), "--model_out_path", str(file)]) == 0
    return before, after


def test_recordings(recordings: tuple[Path, Path], recorder: ModuleType, tmp_path: Path, capsys: Any) -> None:
    dense, sparse = (json.loads(path.read_text()) for path in recordings)
    assert (dense["patched"], dense["mean_density"]) == (False, 1.0)
    assert sparse["patched"] and 0.2 < sparse["mean_density"] < 1 and not sparse["fallbacks"]
    for recording in (dense, sparse):
        assert recording["logits"]["min"] < recording["logits"]["mean"] < recording["logits"]["max"]
        assert recording["perplexity"] == pytest.approx(np.exp(recording["nll"])) and len(recording["windows"]) == 1
    assert recorder.main(["--output", str(tmp_path)]) == 2
    assert "that is a folder" in capsys.readouterr().err
    assert recorder.main(["--model_out_path", str(tmp_path / "none.pt")]) == 2
    assert "no tuned file at" in capsys.readouterr().err


def test_compare(recordings: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    before, after = map(str, recordings)
    assert compare_results.main([before, after]) == 0
    out = capsys.readouterr().out
    for text in ("perplexity", "logits cosine", "logits KL", "top-1 agreement", "prompt 3", "PASS: logits cosine 0.9"):
        assert text in out
    assert compare_results.main([before, after, "--threshold", "1.1"]) == 1
    changed = json.loads(recordings[1].read_text())
    logits = np.frombuffer(base64.b64decode(changed["windows"][0]["logits"]), "<f4")
    changed["windows"][0]["logits"] = base64.b64encode((-logits).tobytes()).decode()
    changed["generations"][0].update(text="a\nb\nc\n", tokens=[1, 2, 3])
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert compare_results.main([before, str(tmp_path / "changed.json")]) == 1
    out = capsys.readouterr().out
    assert "FAIL: logits cosine -0.9" in out and "--- before" in out and "+b" in out and "token 0" in out


def test_compare_measures(recordings: tuple[Path, Path]) -> None:
    """Cosine, KL and top-1 agreement against plain formulas."""
    one, other = (json.loads(path.read_text())["windows"][0] for path in recordings)
    got = compare_results.similarity(one, other)
    x, y = (torch.from_numpy(np.frombuffer(base64.b64decode(w["logits"]), "<f4").copy()).double() for w in (one, other))
    x, y = x.reshape(one["rows"], -1), y.reshape(one["rows"], -1)
    assert torch.allclose(got["products"][0], (x * y).sum(-1))
    kl = torch.nn.functional.kl_div(y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert float(got["kl"].mean()) == pytest.approx(float(kl.mean()), rel=1e-3)
    assert 0.5 < float(got["top1"].double().mean()) <= 1
    assert float(compare_results.similarity(one, one)["kl"].abs().max()) < 1e-6


def _edit(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda recording: recording.update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit("text_sha256", "0"), "different texts"),
        (_edit("vocabulary", 32000), "different vocabulary sizes"),
        (_edit("format", 99), "is no recording of format 1"),
        (_edit("generations", []), "different prompts"),
        (_edit("windows", [{}]), "is damaged"),
        (lambda recording: recording.pop("perplexity"), "lacks perplexity"),
        (lambda recording: recording["windows"][0].update(logits="A"), "is damaged"),
        (lambda recording: recording["generations"][0].pop("tokens"), "is damaged"),
        (None, "is no JSON"),
    ],
)
def test_compare_rejects(
    edit: Callable[[dict[str, Any]], object] | None,
    message: str,
    recordings: tuple[Path, Path],
    tmp_path: Path,
    capsys: Any,
) -> None:
    recording = json.loads(recordings[1].read_text())
    if edit is not None:
        edit(recording)
    (tmp_path / "edited.json").write_text(json.dumps(recording) if edit is not None else "no json")
    assert compare_results.main([str(recordings[0]), str(tmp_path / "edited.json")]) == 2
    assert message in capsys.readouterr().err


def test_large_vocabulary(recorder: ModuleType, tmp_path: Path, capsys: Any) -> None:
    """Only the highest logits are stored, with their ids."""
    model = tiny.llama(vocab_size=1500)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 0.01  # generates nothing that the byte tokenizer cannot decode
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    file = tuned_file(model, tmp_path / "tuned.pt")
    base = ["--model", str(tmp_path / "model"), "--device", "cpu", "--num_samples", "1", "--max_length", "640"]
    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    assert recorder.main([*base, "--max_new_tokens", "2", "--output", before]) == 0
    assert recorder.main([*base, "--max_new_tokens", "2", "--output", after, "--model_out_path", str(file)]) == 0
    entry = json.loads(Path(before).read_text())["windows"][0]
    assert compare_results.unpack(entry, "logits").shape == (40, 256)
    capsys.readouterr()
    assert compare_results.main([before, before]) == 0
    assert "1.000000  (of the highest logits; KL: a lower bound)" in capsys.readouterr().out
    assert compare_results.main([before, after, "--threshold", "0.2"]) == 0
