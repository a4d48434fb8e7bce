"""The installed command in this process, and what it makes, once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_runs import LOOSE, short

from modify_model.cli import tiny
from modify_model.cli.main import main


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on machines with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run() -> Callable[..., int]:
    """Runs the command; returns its exit code."""

    def call(*arguments: object) -> int:
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            return stopped.code  # type: ignore[return-value]

    return call


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tuned file of a tiny model, made when first asked for."""
    made: dict[str, Path] = {}

    def file(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp("tuned") / "tuned.pt"
            assert main(["tune", "--model_name", name, "--model_out_path", str(path), *LOOSE, *short(name)]) == 0
            made[name] = path
        return made[name]

    return file


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small LLaMA and its tokenizer, as users have them."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(num_hidden_layers=3).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
