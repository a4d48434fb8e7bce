"""stream_heads: tables of heads on patched models, beside thresholds, in files, and in further calibrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune import calibrate, extract_sparse_attention_state_dict, load_sparse_attention_state_dict, save
from autotune.module import sparse_modules
from modify_model import StreamingCache, patch, stream_heads
from modify_model.cli import tiny
from spas_attn.published import write_head_table
from spas_attn.selectors import ByHead, ExactKeys, MeanSimilarity, Streaming
from spas_attn.selectors.by_head import for_heads

pytestmark = pytest.mark.usefixtures("no_grad")

TABLE = [[1.0, 0.0], [0.25, 0.5]]  # of two layers with two KV heads, each of two query heads
SIZES = dict(sink_tokens=64, local_tokens=64)


def ids(seed: int, length: int = 400) -> Tensor:
    return torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def calibrated(model: Any, bound: float = 0.9) -> Any:
    """A model whose thresholds were calibrated; its statistics are with the calibration."""
    with calibrate(model, l1=bound, pv_l1=1.05 * bound, tail=None, query_blocks=3, rounds=1) as calibration:
        for seed in calibration.prompts(range(3)):
            model(ids(seed), use_cache=False)
    return calibration


def inner(model: Any) -> list[Any]:
    return list(sparse_modules(model).values())


def streams(model: Any) -> list[list[bool]]:
    return [list(m.selector.streams) if isinstance(m.selector, ByHead) else [False] * m.heads for m in inner(model)]


def test_an_untuned_model_streams_and_is_dense_elsewhere() -> None:
    model = stream_heads(patch(tiny.llama()), TABLE, sparsity=0.5, **SIZES)
    assert streams(model) == [[False, False, True, True], [True, True, False, False]]
    for module in inner(model):
        assert module.mode == "sparse" and module.is_sparse.tolist() == list(module.selector.streams)
        assert not module.tuned.calibrated
        assert isinstance(module.selector.rest, ExactKeys), "what a calibration will tune"
        rule = module.selector.streaming
        assert (rule.sink_tokens, rule.local_tokens, rule.block_q, rule.block_k) == (64, 64, 64, 64)
    x = torch.randn(1, 4, 512, 32, generator=torch.Generator().manual_seed(0))
    served, _ = inner(model)[0].tuned.serve(inner(model)[0].selector, x.device)
    counts = served.select(x, x[:, :2], is_causal=True).counts[0, :, -1].tolist()
    assert counts == [8, 8, 3, 3]  # all; the sink, 64 keys and the diagonal


def test_a_table_from_a_folder(tmp_path: Path) -> None:
    write_head_table(tmp_path, TABLE, 64, 128)
    model = stream_heads(patch(tiny.llama()), tmp_path, threshold=0.5)
    assert streams(model) == [[False, False, True, True], [True, True, False, False]]
    assert inner(model)[0].selector.streaming.local_tokens == 128
    given = stream_heads(model, tmp_path / "full_attention_heads.tsv", sparsity=0.25, local_tokens=0)
    assert streams(given) == [[False, False, True, True], [False] * 4], "the new table replaces the old one"
    rule = inner(given)[0].selector.streaming
    assert (rule.sink_tokens, rule.local_tokens) == (64, 0)


def test_full_heads_keep_their_thresholds(tmp_path: Path) -> None:
    model = patch(tiny.llama(), selector=MeanSimilarity(pool=16, block_q=64, block_k=64))
    calibrated(model)
    before = [module.tuned for module in inner(model)]
    stream_heads(model, TABLE, sparsity=0.5, **SIZES)
    for old, module in zip(before, inner(model), strict=True):
        full = ~torch.tensor(module.selector.streams)
        for name in ("is_sparse", "threshold", "pv"):
            assert torch.equal(getattr(module.tuned, name)[full], getattr(old, name)[full])
        assert bool(module.is_sparse[~full].all())
        assert module.tuned.calibrated and not module.tuned.checked, "the whole was not checked with the real kernel"
    out = model(ids(9), use_cache=False).logits

    save(extract_sparse_attention_state_dict(model), tmp_path / "tuned.pt")
    loaded = patch(tiny.llama())
    load_sparse_attention_state_dict(loaded, tmp_path / "tuned.pt")
    assert streams(loaded) == streams(model)
    assert torch.equal(loaded(ids(9), use_cache=False).logits, out)
    assert StreamingCache(loaded).get_seq_length() == 0
    # A table after the file is loaded does what one before it was saved did.
    again = load_sparse_attention_state_dict(patch(tiny.llama()), tmp_path / "tuned.pt")
    stream_heads(again, [[1.0, 1.0], [1.0, 1.0]], **SIZES)
    assert not any(isinstance(module.selector, ByHead) for module in inner(again))
    for old, module in zip(before, inner(again), strict=True):
        full = ~torch.tensor(streams(model)[module.layer_idx])
        assert torch.equal(module.tuned.threshold[full], old.threshold[full])
        assert not bool(module.tuned.is_sparse[~full].any()), "nothing is known of heads that streamed"


@pytest.mark.parametrize("bound", [0.9, 1e-6])
def test_calibrated_further_under_bounds(bound: float, tmp_path: Path) -> None:
    """Streaming heads stay as they are, whatever their error; the full ones get thresholds, or run dense."""
    model = patch(tiny.llama(), selector=MeanSimilarity(pool=16, block_q=64, block_k=64, local=0))
    stream_heads(model, TABLE, sparsity=0.5, **SIZES)
    wanted = streams(model)
    calibration = calibrated(model, bound)
    assert streams(model) == wanted
    for module, flags in zip(inner(model), wanted, strict=True):
        assert bool(module.is_sparse[torch.tensor(flags)].all())
        full = module.tuned.threshold[~torch.tensor(flags)]
        assert float(full.min()) < 0.9 if bound == 0.9 else float(full.min()) > 0.99, "the bound holds for full heads"
        assert module.tuned.calibrated and module.tuned.checked
    out = model(ids(9), use_cache=False).logits
    calibration.save(tmp_path / "tuned.pt")
    for target in ({}, {"sparsity": 0.05}) if bound == 0.9 else ({},):
        loaded = load_sparse_attention_state_dict(patch(tiny.llama()), tmp_path / "tuned.pt", **target)
        assert all(bool(module.is_sparse[torch.tensor(module.selector.streams)].all()) for module in inner(loaded))
        assert target or torch.equal(loaded(ids(9), use_cache=False).logits, out)


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ([[1.0, 0.0]], SIZES, "the table of heads has 1 layers, but 2 are needed"),
        ([[1.0] * 4] * 2, SIZES, "the table of heads has 4 heads, but 2 are needed"),
        ([[1.0, 2.0]] * 2, SIZES, "numbers from 0 to 1"),
        (TABLE, SIZES, "give sparsity or threshold"),
        (TABLE, SIZES | {"sparsity": 1.5}, r"sparsity must be in \[0, 1\], got 1.5"),
        (TABLE, SIZES | {"sparsity": 0.5, "threshold": 0.5}, "exclude each other"),
        (TABLE, {"sparsity": 0.5}, "sink_tokens must be a number of tokens"),
        (TABLE, {"sparsity": 0.5, "sink_tokens": 64, "local_tokens": -1}, "local_tokens must be a number of tokens"),
        ("no/such/folder", SIZES, "is no table of heads"),
    ],
)
def test_tables_that_do_not_fit(table: Any, arguments: dict[str, Any], message: str) -> None:
    model = patch(tiny.llama())
    with pytest.raises(ValueError, match=message):
        stream_heads(model, table, **arguments)
    assert all(module.mode == "dense" and not isinstance(module.selector, ByHead) for module in inner(model))


def test_models_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="patch it first"):
        stream_heads(tiny.llama(), TABLE, sparsity=0.5, **SIZES)
    model = patch(tiny.llama())
    with calibrate(model):
        with pytest.raises(RuntimeError, match="is being calibrated"):
            stream_heads(model, TABLE, sparsity=0.5, **SIZES)
        model(ids(0))
    filtered = patch(tiny.llama(), selector=MeanSimilarity(0.5, 0.2), calibrated=False)
    with pytest.raises(ValueError, match="similarity filters"):
        stream_heads(filtered, TABLE, sparsity=0.5, **SIZES)


def test_layers_out_of_range_are_left() -> None:
    model = stream_heads(patch(tiny.llama(), layer_range=(1, 2)), TABLE, sparsity=0.75, **SIZES)
    assert streams(model) == [[True, True, True, True]], "the row of its own layer"
    cache = StreamingCache(model)
    model(ids(0, 100), past_key_values=cache)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "StreamingLayer"]


def test_parts_of_the_heads_on_ranks() -> None:
    """Under sequence parallelism by exchange of heads."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 8, 500, 16, generator=generator), torch.randn(1, 4, 500, 16, generator=generator)
    rest = MeanSimilarity(torch.linspace(0.3, 0.9, 8), pool=16, block_q=64, block_k=64)
    selector = ByHead(
        (True, True, False, False, True, True, True, True), Streaming(64, 64, block_q=64, block_k=64), rest
    )
    kept = selector.select(q, k, is_causal=True).to_dense()
    for rank in range(2):
        own = slice(4 * rank, 4 * rank + 4), slice(2 * rank, 2 * rank + 2)
        heads = tuple(range(8)[own[0]])
        part = for_heads(selector, heads, 8).select(q[:, own[0]], k[:, own[1]], is_causal=True)
        assert torch.equal(part.to_dense(), kept[:, own[0]])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ByHead((), Streaming(), MeanSimilarity()), TypeError, "streams must hold True or False"),
        (lambda: ByHead((1, 0), Streaming(), MeanSimilarity()), TypeError, "streams must hold True or False"),  # type: ignore[arg-type]
        (lambda: ByHead((True,), MeanSimilarity(), Streaming()), TypeError, "streaming must be a Streaming"),  # type: ignore[arg-type]
        (lambda: ByHead((True,), Streaming(), MeanSimilarity(), local=64), ValueError, "belong to the parts of ByHead"),
        (lambda: ByHead((True,), Streaming(block_q=64), MeanSimilarity()), ValueError, "need one block_q, got 64 and"),
    ],
)
def test_parts_that_do_not_go_together(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
