"""Who may import whom: a folder imports only from those above it, and spas_attn without Triton or transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["spas_attn", "autotune", "modify_model", "evaluate"]  # upper to lower
# Inside spas_attn, from the last to be imported to the first; backends and selectors do not know each other.
INSIDE = {
    "tune_kernels": {"attention", "crossover", "selectors", "backends", "kernels", "block_mask", "metrics"},
    "attention": {"checks", "dispatch", "selectors", "backends", "kernels", "block_mask", "metrics"},
    "dispatch": {"crossover", "backends", "block_mask", "metrics"},
    "crossover": set(),
    "checks": {"selectors", "backends", "block_mask", "metrics"},
    "selectors": {"selectors", "kernels", "block_mask", "metrics"},
    "backends": {"backends", "kernels", "block_mask", "metrics"},
    "kernels": {"kernels", "block_mask", "metrics"},
    "block_mask": set(),
    "metrics": set(),
}
ATTENTION = sorted((ROOT / "spas_attn").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full dotted names of everything that a file imports, at any depth of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from .backends import Call` names a module or something in one; both readings are covered.
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


def test_imported_resolves_relative_names() -> None:
    names = imported(ROOT / "spas_attn" / "backends" / "cpu.py")
    assert {"torch", "spas_attn.block_mask", "spas_attn.backends.base", "spas_attn.backends.sdpa"} <= names


@pytest.mark.parametrize("floor", FLOORS)
def test_no_upward_imports(floor: str) -> None:
    forbidden = {*FLOORS[FLOORS.index(floor) + 1 :], "evaluate", "tests"}
    # Scripts import one another by file name, without the folder's.
    for path in sorted((ROOT / floor).rglob("*.py")):
        wrong = {name for name in imported(path) if name.split(".")[0] in forbidden}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("path", ATTENTION, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_inside_spas_attn(path: Path) -> None:
    inside = path.relative_to(ROOT / "spas_attn").parts[0].removesuffix(".py")
    if inside == "__init__":
        return
    parts = [name.split(".") for name in imported(path) if name.startswith("spas_attn.")]
    wrong = {".".join(names) for names in parts if names[1] in INSIDE and names[1] not in INSIDE[inside]}
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_spas_attn_knows_no_models() -> None:
    for path in ATTENTION:
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"transformers", "diffusers", "accelerate", "peft"}, path


def test_scripts_are_no_package() -> None:
    assert not (ROOT / "evaluate" / "__init__.py").exists(), "a package `evaluate` exists on the registry"


WITHOUT = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec  # as if these were not installed
absent = {"triton", "transformers", "diffusers", "sageattention", "flash_attn"}
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in absent else find(name, *more)
import torch
import spas_attn
from spas_attn import backends
from spas_attn.selectors import TopK

q = torch.randn(1, 2, 300, 64)
out = spas_attn.sparse_attention(q, q, q, TopK(keep=0.5), is_causal=True, strict=True)
assert out.isfinite().all()
for name in ("triton", "sage"):
    missing = backends.get(name).missing()
    assert missing, f"{name} says that it can run"
    try:
        spas_attn.sparse_attention(q, q, q, TopK(keep=0.5), is_causal=True, strict=True, backend=name)
    except RuntimeError as error:
        assert missing in str(error), (missing, error)
    else:
        raise AssertionError(f"{name} ran")
assert not {"triton", "transformers"} & set(sys.modules)
"""


def test_spas_attn_runs_without_triton_and_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["spas_attn", "autotune", "modify_model"])
def test_every_package_is_installed_with_its_types(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import spas_attn

    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split()[-1:] == [spas_attn.__version__], done.stderr
