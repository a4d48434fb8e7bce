"""The snippets of docs/long_prompts.md run, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from autotune.module import sparse_modules

PAGE = Path(__file__).resolve().parents[1] / "docs" / "long_prompts.md"


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"(<!-- needs a model -->\n)?```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for needs_a_model, code in found:
        if not needs_a_model:
            exec(compile(code, str(PAGE), "exec"), names)
    assert len(found) == 7 and names["out"].shape == names["exact"].shape == (2, 8, 1024, 64)
    assert [type(inner.selector).__name__ for inner in sparse_modules(names["model"]).values()] == ["MInference"] * 2
    assert capsys.readouterr().out.startswith("attention ")
