"""The scripts that check a model: verify_llama_implementation.py, compare_results.py, and the recorder between them."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import compare_results
import numpy as np
import pytest
import torch
import verify_llama_implementation
from _llama import DEMO, encode, load_model, patch_and_load, token_windows
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from autotune import extract_sparse_attention_state_dict, save
from autotune.module import Thresholds, sparse_modules
from modify_model.modify_llama import set_spas_sage_attn_llama

ROOT = Path(__file__).resolve().parents[2]
VERIFY = "evaluate/verify_llama_implementation.py"
COMPARE = "evaluate/compare_results.py"
RECORD = "tests/test_llama_output_accuracy.py"
SHORT = ["--max_length", "640", "--max_new_tokens", "6"]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as users do."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the cores are shared with pytest
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def tuned(model: nn.Module, path: Path, layers: tuple[int, int] | None = None) -> Path:
    """A tuned file with hand-set thresholds."""
    set_spas_sage_attn_llama(model, layer_range=layers)
    for module in sparse_modules(model).values():
        heads = module.heads or 0
        on = torch.ones(heads, dtype=torch.bool)
        values = Thresholds(on, torch.full((heads,), 0.9), torch.full((heads,), -1.0), torch.full((heads,), 50.0))
        module.set_thresholds(values, expected_density=0.7)
    save(extract_sparse_attention_state_dict(model), path)
    return path


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(load_model(DEMO, device="cpu")[0], tmp_path_factory.mktemp("tuned") / "demo.pt")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaMA of 3 layers, the demo's tokenizer, and a vocabulary too large to store whole."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1500,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 0.01  # generates nothing that the byte tokenizer cannot decode
    model.save_pretrained(folder)
    shutil.copy(DEMO / "tokenizer_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    """tests/test_llama_output_accuracy.py as a module."""
    spec = importlib.util.spec_from_file_location("recorder", ROOT / RECORD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory, demo_file: Path, recorder: ModuleType) -> tuple[Path, Path]:
    """The demo model, dense and sparse, recorded by the script."""
    folder = tmp_path_factory.mktemp("recordings")
    before, after = folder / "before.json", folder / "after.json"
    arguments = ["--model", str(DEMO), "--device", "cpu", "--num_samples", "1", *SHORT]
    assert recorder.main([*arguments, "--output", str(before)]) == 0
    done = run(RECORD, *arguments, "--output", after, "--model_out_path", demo_file)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "Traceback" not in done.stderr
    return before, after


def test_verify_with_a_tuned_file(demo_file: Path) -> None:
    prompt = "import json\n\n\ndef read("
    done = run(VERIFY, "--model_out_path", demo_file, "--device", "cpu", "--prompt", prompt, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == [f"[{n}/5]" for n in range(1, 6)]
    assert sum(line.startswith("    PASS") for line in lines) == 5
    assert sum("SparseLlamaAttention" in line for line in lines) == 6
    for text in ("6/6 layers replaced", "8 heads, 2 key/value heads", "shape [1, 640, 264]", "5/5 steps passed"):
        assert text in done.stdout
    assert "cosine:" in done.stdout and "restored:" in done.stdout and "ran dense" not in done.stdout


def test_verify_other_models(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verify(*arguments: object) -> tuple[int, str]:
        code = verify_llama_implementation.main([*map(str, arguments), "--device", "cpu", *SHORT])
        return code, capsys.readouterr().out

    code, out = verify("--model_name", tiny, "--layer_range", "1,3", "--prompt", "x = ")
    assert code == 0 and "2/2 layers replaced, 1 left on purpose" in out

    file = tuned(load_model(tiny, device="cpu")[0], tmp_path / "part.pt", (0, 2))
    code, out = verify("--model_name", tiny, "--layer_range", "1,3", "--model_out_path", file)
    assert code == 1 and "FAIL: the tuned file" in out and "4/5 steps passed" in out

    code, out = verify("--model_name", tiny, "--layer_range", "2,9")
    assert code == 1 and "FAIL: layer_range must be" in out and out.count("not run") == 2

    code, out = verify("--model_name", tiny, "--model_out_path", tmp_path / "none.pt")
    assert code == 1 and "FAIL: no tuned file at" in out

    code, out = verify("--model_name", "/no/such/model")
    assert code == 1 and "FAIL: no folder '/no/such/model'" in out and out.count("not run") == 4

    code, out = verify("--model_name", tmp_path)
    assert code == 1 and "holds no config.json" in out

    sizes = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=264, n_positions=64, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    shutil.copy(DEMO / "tokenizer_config.json", tmp_path / "gpt2")
    code, out = verify("--model_name", tmp_path / "gpt2")
    assert code == 1 and "FAIL: GPT2LMHeadModel has no adapter" in out and out.count("not run") == 3


def test_verify_sees_a_difference(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A patch that changes the output must not pass."""

    def patch(model: nn.Module, **options: Any) -> nn.Module:
        with torch.no_grad():
            model.model.norm.weight.mul_(1.01)  # type: ignore[union-attr, operator]
        return set_spas_sage_attn_llama(model, **options)

    monkeypatch.setattr(verify_llama_implementation, "set_spas_sage_attn_llama", patch)
    code = verify_llama_implementation.main(["--model_name", str(tiny), "--device", "cpu", *SHORT])
    out = capsys.readouterr().out
    assert code == 1 and "FAIL: untuned, the patched model differs" in out
    assert "FAIL: the restored model's logits are not those" in out


@pytest.mark.parametrize("arguments", [["--layer_range", "3"], ["--max_length", "0"], ["--dtype", "int8"]])
def test_verify_refuses_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        verify_llama_implementation.main(arguments)
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_recording(recordings: tuple[Path, Path]) -> None:
    dense, sparse = (json.loads(path.read_text()) for path in recordings)
    assert all(path.stat().st_size < 5e6 for path in recordings)
    assert (dense["patched"], dense["mean_density"]) == (False, 1.0)
    assert sparse["patched"] and 0.2 < sparse["mean_density"] < 1 and not sparse["fallbacks"]
    for recording in (dense, sparse):
        assert recording["logits"]["min"] < recording["logits"]["mean"] < recording["logits"]["max"]
        assert recording["perplexity"] == pytest.approx(math.exp(recording["nll"]))
        assert len(recording["windows"]) == 1 and len(recording["windows"][0]["top5_last"]) == 5
        assert all(1 <= len(entry["tokens"]) <= 6 for entry in recording["generations"])
    model, tokenizer = load_model(DEMO, device="cpu")
    (window,) = token_windows(tokenizer, None, 640, 1, seed=0, group="unseen")
    with torch.inference_mode():
        logits = model(input_ids=window).logits[0]
    stored = np.frombuffer(base64.b64decode(dense["windows"][0]["logits"]), "<f4").reshape(40, 264)
    np.testing.assert_allclose(stored, logits[15::16], rtol=1e-3, atol=1e-3)


def test_compare(recordings: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = recordings
    done = run(COMPARE, before, after)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("perplexity", "logits cosine", "logits KL", "top-1 agreement", "prompt 3", "PASS: logits cosine 0.9"):
        assert text in done.stdout
    assert run(COMPARE, before, after, "--threshold", "1.1").returncode == 1

    changed = json.loads(after.read_text())
    logits = np.frombuffer(base64.b64decode(changed["windows"][0]["logits"]), "<f4")
    changed["windows"][0]["logits"] = base64.b64encode((-logits).tobytes()).decode()
    changed["generations"][0].update(text="a\nb\nc\n", tokens=[1, 2, 3])
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    done = run(COMPARE, before, tmp_path / "changed.json")
    assert done.returncode == 1 and "FAIL: logits cosine -0.9" in done.stdout
    assert "--- before" in done.stdout and "+b" in done.stdout and "token 0" in done.stdout


def test_compare_measures(recordings: tuple[Path, Path]) -> None:
    """Cosine, KL and top-1 agreement against plain formulas."""
    one, other = (compare_results.windows(json.loads(path.read_text()), str(path)) for path in recordings)
    got = compare_results.similarity(one, other)
    x, y = (torch.from_numpy(side[0].logits.copy()) for side in (one, other))
    assert got.cosine == pytest.approx(float(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)), abs=1e-9)
    kl = torch.nn.functional.kl_div(y.log_softmax(-1), x.log_softmax(-1), log_target=True, reduction="batchmean")
    assert got.kl == pytest.approx(float(kl), rel=1e-6) and got.kl > 0
    assert got.whole and 0.5 < got.top1 <= 1
    assert compare_results.similarity(one, one).kl == pytest.approx(0, abs=1e-12)


def _edit(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda recording: recording.update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_edit("text_sha256", "0"), "different texts"),
        (_edit("length", 512), "different text lengths"),
        (_edit("vocabulary", 32000), "different vocabulary sizes"),
        (_edit("format", 99), "has format 99"),
        (_edit("generations", []), "different prompts"),
        (_edit("windows", [{}]), "is damaged"),
        (lambda recording: recording.pop("perplexity"), "lacks perplexity"),
        (lambda recording: recording["windows"][0].update(logits="A"), "is damaged"),
        (lambda recording: recording["generations"][0].pop("tokens"), "damaged"),
    ],
)
def test_compare_refuses(
    edit: Callable[[dict[str, Any]], object],
    message: str,
    recordings: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recording = json.loads(recordings[1].read_text())
    edit(recording)
    (tmp_path / "edited.json").write_text(json.dumps(recording))
    assert compare_results.main([str(recordings[0]), str(tmp_path / "edited.json")]) == 2
    assert message in capsys.readouterr().err


def test_compare_refuses_files(recordings: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "list.json").write_text("[]")
    for name, message in (
        ("none.json", "cannot read"),
        ("text.json", "is no JSON"),
        ("list.json", "was not written by"),
    ):
        done = run(COMPARE, recordings[0], tmp_path / name)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_large_vocabulary(tiny: Path, recorder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the highest logits are stored, with their ids; layers are those of the tuned file."""
    file = tuned(load_model(tiny, device="cpu")[0], tmp_path / "tiny.pt", (1, 3))
    base = ["--model", str(tiny), "--device", "cpu", "--num_samples", "1", *SHORT]
    before, after = str(tmp_path / "before.json"), str(tmp_path / "after.json")
    assert recorder.main([*base, "--output", before]) == 0
    assert recorder.main([*base, "--output", after, "--model_out_path", str(file)]) == 0
    entry = compare_results.windows(json.loads(Path(before).read_text()), before)[0]
    assert entry.logits.shape == (40, 256) and entry.ids is not None and entry.ids.shape == (40, 256)
    assert compare_results.main([before, before]) == 0
    assert "1.000000  (of the highest logits; KL: a lower bound)" in capsys.readouterr().out
    assert compare_results.main([before, after, "--threshold", "0.2"]) == 0
    assert recorder.main([*base, "--model_out_path", str(tmp_path / "none.pt")]) == 1
    assert "no tuned file at" in capsys.readouterr().err


class _Words:
    """A tokenizer of words that puts a beginning-of-text token, as real LLaMA tokenizers do."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [2 + len(word) for word in text.split()]}


def test_token_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a " * 300)
    (tmp_path / "b.py").write_text("bb " * 300)
    for tokenizer in (_Words(), load_model(DEMO, device="cpu")[1]):
        for source in (None, tmp_path, tmp_path / "a.txt"):
            found = token_windows(tokenizer, source, 100, 3, seed=1)
            assert [tuple(ids.shape) for ids in found] == [(1, 100)] * 3
            again = token_windows(tokenizer, source, 100, 3, seed=1)
            assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    halves = [token_windows(_Words(), tmp_path, 50, 4, seed=0, group=group) for group in ("calibration", "unseen")]
    assert [{int(ids[0, 1]) for ids in half} for half in halves] == [{3}, {4}]
    assert encode(_Words(), "a bb").tolist() == [[1, 3, 4]]
    assert encode(load_model(DEMO, device="cpu")[1], "ab").tolist() == [[100, 101]]
    with pytest.raises(ValueError, match="fewer than one window"):
        token_windows(_Words(), tmp_path / "a.txt", 1000, 1, seed=0)
    with pytest.raises(ValueError, match="group must be"):
        token_windows(_Words(), None, 10, 1, seed=0, group="test")
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(ValueError, match="pip install datasets"):
            token_windows(_Words(), "no/such", 10, 1, seed=0)


def test_load_model_refuses() -> None:
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used"):
        load_model(DEMO, device="nowhere")
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(DEMO, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot be used"):
            load_model(DEMO, device="cuda")
    model, _ = load_model(DEMO, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training


def test_patch_and_load_refuses_another_model(tiny: Path, demo_file: Path) -> None:
    with pytest.raises(ValueError, match="made for head dim 64"):
        patch_and_load(load_model(tiny, device="cpu")[0], demo_file)
