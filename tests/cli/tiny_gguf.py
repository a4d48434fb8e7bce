"""A small model of transformers with a tokenizer of bytes, written as one .gguf file in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

gguf = pytest.importorskip("gguf")

TOKENS = [*bytes_to_unicode().values(), "ab", "<begin>", "<end>"]  # bytes, the one merge "a b", special tokens
SIZES = dict(vocab_size=len(TOKENS), bos_token_id=257, eos_token_id=258, pad_token_id=None)


def make() -> Any:
    """The model."""
    return tiny_transformers.make("Qwen2", "sdpa", **SIZES)


def write(model: Any, path: Path) -> Path:
    """Write it; returns the path."""
    config = model.config
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
