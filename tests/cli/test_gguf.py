"""A .gguf file as a model: the weights in it, and the command on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_transformers
import torch
from short_runs import LOOSE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from autotune.module import sparse_modules
from modify_model import restore
from modify_model.load_llama import load_model
from spas_attn.selectors import XAttention

gguf = pytest.importorskip("gguf")

TOKENS = [*bytes_to_unicode().values(), "ab", "<begin>", "<end>"]  # bytes, the one merge "a b", special tokens
SIZES = dict(vocab_size=len(TOKENS), bos_token_id=257, eos_token_id=258, pad_token_id=None)


@pytest.fixture
def model() -> Any:
    return tiny_transformers.make("Qwen2", "sdpa", **SIZES)


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    """The model with a tokenizer of bytes in one file, in float32."""
    path, config = tmp_path / "tiny.gguf", model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    assert run("verify", "--model_name", file, "--max_new_tokens", 3) == 0
    out = capsys.readouterr().out
    assert "Qwen2ForCausalLM" in out and "equal bit for bit while untuned" in out and "5/5 steps passed" in out
