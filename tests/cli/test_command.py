"""The command `spas-attn`: what it makes, what it says, and what it rejects before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_transformers
import torch
from PIL import Image
from short_runs import LOOSE, SHORT_PIPELINE, short
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, T5Config, T5EncoderModel

from autotune import load
from modify_model.cli import names, tiny, verify
from modify_model.cli.diffusion import PROMPTS
from modify_model.cli.parallel import run_parallel
from modify_model.cli.tiny import TINY

Run = Callable[..., int]
Tuned = Callable[[str], Path]
# One of a kind; tests/modify_model looks at every family.
NAMES = ["tiny:Llama", "tiny:Flux", "tiny:HunyuanVideo", "tiny:SD3.5", "tiny:Wan2.2"]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}


def same(a: Path, b: Path) -> bool:
    one, two = load(a), load(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one if key != "_metadata")


# -- what it makes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny:Flux", "tiny:Wan2.2"])
def test_tune_and_compare(name: str, run: Run, tuned: Tuned, tmp_path: Path, capsys: Any) -> None:
    file = tuned(name)
    assert run("compare", "--model_name", name, "--model_out_path", file, *short(name), "--out_path", tmp_path) == 0
    out = capsys.readouterr().out
    assert "PSNR dB    SSIM  sparsity  dense s  sparse s" in out and "worst" in out and "fell back" not in out
    found = json.loads((tmp_path / "compare.json").read_text())
    (clip,) = found["clips"]
    assert clip["prompt"] == PROMPTS[2] and clip["seed"] == 2  # the first that was not tuned on
    assert 0.02 < clip["sparsity"] < 1 and 10 < clip["psnr"] < 80 and 0 < clip["ssim"] <= 1
    density = np.array(clip["density_by_step_and_layer"], dtype=float)
    assert density.shape[0] == 3 and np.nanmean(density) == pytest.approx(1 - clip["sparsity"], abs=1e-3)
    assert (tmp_path / "sheet.png").stat().st_size > 1000 and (tmp_path / "sparsity.png").is_file()
    assert (tmp_path / "compare.gif").is_file() == ("num_frames" in TINY[name.removeprefix(tiny.PREFIX)].size)
    if name == "tiny:Wan2.2":  # two transformers take turns
        first, second = ~np.isnan(density[:, :2]), ~np.isnan(density[:, 2:])
        assert (first.all(1) ^ second.all(1)).all() and first.any() and second.any()


def test_language_model_in_a_folder(run: Run, llama_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """tune → generate → compare → verify, on a text of one's own, with a selector and some of the layers."""
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    model = ["--model_name", llama_folder, "--model_out_path", tmp_path / "new" / "tuned.pt"]
    text = ["--prompts", tmp_path / "text.txt", "--max_length", 640]
    rule = ["--selector", "peak", "--block", 128, "--pool", 16, "--layer_range", "1,3"]
    assert run("tune", *model, *text, *rule, *LOOSE, "--num_tune_samples", 2) == 0
    statistics = json.loads((tmp_path / "new" / "tuned.json").read_text())
    assert [entry["layer_idx"] for entry in statistics] == [1, 2]
    assert load(model[3])["_metadata"]["selector"]["class"] == "PeakMass"
    capsys.readouterr()
    assert run("generate", *model, "--prompt", "x = 1\n" * 40, "--max_new_tokens", 4) == 0
    out = capsys.readouterr().out
    assert "2/3 attention layers replaced, 1 left on purpose" in out and "--- 4 new tokens" in out
    assert run("compare", *model, *text, "--num_compare", 2) == 0
    out = capsys.readouterr().out
    assert "cosine   top-1  dense nats  sparse nats" in out and "perplexity: dense" in out and "text 2" in out


@pytest.mark.parametrize(("name", "layer"), [("Gemma 3", "Gemma3Attention"), ("Qwen3", "Qwen3Attention")])
def test_any_language_model_in_a_folder(name: str, layer: str, run: Run, tmp_path: Path, capsys: Any) -> None:
    """verify and generate, without a tuned file and with one; Gemma 3 has a layer with a sliding window."""
    tokenizer, folder = tiny.tokenizer(), tmp_path / "model"
    tiny_transformers.make(name, "sdpa", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    base = ["--model_name", folder, "--max_new_tokens", 4]
    file = ["--model_out_path", tmp_path / "tuned.pt"]
    assert run("verify", *base) == 0
    out = capsys.readouterr().out
    assert f"{layer}, 4 heads, 2 key/value heads" in out and "transformers, 2 attention layers" in out
    assert "equal bit for bit while untuned" in out and "5/5 steps passed" in out
    assert run("tune", *base[:2], *file, *LOOSE, "--num_tune_samples", 2) == 0
    capsys.readouterr()
    assert run("generate", *base, *file, "--prompt", "x = 1\n" * 40) == 0
    out = capsys.readouterr().out
    assert "2/2 attention layers replaced, 0 left on purpose" in out and "--- 4 new tokens" in out
    assert run("verify", *base, *file) == 0
    assert "with the tuned file" in capsys.readouterr().out


def test_prompts_and_schedule_of_the_file(run: Run, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("one cat\n\n  two dogs  \nthree birds\n")
    path = tmp_path / "flux.pt"
    base = ["--model_name", "tiny:Flux", "--model_out_path", path, "--prompts", tmp_path / "prompts.txt"]
    assert run("tune", *base, *SHORT_PIPELINE, *LOOSE, "--dense_steps", 1, 1) == 0
    steps = load(path)["_metadata"]["dense_steps"]
    assert steps is not None and 0 < steps[0] < steps[1] < 1
    capsys.readouterr()
    compare = ["compare", *base, *SHORT_PIPELINE, "--out_path", tmp_path]
    assert run(*compare, "--num_compare", 9, "--dense_layers", 1) == 0
    assert "note: --num_compare 9: only 1 prompts are left" in capsys.readouterr().err
    (clip,) = json.loads((tmp_path / "compare.json").read_text())["clips"]
    assert clip["prompt"] == "three birds"
    density = clip["density_by_step_and_layer"]  # the file's own schedule, without being told again
    assert density[0] == density[2] == [1.0, 1.0] and density[1][0] < density[1][1] == 1


def test_generate_writes_a_picture_or_clip(run: Run, tuned: Tuned, tmp_path: Path) -> None:
    for name, ending in (("tiny:Flux", "png"), ("tiny:Wan2.2", "gif")):
        options = ["--model_out_path", tuned(name), *short(name), "--num_compare", 2, "--out_path", tmp_path / name]
        assert run("generate", "--model_name", name, *options) == 0
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [f"sparse_2.{ending}", f"sparse_3.{ending}"]


def small_wan(folder: Path) -> Path:
    """A whole Wan pipeline on disk, with a text encoder, a tokenizer of bytes and a VAE."""
    torch.manual_seed(0)
    encoder = T5Config(d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4, vocab_size=384)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    wan = TINY["Wan"].make()
    pipe = diffusers.WanPipeline(ByT5Tokenizer(), T5EncoderModel(encoder), vae, wan.scheduler, wan.transformer)
    pipe.save_pretrained(folder)
    return folder


def test_pipeline_in_a_folder(run: Run, tmp_path: Path, capsys: Any) -> None:
    """from_pretrained, text encoder, VAE and frames: what a real model does."""
    folder = small_wan(tmp_path / "wan")
    base = ["--model_name", folder, "--model_out_path", tmp_path / "tuned.pt", "--steps", 2]
    size = ["--height", 160, "--width", 160, "--frames", 9, "--num_tune_samples", 2]
    assert run("tune", *base, *size, *LOOSE) == 0
    assert run("compare", *base, *size, "--out_path", tmp_path) == 0
    (clip,) = json.loads((tmp_path / "compare.json").read_text())["clips"]
    assert 0 < clip["sparsity"] < 1 and clip["psnr"] is not None
    with Image.open(tmp_path / "compare.gif") as pictures:
        assert getattr(pictures, "n_frames", 1) == 9
    for wrong, message in ((["--height", 264], "got 264; nearest: 256 and 272"), (["--frames", 10], "9 and 13")):
        assert run("tune", *base, *size, *wrong) == 2
        assert message in capsys.readouterr().err
    (folder / "transformer" / "config.json").write_text("{")
    assert run("tune", *base) == 2
    assert "cannot load the pipeline in folder" in capsys.readouterr().err


# -- verify -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_verify(name: str, run: Run, tuned: Tuned, capsys: Any) -> None:
    options = ["--max_length", 640, "--max_new_tokens", 4] if name == "tiny:Llama" else ["--steps", 2]
    if name == "tiny:Flux":
        options += ["--model_out_path", tuned(name)]
        capsys.readouterr()
    code = run("verify", "--model_name", name, *options)
    out = capsys.readouterr().out
    assert code == 0, out
    lines = out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == [f"[{n}/5]" for n in range(1, 6)]
    assert sum(line.startswith("    PASS") for line in lines) == 5
    for text in ("equal to the unpatched model's bit for bit", "100.0% of the blocks", "restored:", "5/5 steps passed"):
        assert text in out
    assert ("with the tuned file" in out) == ("--model_out_path" in options)
    few = next(line for line in lines if "few blocks" in line)
    assert float(few.split("dense, ")[1].split("%")[0]) < 90


def test_verify_sees_a_difference(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A patch that changes the output must not pass, nor one that never becomes sparse."""
    patch = verify.patch

    def changing(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            model.transformer.proj_out.weight.mul_(1.01)
        return patch(model, **options)

    monkeypatch.setattr(verify, "patch", changing)
    assert run("verify", "--model_name", "tiny:Wan", "--steps", 1) == 1
    out = capsys.readouterr().out
    assert "FAIL: untuned, the patched model differs" in out
    assert "FAIL: untuned, the patched model generates something else" in out and "3/5 steps passed" in out
    monkeypatch.setattr(verify, "patch", lambda model, **options: patch(model, dense_layers=[0, 1], **options))
    assert run("verify", "--model_name", "tiny:Wan", "--steps", 1) == 1
    assert "no block was left out" in capsys.readouterr().out


def test_verify_fails(run: Run, tuned: Tuned, tmp_path: Path, capsys: Any) -> None:
    wrong = ["--model_name", "tiny:Wan2.2", "--model_out_path", tuned("tiny:Flux"), "--steps", 2]
    assert run("verify", *wrong) == 1
    assert "FAIL: the tuned file" in capsys.readouterr().out
    file = tuned("tiny:Llama")  # its bounds were loose
    capsys.readouterr()
    short_run = ["--max_length", 640, "--max_new_tokens", 2]
    assert run("verify", "--model_name", "tiny:Llama", "--model_out_path", file, *short_run) == 1
    out = capsys.readouterr().out
    assert "below 0.9" in out and "tuned:" in out and "4/5 steps passed" in out
    sizes = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=384, n_positions=64, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert run("verify", "--model_name", tmp_path) == 1
    out = capsys.readouterr().out
    assert "FAIL: layer 'transformer.h.0.attn' cannot be made sparse" in out and out.count("not run") == 3


# -- interruptions, several processes, compilation --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(number: signal.Signals, run: Run, tmp_path: Path) -> None:
    path, whole = tmp_path / "tuned.pt", tmp_path / "whole.pt"
    arguments = ["tune", "--model_name", "tiny:Flux", "--num_tune_samples", "3", "--steps", "2", *LOOSE]
    assert run(*arguments, "--model_out_path", whole) == 0
    paused = str(Path(__file__).with_name("paused.py"))
    command = [sys.executable, paused, *arguments, "--model_out_path", str(path)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert any(line == b"halted\n" for line in process.stdout)
    process.send_signal(number)
    _, shown = process.communicate(timeout=100)
    if number == signal.SIGINT:
        assert process.returncode == 130 and b"--resume" in shown and b"Traceback" not in shown
    partial = tmp_path / "tuned.pt.partial.rank0"
    assert partial.exists() and not path.exists()
    again = [*arguments, "--model_out_path", path, "--resume"]
    assert run(*again, "--tune_every", 2) == 2  # that is another calibration
    assert run(*again) == 0
    assert same(path, whole) and not partial.exists()
    assert path.with_suffix(".json").read_text() == whole.with_suffix(".json").read_text()


@pytest.mark.slow
def test_parallel_tune(tuned: Tuned, tmp_path: Path) -> None:
    """By the command's own module, and by a script that goes on with the file."""
    script = Path(__file__).resolve().parents[2] / "evaluate" / "llama_tune_example.py"
    model = ["--model_name", "tiny:Llama", "--model_out_path", tmp_path / "tuned.pt", *short("tiny:Llama"), *LOOSE]
    program = [script, "--generate", "--max_new_tokens", 2]
    for start in (["-m", "modify_model.cli.main", "tune"], program):
        command = [sys.executable, *start, "--parallel_tune", *model]
        done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert same(tmp_path / "tuned.pt", tuned("tiny:Llama")) and done.stdout.count("thresholds:") == 1
    assert "--- 2 new tokens" in done.stdout


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("sys.exit(2)", 2, ""),
        ("1 / 0", 1, "ended first, with exit code 1"),
        ("os.kill(os.getpid(), 9)", 1, "ended first, killed by signal 9"),
        ("", 0, ""),
    ],
)
def test_exit_codes_of_several_processes(ending: str, code: int, told: str, tmp_path: Path, capfd: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\nprint(*sys.argv[1:], flush=True)\n{ending}\n")
    assert run_parallel([str(script)], ["--tune", "x y"]) == code
    shown, said = capfd.readouterr()
    assert "--tune x y" in shown and "ChildFailedError" not in said
    assert told in said and ("ended first" in said) == (code == 1)
    assert ("Traceback" in said) == ("ZeroDivisionError" in said) == ("1 / 0" in ending)  # the script's own only


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny:Llama", "tiny:Flux"])
def test_compile(
    name: str, run: Run, tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What is compared does not change, and nothing is compiled in a timed run."""
    in_place, graphs = torch.nn.Module.compile, []

    def compiling(module: torch.nn.Module) -> None:
        def backend(graph: Any, _: Any) -> Any:  # the tracing is what can fail; inductor takes a minute
            graphs.append(graph)
            return graph.forward

        in_place(module, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    options = ["--model_out_path", tuned(name), *short(name), "--num_compare", 1]
    options += [] if name == "tiny:Llama" else ["--out_path", tmp_path]
    tables = []
    for more in ([], ["--compile"]):
        torch._dynamo.reset()
        capsys.readouterr()
        assert run("compare", "--model_name", name, *options, *more) == 0
        tables.append(capsys.readouterr().out.split("sparsity   step")[1].split("perplexity")[0].split("written")[0])
    torch._dynamo.reset()
    assert graphs and tables[0] == tables[1]


# -- what it rejects --------------------------------------------------------------------------------------------------

WAN = ("--model_name", "tiny:Wan")
REJECTED = [
    ((), "the following arguments are required: COMMAND"),
    (("tune",), "--model_name is needed"),
    (("tune", "--model_name", "/nowhere/model"), "no folder '/nowhere/model'"),
    (("verify", "--model_name", "/nowhere/model"), "no folder '/nowhere/model'"),
    (("tune", "--model_name", "a/b/c"), "cannot be a name on the hub"),
    (("tune", "--model_name", ""), "--model_name is needed"),
    (("tune", "--model_name", "{folder}"), "it holds neither config.json nor model_index.json"),
    (("tune", "--model_name", "nowhere.gguf"), "no file 'nowhere.gguf'"),
    (("tune", "--model_name", "tiny:Nothing"), "tiny:Wan, tiny:Wan2.2"),
    (("tune", *WAN, "--l1", "0.1", "--pv_l1", "0.05"), "it must exceed l1=0.1"),
    (("tune", *WAN, "--l1", "many"), "argument --l1: invalid float value: 'many'"),
    (("tune", *WAN, "--l1", "nan"), "l1 must be above 0"),
    (("tune", *WAN, "--tail", "high"), "expected a number or 'none', got 'high'"),
    (("tune", *WAN, "--tail", "-1"), "tail must be above 0"),
    (("tune", *WAN, "--steps", "0"), "argument --steps: must be from 1 to 10000, got 0"),
    (("tune", *WAN, "--steps", "1.5"), "argument --steps: expected a whole number from 1 on, got '1.5'"),
    (("tune", *WAN, "--num_tune_samples", "0"), "argument --num_tune_samples: must be from 1 to"),
    (("tune", *WAN, "--num_tune_samples", "9" * 30), "argument --num_tune_samples: must be from 1 to 10000"),
    (("tune", *WAN, "--seed", "-1"), "argument --seed: must be from 0 to 1000000"),
    (("tune", *WAN, "--num_tune_samples", "11"), "there are only 10 prompts"),
    (("tune", *WAN, "--dense_steps", "-1", "0"), "argument --dense_steps: must be from 0 to 1000000, got -1"),
    (("tune", *WAN, "--dense_steps", "2", "1", "--steps", "3"), "[2, 1] leave none of 3 steps"),
    (("tune", *WAN, "--dense_layers", "2"), "numbers from 0 to 1, got [2]"),
    (("tune", *WAN, "--layer_range", "4-5"), "expected start,stop such as 16,32, got '4-5'"),
    (("tune", *WAN, "--layer_range", "1,9"), "0 <= start < stop <= 2"),
    (("tune", *WAN, "--layer_range", "2,1"), "expected start,stop such as 16,32, got '2,1'"),
    (("tune", *WAN, "--pool", "24"), "pool must be a divisor"),
    (("tune", *WAN, "--backend", "quick"), "invalid choice: 'quick'"),
    (("tune", *WAN, "--dtype", "int8"), "invalid choice: 'int8'"),
    (("tune", *WAN, "--device", "nowhere"), "device 'nowhere' cannot be used"),
    (("verify", *WAN, "--device", "meta"), "device 'meta' cannot be used"),
    (("tune", *WAN, "--parallel_tune", "--device", "cpu"), "leave out --device"),
    (("tune", *WAN, "--height", "64"), "leave out --height"),
    (("tune", *WAN, "--offload"), "there is no GPU"),
    (("tune", "--model_name", "tiny:Wan2.2", "--steps", "1"), "use more steps (see --height"),
    (("tune", *WAN, "--max_length", "640"), "--max_length is for a language model, and 'tiny:Wan' is a diffusion pipe"),
    (("tune", "--model_name", "tiny:Llama", "--steps", "3"), "--steps is for a diffusion pipeline"),
    (("tune", "--model_name", "tiny:Llama", "--max_length", "32"), "must be from 64 to"),
    (("tune", "--model_name", "tiny:Llama", "--prompts", "/nowhere/text"), "/nowhere/text"),
    (("tune", "--model_name", "tiny:Llama", "--prompts", "{folder}"), "no *.txt or *.py file in folder"),
    (("generate", "--model_name", "tiny:Llama", "--prompt", ""), "--prompt must not be empty"),
    (("generate", *WAN, "--model_out_path", "nowhere.pt"), "no tuned file at 'nowhere.pt': run with --tune first"),
    (("compare", *WAN, "--model_out_path", "{folder}/file"), "is damaged or not a tuned file"),
    (("tune", *WAN, "--prompts", "nowhere.txt"), "cannot read the prompts in 'nowhere.txt'"),
    (("tune", *WAN, "--prompts", "{folder}/empty.txt"), "no prompt in"),
    (("tune", *WAN, "--prompts", "{folder}/binary.txt"), "cannot read the prompts"),
    (("tune", *WAN, "--model_out_path", ""), "must name a file that can be written, got '': that is empty"),
    (("tune", *WAN, "--model_out_path", "{folder}"), "/folder': that is a folder"),
    (("tune", *WAN, "--model_out_path", "{folder}/new/"), "/folder/new/': that is a folder"),
    (("tune", *WAN, "--model_out_path", "{folder}/file/tuned.pt"), "/folder/file' is no folder"),
    (("tune", *WAN, "--model_out_path", "{folder}/taken.pt"), "--model_out_path (its statistics) must name a file"),
    (("tune", *WAN, "--model_out_path", "{folder}/" + "x" * 300), "File name too long"),
    (("compare", *WAN, "--out_path", "{folder}/file/out"), "/folder/file' is no folder"),
    (("tune", "--model_name", "owner/model"), "on the hub"),
    (("measure",), "no CUDA GPU"),
]


@pytest.mark.parametrize(("arguments", "message"), REJECTED)
def test_rejects(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """One line, exit code 2, and nothing was made."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    (folder / "taken.json").mkdir(parents=True)
    for name, content in (("file", b""), ("empty.txt", b"\n  \n"), ("binary.txt", b"\xff\xfe\x00")):
        (folder / name).write_bytes(content)
        if name.endswith(".txt") and "tiny:Llama" in arguments:
            (folder / name).unlink()
    before = sorted(tmp_path.rglob("*"))
    assert run(*(argument.format(folder=folder) for argument in arguments)) == 2
    shown = capsys.readouterr().err.splitlines()
    assert message in shown[-1] and "error: " in shown[-1]
    assert sorted(tmp_path.rglob("*")) == before


def test_several_processes_are_not_started_in_vain(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("modify_model.cli.driver.run_parallel", lambda *_: pytest.fail("they were started"))
    assert run("tune", *WAN, "--parallel_tune", "--prompts", "nowhere.txt") == 2
    assert "cannot read the prompts" in capsys.readouterr().err


def test_a_failed_save_keeps_the_calibration(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "tuned.pt"
    tune = ["tune", "--model_name", "tiny:Flux", "--model_out_path", path, *SHORT_PIPELINE, *LOOSE]
    with monkeypatch.context() as context:
        context.setattr("autotune.calibration.save", full)
        assert run(*tune) == 2
    shown = capsys.readouterr().err
    assert "No space left on device; the calibration is kept in" in shown and "--resume" in shown
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.pt.partial.rank0"]
    assert run(*tune, "--resume") == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tuned.html", "tuned.json", "tuned.pt"]
    assert "starting from scratch" not in capsys.readouterr().out
    assert run(*tune, "--resume") == 0
    assert "no checkpoint found at" in capsys.readouterr().out


def test_names_on_the_hub(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache holds is known without a network."""
    cached = {"model_index.json": None, "config.json": str(llama_folder / "config.json")}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: cached[file])
    assert names.kind_of("owner/model") == names.LANGUAGE
    cached["config.json"] = None
    with pytest.raises(ValueError, match="cannot look up 'owner/model' on the hub"):
        names.kind_of("owner/model")


def test_damaged_weights(run: Run, llama_folder: Path, tmp_path: Path, capsys: Any) -> None:
    for file in llama_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 100_000 if file.suffix == ".safetensors" else None])
    assert run("verify", "--model_name", tmp_path) == 1
    assert "FAIL: cannot load the model in" in capsys.readouterr().out
    assert run("tune", "--model_name", tmp_path, "--model_out_path", tmp_path / "tuned.pt") == 2
    assert "cannot load the model in" in capsys.readouterr().err
