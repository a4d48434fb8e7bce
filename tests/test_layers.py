"""Who may import whom: a folder imports only from those above it, and spas_attn without Triton or transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("spas_attn", "autotune", "modify_model")
FLOORS = ["spas_attn", "autotune", "modify_model", "modify_model.cli", "evaluate"]  # from the ground up
# What a part of spas_attn may import, besides parts of its own folder (and checks, block_mask and so on their own).
GROUND = {"metrics", "block_mask", "checks", "packing", "traced", "epoch"}
INSIDE = {
    **dict.fromkeys(GROUND, GROUND),
    "call": GROUND,
    "kernels": GROUND | {"kernels"},
    "selectors": {"call", "checks", "block_mask", "selectors"},
    "fused": GROUND | {"call", "selectors", "kernels"},
    "select": GROUND | {"call", "selectors", "kernels", "fused", "replay"},
    "backends": GROUND | {"call", "kernels", "backends", "replay"},
    "cost_model": GROUND | {"call"},
    "plan": GROUND | {"call", "selectors", "select", "backends", "cost_model"},
    "replay": GROUND | {"kernels", "selectors"},
    "gradients": GROUND | {"call", "backends", "replay"},
    "attend": GROUND | {"call", "selectors", "select", "backends", "cost_model", "plan", "gradients"},
    "again": GROUND | {"call", "selectors", "backends", "plan", "attend", "replay"},
    "attention": GROUND | {"call", "selectors", "select", "backends", "cost_model", "plan", "attend", "again"},
    "efficient": GROUND | {"call", "selectors", "backends", "plan", "attention", "efficient"},
    "efficient_attention": GROUND | {"selectors", "efficient"},
    "prefill": GROUND | {"call", "selectors", "attention"},
    "published": {"selectors"},
    "features": GROUND,
    "candidates": GROUND | {"features"},
    "choose": {"attention", "candidates", "features", "cost_model", "selectors"},
    "measure": GROUND | {"call", "selectors", "select", "backends", "cost_model", "plan", "attention"},
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that a file imports, at any depth of its code; the name is "" for a module."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {(module, alias.name) for alias in node.names}
    return found


def sources(module: str, name: str) -> set[str]:
    """The files that `from module import name` is about; a package stands for those that it takes its names from."""
    if f"{module}.{name}" in FILES:
        return {f"{module}.{name}"}
    if name and f"{module}.{name}.__init__" in FILES:
        module, name = f"{module}.{name}", ""
    if f"{module}.__init__" not in FILES:
        return {module} & FILES.keys()
    exported = [pair for pair in imported(FILES[f"{module}.__init__"]) if pair[0].split(".")[0] in PACKAGES]
    chosen = [pair for pair in exported if pair[1] == name] or exported
    return set().union(*(sources(*pair) for pair in chosen))


GRAPH = {
    name: set().union(*(sources(*pair) for pair in imported(path)))
    for name, path in FILES.items()
    if not name.endswith("__init__")
}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The files of one circle of imports, in order; [] when there is none."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := walk(name, []))), [])


def floor_of(module: str) -> int | None:
    """Index of the floor that a module belongs to, None for others' modules."""
    belongs = [FLOORS.index(floor) for floor in FLOORS if f"{module}.".startswith(f"{floor}.")]
    return max(belongs, default=None)


def part_of(module: str) -> str:
    """The part of spas_attn that a module belongs to."""
    return module.split(".")[1]


def test_names_are_resolved() -> None:
    """Guards the tests below: relative, lazy, type-checking and re-exported names are seen."""
    assert {"spas_attn.block_mask", "spas_attn.call", "spas_attn.backends.base", "spas_attn.backends.sdpa"} <= GRAPH[
        "spas_attn.backends.cpu"
    ]
    assert "spas_attn.kernels.launch" in GRAPH["spas_attn.backends.triton"], "imported inside a function"
    assert {"spas_attn.fused", "spas_attn.selectors.topk"} <= GRAPH["spas_attn.select"]
    assert {"spas_attn.kernels.select", "spas_attn.selectors.topk"} <= GRAPH["spas_attn.fused"]
    assert "spas_attn.selectors.dense" in GRAPH["spas_attn.plan"]
    assert "spas_attn.backends.flash" in GRAPH["spas_attn.plan"], "a whole package"
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert [floor_of(name) for name in ("autotune.files", "modify_model.cli.main", "modify_models", "torch")] == [
        1,
        3,
        None,
        None,
    ]


def test_no_circles() -> None:
    """Two files never import each other, not even inside a function or for types alone."""
    assert not circle(GRAPH), " -> ".join(circle(GRAPH))


def test_no_upward_imports() -> None:
    paths = [*FILES.values(), *sorted((ROOT / "evaluate").rglob("*.py"))]
    for path in paths:
        own = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        assert own is not None
        for module, name in imported(path):
            theirs = floor_of(f"{module}.{name}" if name else module)
            assert theirs is None or theirs <= own, f"{path.relative_to(ROOT)} imports {module}.{name}"
            assert module.split(".")[0] != "tests", f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("name", [name for name in GRAPH if name.startswith("spas_attn.")])
def test_layers_inside_spas_attn(name: str) -> None:
    wrong = {other for other in GRAPH[name] if part_of(other) not in INSIDE[part_of(name)]}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_spas_attn_knows_no_models() -> None:
    for name, path in FILES.items():
        tops = {module.split(".")[0] for module, _ in imported(path)} if name.startswith("spas_attn.") else set()
        assert not tops & {"transformers", "diffusers", "accelerate", "peft"}, path


LIGHT = """
import sys
import torch
before = set(sys.modules)
import spas_attn
print(*sorted(set(sys.modules) - before))
"""


def test_import_is_light() -> None:
    """torch._dynamo alone would be 900 modules and a second."""
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    added = done.stdout.split()
    assert "spas_attn.attention" in added, done.stderr
    assert len(added) <= 52, added
    others = {name.split(".")[0] for name in added} - {"spas_attn"}
    assert not others & {"torch", "scipy", "numpy", "transformers", "diffusers", "triton"}, others


def test_scripts_are_no_package() -> None:
    assert not (ROOT / "evaluate" / "__init__.py").exists(), "a package `evaluate` exists on the registry"


WITHOUT = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec  # as if these were not installed
absent = {"triton", "transformers", "diffusers", "sageattention", "flash_attn", "cudnn"}
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
