"""Loading a model that is sparse at once: every form of a configuration, and what is refused before a model is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import ByT5Tokenizer, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from autotune.module import sparse_modules
from modify_model import restore
from modify_model.load_llama import load_model
from spas_attn.prefill import SHIPPED, SparseConfig
from spas_attn.selectors import FlashPrefill, FlexPrefill, RowShare, Streaming, XAttention

BLOCKS = {"block_q": 64, "block_k": 64}


@pytest.fixture
def saved(make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    """A folder with a small LLaMA and its tokenizer."""
    make_llama(vocab_size=384).save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def selectors(model: Any) -> list[Any]:
    return [inner.selector for inner in sparse_modules(model).values()]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SHIPPED, XAttention(0.95, 16, **BLOCKS)),
        (str(SHIPPED), XAttention(0.95, 16, **BLOCKS)),
        (None, XAttention(0.95, 16, **BLOCKS)),
        (SparseConfig(metric="flex"), RowShare(FlexPrefill(min_budget=0, **BLOCKS), 0.8)),
        (FlashPrefill(0.3), FlashPrefill(0.3)),
    ],
)
def test_forms_of_a_configuration(config: Any, expected: Any, saved: Path) -> None:
    model, tokenizer = load_model(saved, config, device="cpu")
    assert selectors(model) == [expected] * 2 and not model.training
    assert all(inner.mode == "sparse" for inner in sparse_modules(model).values())
    assert tokenizer("ab")["input_ids"][:2] == [100, 101]


def test_a_prompt_runs_sparse_at_once(saved: Path) -> None:
    layers = [Streaming(64, 64, **BLOCKS), Streaming(64, 128, **BLOCKS)]
    model, _ = load_model(saved, layers, device="cpu", dtype="float32")
    assert selectors(model) == layers
    for inner in sparse_modules(model).values():
        inner.record_density = True
    ids = torch.randint(3, 200, (1, 640), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        sparse = model(ids).logits
        dense = restore(model)(ids).logits
    assert sparse.isfinite().all() and not torch.equal(sparse, dense)
    # Rows up to the width of sink, window and diagonal see all that there is.
    torch.testing.assert_close(sparse[:, :128], dense[:, :128], atol=1e-4, rtol=1e-4)


def test_any_causal_model(tmp_path: Path) -> None:
    small = GraniteConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    GraniteForCausalLM(small).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, SparseConfig(threshold=0.5), device="cpu")
    assert selectors(model) == [XAttention(0.5, 16, **BLOCKS)] * 2


def test_what_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    missing = tmp_path / "no model"
    with pytest.raises(TypeError, match="config must be a SparseConfig"):
        load_model(missing, 0.9)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a SparseConfig"):
        load_model(missing, [])
    with pytest.raises(ValueError, match="is no configuration"):
        load_model(missing, tmp_path / "none.json")
    with pytest.raises(TypeError, match="name must be a folder"):
        load_model(SparseConfig(), SHIPPED)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device and device_map exclude"):
        load_model(missing, None, device="cpu", device_map="auto")


def test_another_number_of_layers(saved: Path) -> None:
    with pytest.raises(ValueError, match="selector"):
        load_model(saved, [XAttention()] * 3, device="cpu")
