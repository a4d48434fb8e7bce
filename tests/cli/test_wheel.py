"""The built package, outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = (
    "import sys, modify_model; from modify_model.cli.main import main; print(modify_model.__file__); sys.exit(main())"
)


@pytest.mark.slow
def test_wheel(llama_folder: Path, tmp_path: Path) -> None:
    """It holds the command and all that it needs, and demands only what the packages import."""
    source, away = tmp_path / "source", tmp_path / "away"
    away.mkdir()
    for name in ("spas_attn", "autotune", "modify_model"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run([*map(str, build)], check=True, capture_output=True, timeout=200)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    info = next((tmp_path / "site").glob("*.dist-info"))
    assert "spas-attn = modify_model.cli.main:main" in (info / "entry_points.txt").read_text()
    demanded = [line for line in (info / "METADATA").read_text().splitlines() if line.startswith("Requires-Dist: ")]
    names = {line.split()[1].split(">")[0] for line in demanded if "extra ==" not in line}
    assert names == {"torch", "triton", "numpy", "scipy"}

    def run(*arguments: object) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", START, *map(str, arguments)]
        done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(tmp_path / "site"))
        return done.stdout

    assert "tune" in run("--help")
    model = ["--model_name", llama_folder, "--max_length", 256]
    assert "thresholds: tuned.pt" in run("tune", *model, "--model_out_path", "tuned.pt", "--num_tune_samples", 2)
    assert "5/5 steps passed" in run("verify", "--model_name", llama_folder, "--max_length", 640, "--max_new_tokens", 2)
    assert sorted(path.name for path in away.iterdir()) == ["tuned.html", "tuned.json", "tuned.pt"]
