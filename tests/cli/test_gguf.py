"""A .gguf file as a model: the weights in it, and the command on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import LOOSE
from tiny_gguf import TOKENS, make, write

from autotune.module import sparse_modules
from modify_model import restore
from modify_model.load_llama import load_model
from spas_attn.selectors import XAttention


@pytest.fixture
def model() -> Any:
    return make()


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    """The model in one file."""
    return write(model, tmp_path / "tiny.gguf")


@torch.no_grad()
def test_the_model_in_the_file(model: Any, file: Path) -> None:
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    loaded, tokenizer = load_model(file, XAttention(0.5, block_q=64, block_k=64), device="cpu")
    assert tokenizer("xab")["input_ids"] == [TOKENS.index("x"), 256]
    assert {inner.mode for inner in sparse_modules(loaded).values()} == {"sparse"}
    expected, sparse = model(ids).logits, loaded(ids).logits
    assert torch.isfinite(sparse).all() and not torch.equal(sparse, expected)
    assert torch.equal(restore(loaded)(ids).logits, expected)


def test_the_command(file: Path, run: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    tuned = ["--model_out_path", tmp_path / "tuned.pt"]
    assert run("tune", "--model_name", file, *tuned, *LOOSE, "--num_tune_samples", 2) == 0
    assert run("generate", "--model_name", file, *tuned, "--prompt", "x = 1\n" * 20, "--max_new_tokens", 3) == 0
    assert "--- 3 new tokens" in capsys.readouterr().out
    assert run("compare", "--model_name", file, *tuned, "--max_length", 512, "--num_compare", 1) == 0
    assert "perplexity: dense" in capsys.readouterr().out
    assert run("verify", "--model_name", file, "--max_new_tokens", 3) == 0
    out = capsys.readouterr().out
    assert "Qwen2ForCausalLM" in out and "equal bit for bit while untuned" in out and "5/5 steps passed" in out
