"""The diffusion examples and the verifier, on small pipelines with random weights."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cogvideo_example
import diffusers
import flux_example
import hunyuan_example
import numpy as np
import pytest
import torch
import verify_diffusion_implementation
import wan_example
from _command_line import run_parallel
from _diffusion import PROMPTS, main, read_prompts
from _diffusion_models import Example
from _diffusion_tiny import TINY
from PIL import Image
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from autotune import load as load_tuned
from modify_model import patch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "CogVideoX": cogvideo_example,
    "Flux": flux_example,
    "HunyuanVideo": hunyuan_example,
    "HunyuanDiT": hunyuan_example,
    "Wan": wan_example,
    "Wan2.2": wan_example,
}
# Bounds so loose that blocks are left out of attention with random weights.
LOOSE = ["--l1", "0.3", "--pv_l1", "0.35", "--tail", "2"]
SHORT = ["--num_tune_samples", "2", "--steps", "3"]


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(script: ModuleType, *arguments: object) -> int:
    """An example's command line in this process."""
    assert script.__file__ is not None
    return main(script.EXAMPLE, script.__file__, script.__doc__, [str(argument) for argument in arguments])


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}


def same(a: Path, b: Path) -> bool:
    one, two = load_tuned(a), load_tuned(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one if key != "_metadata")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder for each family, with its tuned file ``tuned.pt`` and a comparison; made when first asked for."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            arguments = ["--tune", "--compare", "--model_name", f"tiny:{family}", *SHORT, *LOOSE]
            files = ["--model_out_path", path / "tuned.pt", "--out_path", path]
            assert run(SCRIPTS[family], *arguments, *files, "--device", "cpu") == 0
            made[family] = path
        return made[family]

    return folder


@pytest.mark.parametrize("family", list(SCRIPTS))
def test_tune_and_compare(family: str, folders: Callable[[str], Path]) -> None:
    folder = folders(family)
    assert load_tuned(folder / "tuned.pt")["_metadata"]["family"] == family.partition("2.")[0]
    found = json.loads((folder / "compare.json").read_text())
    (clip,) = found["clips"]
    assert clip["prompt"] == PROMPTS[2] and clip["seed"] == 2  # the first that was not tuned on
    assert 0.02 < clip["sparsity"] < 1 and 10 < clip["psnr"] < 80 and 0 < clip["ssim"] <= 1
    density = np.array(clip["density_by_step_and_layer"], dtype=float)
    assert density.shape[0] == 3 and np.nanmean(density) == pytest.approx(1 - clip["sparsity"], abs=1e-3)
    assert (folder / "sheet.png").stat().st_size > 1000 and (folder / "sparsity.png").is_file()
    assert (folder / "compare.gif").is_file() == ("num_frames" in TINY[family].size)


def test_two_transformers_take_turns(folders: Callable[[str], Path]) -> None:
    clip = json.loads((folders("Wan2.2") / "compare.json").read_text())["clips"][0]
    density = np.array(clip["density_by_step_and_layer"], dtype=float)
    assert density.shape == (3, 4)
    first, second = ~np.isnan(density[:, :2]), ~np.isnan(density[:, 2:])
    assert (first.all(1) ^ second.all(1)).all() and first.any() and second.any()


def test_generate_and_compare_the_saved_file(folders: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    """A fresh process's worth: the same thresholds give the same clip, and dense steps and layers are honoured."""
    folder = folders("Wan")
    base = ["--model_name", "tiny:Wan", "--model_out_path", folder / "tuned.pt", *SHORT, "--device", "cpu"]
    assert run(wan_example, *base, "--compare", "--out_path", tmp_path) == 0
    first, again = (json.loads((path / "compare.json").read_text())["clips"][0] for path in (folder, tmp_path))
    for key in ("psnr", "ssim", "density_by_step_and_layer"):
        assert first[key] == again[key]
    options = ["--dense_steps", 1, 0, "--dense_layers", 1]
    assert run(wan_example, *base, "--compare", "--out_path", tmp_path, *options) == 0
    density = json.loads((tmp_path / "compare.json").read_text())["clips"][0]["density_by_step_and_layer"]
    assert density[0] == [1.0, 1.0] and [row[1] for row in density] == [1.0] * 3
    assert all(row[0] < 1 for row in density[1:])
    assert run(wan_example, *base, "--out_path", tmp_path) == 0  # without --compare: sparse clips alone
    with Image.open(tmp_path / "sparse_2.gif") as clip:
        assert getattr(clip, "n_frames", 1) == 3
    assert "2/2 attention layers replaced" in capsys.readouterr().out


def test_prompts_file_and_calibrated_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("one cat\n\n  two dogs  \nthree birds\n")
    path = tmp_path / "flux.pt"
    base = ["--model_name", "tiny:Flux", "--model_out_path", path, "--prompts", tmp_path / "prompts.txt", *SHORT]
    assert run(flux_example, *base, *LOOSE, "--tune", "--dense_steps", 1, 1) == 0
    steps = load_tuned(path)["_metadata"]["dense_steps"]
    assert steps is not None and 0 < steps[0] < steps[1] < 1
    capsys.readouterr()
    assert run(flux_example, *base, "--compare", "--out_path", tmp_path, "--num_compare", 9) == 0
    assert "note: --num_compare 9: only 1 prompts are left" in capsys.readouterr().err
    (clip,) = json.loads((tmp_path / "compare.json").read_text())["clips"]
    assert clip["prompt"] == "three birds"
    density = clip["density_by_step_and_layer"]  # the file's own schedule, without being told again
    assert density[0] == density[2] == [1.0, 1.0] and max(density[1]) < 1


@pytest.mark.slow
def test_compile(folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders("Wan")
    in_place, compiled = torch.nn.Module.compile, []

    def compiling(module: torch.nn.Module) -> None:
        in_place(module, backend="eager")  # the tracing is what can fail; inductor takes a minute
        compiled.append(type(module).__name__)

    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    torch._dynamo.reset()
    base = ["--model_name", "tiny:Wan", "--model_out_path", folder / "tuned.pt", *SHORT, "--out_path", tmp_path]
    assert run(wan_example, *base, "--compare", "--compile") == 0
    assert compiled == ["WanTransformer3DModel"] and torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()
    first, again = (json.loads((path / "compare.json").read_text())["clips"][0] for path in (folder, tmp_path))
    assert again["density_by_step_and_layer"] == first["density_by_step_and_layer"]
    assert again["psnr"] == pytest.approx(first["psnr"], abs=0.5)


@pytest.mark.slow
def test_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "tuned.pt"
    script = [sys.executable, str(wan_example.__file__), "--tune", "--model_name", "tiny:Wan", "--model_out_path", path]
    arguments = [*map(str, script), "--num_tune_samples", "4", "--steps", "4", *LOOSE]
    whole = tmp_path / "whole.pt"
    assert run(wan_example, *arguments[2:], "--model_out_path", whole) == 0
    partial = tmp_path / "tuned.pt.partial.rank0"
    halting = [arguments[0], Path(__file__).with_name("paused.py"), *arguments[1:]]
    process = subprocess.Popen(halting, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert any(line == b"halted\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=100)
    assert process.returncode == 130 and b"--resume" in shown and b"Traceback" not in shown
    assert partial.exists() and not path.exists()
    assert run(wan_example, *arguments[2:], "--resume", "--tune_every", 2) == 2  # that is another calibration
    assert run(wan_example, *arguments[2:], "--resume") == 0
    assert same(path, whole) and not partial.exists()


@pytest.mark.slow
def test_parallel_tune(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "tuned.pt"
    command = [sys.executable, wan_example.__file__, "--parallel_tune", "--compare", "--model_name", "tiny:Wan"]
    command += ["--model_out_path", path, "--out_path", tmp_path, *SHORT, *LOOSE]
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert same(path, folders("Wan") / "tuned.pt")
    assert "PSNR dB" in done.stdout and done.stdout.count("thresholds:") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--l1", "0.1", "--pv_l1", "0.05"], "it must exceed l1=0.1"),
        (["--tail", "high"], "expected a number or 'none', got 'high'"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--num_tune_samples", "0"], "--num_tune_samples must be at least 1"),
        (["--dense_steps", "-1", "0"], "--dense_steps must be two numbers, 0 or more"),
        (["--resume"], "give both"),
        (["--parallel_tune", "--device", "cpu"], "leave out --device"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_refuses_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(wan_example, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (wan_example, ["--model_out_path", "nowhere.pt"], "no tuned file at 'nowhere.pt': run with --tune first"),
        (wan_example, ["--tune", "--prompts", "nowhere.txt"], "no file of prompts at 'nowhere.txt'"),
        (wan_example, ["--tune", "--model_name", "/nowhere/model"], "no folder '/nowhere/model'"),
        (wan_example, ["--tune", "--model_name", "tests"], "no pipeline in folder 'tests'"),
        (wan_example, ["--tune", "--model_name", "tiny:Flux"], "tiny:Wan, tiny:Wan2.2"),
        (wan_example, ["--tune", "--model_name", "tiny:Wan", "--height", "64"], "leave out --height"),
        (wan_example, ["--tune", "--model_name", "tiny:Wan", "--offload"], "there is no GPU"),
        (wan_example, ["--tune", "--model_name", "tiny:Wan", "--device", "nowhere"], "cannot be used"),
        (wan_example, ["--tune", "--model_name", "tiny:Wan", "--num_tune_samples", "11"], "only 10 prompts"),
        (wan_example, ["--tune", "--model_name", "tiny:Wan", "--dense_layers", "2"], "numbers from 0 to 1, got [2]"),
        (wan_example, ["--tune", "--model_name", "tiny:Wan", "--steps", "3", "--dense_steps", "2", "1"], "leave one"),
        (wan_example, ["--tune", "--model_name", "tiny:Wan2.2", "--steps", "1"], "too few steps are watched"),
        (flux_example, ["--tune"], "cannot load 'black-forest-labs/FLUX.1-dev' from the hub"),
    ],
)
def test_user_errors(
    script: ModuleType, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    if "--model_out_path" not in arguments:
        arguments = [*arguments, "--model_out_path", str(tmp_path / "tuned.pt")]
    assert run(script, *arguments) == 2
    assert message in capsys.readouterr().err


BAD_PATHS = [
    (
        ["--tune", "--model_out_path", ""],
        "--model_out_path must name a file that can be written, got '': that is empty",
    ),
    (["--tune", "--model_out_path", "{}"], "/folder': that is a folder"),
    (["--tune", "--model_out_path", "{}/new/"], "/folder/new/': that is a folder"),
    (["--tune", "--model_out_path", "{}/file/tuned.pt"], "/folder/file' is no folder"),
    (["--tune", "--model_out_path", "{}/taken.pt"], "its statistics go to"),
    (["--tune", "--model_out_path", "{}/" + "x" * 300], "File name too long"),
    (["--parallel_tune", "--model_out_path", "{}"], "/folder': that is a folder"),
    (["--tune", "--compare", "--out_path", "{}/file"], "--out_path must name a folder that can be written, got "),
    (["--out_path", "{}/file/out"], "/folder/file' is no folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PATHS)
def test_paths_are_checked_first(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    (folder / "taken.json").mkdir(parents=True)
    (folder / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        run(wan_example, *(argument.format(folder) for argument in arguments))
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["file", "taken.json"]  # nothing was made


def test_a_failed_save_keeps_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    arguments = ["--tune", "--model_name", "tiny:Flux", "--model_out_path", tmp_path / "tuned.pt", *SHORT, *LOOSE]
    with monkeypatch.context() as context:
        context.setattr("autotune.calibration.save", full)
        assert run(flux_example, *arguments) == 2
    shown = capsys.readouterr().err
    assert "No space left on device; the calibration is kept in" in shown and "--resume" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.pt.partial.rank0"]
    assert run(flux_example, *arguments, "--resume") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned.json", "tuned.pt"]
    assert "nothing to resume" not in capsys.readouterr().out
    assert run(flux_example, *arguments, "--resume") == 0
    assert "nothing to resume at" in capsys.readouterr().out


def test_parallel_tune_refuses_what_one_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("_command_line.run_parallel", lambda *_: pytest.fail("it was started"))
    base = ["--parallel_tune", "--model_out_path", tmp_path / "tuned.pt"]
    for arguments, message in (
        (["--model_name", "/nowhere"], "no folder '/nowhere'"),
        (["--model_name", "tiny:Wan", "--height", 64], "leave out --height"),
        (["--model_name", "tiny:Wan", "--prompts", "nowhere.txt"], "no file of prompts"),
    ):
        assert run(wan_example, *base, *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(2)", 2), ("1 / 0", 1), ("", 0)])
def test_parallel_exit_codes(ending: str, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nprint(*sys.argv[1:])\n{ending}\n")
    assert run_parallel(str(script), ["--tune", "x y"]) == code
    shown, said = capfd.readouterr()
    assert "--tune x y" in shown and "ChildFailedError" not in said
    assert ("Traceback" in said) == ("ZeroDivisionError" in said) == (code == 1)  # the script's own only


def test_empty_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match="nothing to run: no prompt in"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read the prompts"):
        read_prompts(str(tmp_path / "binary.txt"))


def small_wan(folder: Path) -> Path:
    """A whole Wan pipeline on disk, with a text encoder, a tokenizer of bytes and a VAE."""
    torch.manual_seed(0)
    encoder = T5Config(d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4, vocab_size=384)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    tiny = TINY["Wan"].make()
    pipe = diffusers.WanPipeline(ByT5Tokenizer(), T5EncoderModel(encoder), vae, tiny.scheduler, tiny.transformer)
    pipe.save_pretrained(folder)
    return folder


def test_whole_pipeline_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """from_pretrained, text encoder, VAE and frames: what a real model does."""
    folder = small_wan(tmp_path / "wan")
    base = ["--model_name", folder, "--model_out_path", tmp_path / "tuned.pt", "--out_path", tmp_path, "--steps", 2]
    size = ["--height", 160, "--width", 160, "--frames", 9, "--num_tune_samples", 2]
    assert run(wan_example, *base, *size, *LOOSE, "--tune", "--compare") == 0
    (clip,) = json.loads((tmp_path / "compare.json").read_text())["clips"]
    assert 0 < clip["sparsity"] < 1 and clip["psnr"] is not None
    with Image.open(tmp_path / "compare.gif") as pictures:
        assert getattr(pictures, "n_frames", 1) == 9
    for wrong, message in ((["--height", 264], "got 264; nearest: 256 and 272"), (["--frames", 10], "9 and 13")):
        assert run(wan_example, *base, *size, *wrong, "--tune") == 2
        assert message in capsys.readouterr().err
    assert run(flux_example, *base, "--tune") == 2
    assert "is a WanPipeline; this script runs FluxPipeline" in capsys.readouterr().err
    (folder / "transformer" / "config.json").write_text("{")
    assert run(wan_example, *base, "--tune") == 2
    assert "cannot load the pipeline in folder" in capsys.readouterr().err


@pytest.mark.parametrize("family", list(TINY))
def test_verify(family: str, folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model_name", f"tiny:{family}", "--device", "cpu"]
    if family in ("Flux", "HunyuanVideo"):
        arguments += ["--model_out_path", str(folders(family) / "tuned.pt")]
        capsys.readouterr()
    code = verify_diffusion_implementation.main(arguments)
    out = capsys.readouterr().out
    assert code == 0, out
    lines = out.splitlines()
    assert [line[:5] for line in lines if line.startswith("[")] == [f"[{n}/5]" for n in range(1, 6)]
    assert sum(line.startswith("    PASS") for line in lines) == 5
    for text in ("equal to the unpatched model bit for bit", "100.0% of the blocks", "restored:", "5/5 steps passed"):
        assert text in out
    assert ("tuned file" in out) == ("--model_out_path" in arguments)
    few = re.search(r"few blocks: .* ([\d.]+)% of the blocks computed", out)
    assert few is not None and float(few[1]) < 90


def test_verify_sees_a_difference(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A patch that changes the output must not pass, nor one that never becomes sparse."""

    def changing(pipe: Any, **options: Any) -> Any:
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.01)
        return patch(pipe, **options)

    monkeypatch.setattr(verify_diffusion_implementation, "patch", changing)
    assert verify_diffusion_implementation.main(["--model_name", "tiny:Wan", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL: untuned, the patched model differs" in out and "FAIL: untuned, the patched pipeline generates" in out

    def never_sparse(pipe: Any, **options: Any) -> Any:
        return patch(pipe, dense_layers=[0, 1], **options)

    monkeypatch.setattr(verify_diffusion_implementation, "patch", never_sparse)
    assert verify_diffusion_implementation.main(["--model_name", "tiny:Wan", "--device", "cpu"]) == 1
    assert "no block was left out" in capsys.readouterr().out


def test_verify_refuses(folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_diffusion_implementation.main(["--model_name", "/nowhere"]) == 1
    out = capsys.readouterr().out
    assert "FAIL: no folder '/nowhere'" in out and out.count("not run") == 4
    file = folders("Wan") / "tuned.pt"
    capsys.readouterr()
    assert verify_diffusion_implementation.main(["--model_name", "tiny:Wan2.2", "--model_out_path", str(file)]) == 1
    assert "layers of the model are not in the file" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        verify_diffusion_implementation.main(["--model_name", "tiny:Wan", "--steps", "0"])


def test_examples_differ_in_a_few_lines() -> None:
    for script in (cogvideo_example, flux_example, hunyuan_example, wan_example):
        assert script.__file__ is not None and len(Path(script.__file__).read_text().splitlines()) < 40
        assert isinstance(script.EXAMPLE, Example) and all(name in TINY for name in script.EXAMPLE.tiny)
        assert all(hasattr(diffusers, name) for name in script.EXAMPLE.pipelines)
