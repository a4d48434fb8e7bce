"""Prefill methods as functions, against the selectors they name, and their configuration file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spas_attn import Call, sparse_attention
from spas_attn.prefill import (
    SHIPPED,
    Flexprefill_prefill,
    Full_prefill,
    Minference_prefill,
    SparseConfig,
    Xattention_prefill,
)
from spas_attn.selectors import Dense, FlashPrefill, FlexPrefill, MInference, RowShare, XAttention


@pytest.fixture(scope="module")
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts' last 300 of 500 tokens, four query heads on two; peaked, so that selections differ."""
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 4, 300, 32, generator=generator)
    k, v = torch.randn(2, 2, 2, 500, 32, generator=generator)
    return q, k, v


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention in float64 by its definition; ``seen`` is bool, broadcastable to ``[B, Hq, Lq, Lk]``."""
    q, k, v = (x.double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).float()


FORMS: list[tuple[Any, dict[str, Any], Any]] = [
    (Xattention_prefill, {}, XAttention(0.95, 16)),
    (Xattention_prefill, {"threshold": torch.tensor([0.2, 0.5, 0.9, 1.0]), "stride": 8},
     XAttention(torch.tensor([0.2, 0.5, 0.9, 1.0]), 8)),
    (Flexprefill_prefill, {"gamma": 0.6, "block_size": 128}, FlexPrefill(0.6)),
    (Flexprefill_prefill, {"sparsity_ratio": 0.5},
     RowShare(FlexPrefill(min_budget=0, block_q=64, block_k=64), 0.5)),
    (Minference_prefill, {"vertical_size": 30, "slash_size": 60}, MInference("vertical_slash", 30, 60)),
    (Minference_prefill, {"adaptive_budget": 0.3}, MInference("vertical_slash", adaptive_budget=0.3)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "selector"), FORMS)
def test_functions_run_their_selector(function: Any, arguments: dict[str, Any], selector: Any, qkv: Any) -> None:
    q, k, v = qkv
    expected, stats = sparse_attention(q, k, v, selector, is_causal=True, return_stats=True)
    out = function(query_states=q, key_states=k, value_states=v, strict=True, **arguments)
    assert torch.equal(out, expected) and out.shape == q.shape
    assert stats.mask is not None
    offset = torch.arange(300)[:, None] + 200
    seen = stats.mask.token_mask() & (torch.arange(500) <= offset)
    torch.testing.assert_close(out, plain(q, k, v, seen), atol=2e-5, rtol=1e-5)


def test_sparsity_ratio_is_the_share_that_a_row_drops(qkv: Any) -> None:
    q, k, _ = qkv
    for ratio in (0.0, 0.3, 0.75):
        selector = SparseConfig(metric="flex", sparsity_ratio=ratio).selector()
        mask = selector.select(q, k, is_causal=True)
        visible = Dense(block_q=64, block_k=64).select(q, k, is_causal=True).counts
        # Rounded up; the first block and the two or three of the diagonal are there whatever the share is.
        wanted = torch.ceil(visible.double() * (1 - ratio) - 1e-6)
        forced = selector.forced(Call.make(q, k, k, is_causal=True)).sum(-1)
        assert torch.equal(mask.counts.double(), torch.maximum(wanted, forced.double()))
        assert ratio == 0.0 or bool((mask.counts < visible).all())


def test_without_causality_later_keys_count(qkv: Any) -> None:
    q, k, v = qkv
    out = Xattention_prefill(q, k, v, threshold=1.0, causal=False)
    torch.testing.assert_close(out, plain(q, k, v, torch.ones(1, dtype=torch.bool)), atol=2e-5, rtol=1e-5)


def test_full_prefill_attends_where_the_mask_is_true(qkv: Any) -> None:
    q, k, v = qkv
    causal = torch.arange(500) <= torch.arange(300)[:, None] + 200
    full = torch.rand(2, 1, 300, 500, generator=torch.Generator().manual_seed(1)) < 0.5
    full[..., 0] = True
    padding = torch.ones(2, 500, dtype=torch.bool)
    padding[1, :60] = False
    for mask, seen in ((None, causal), (full, causal & full), (padding, causal & padding[:, None, None])):
        out = Full_prefill(q, k, v, attention_mask=mask)
        torch.testing.assert_close(out, plain(q, k, v, seen), atol=2e-5, rtol=1e-5)
    out = Full_prefill(q, k, v, causal=False, attention_mask=full)
    torch.testing.assert_close(out, plain(q, k, v, full), atol=2e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="attention_mask must be a boolean"):
        Full_prefill(q, k, v, attention_mask=full.float())
    with pytest.raises(ValueError, match="attn_mask must be"):
        Full_prefill(q, k, v, attention_mask=full[:, 0, 0, :400])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.9, "sparsity_ratio": 0.5}, "gamma and sparsity_ratio"),
        ({"sparsity_ratio": None}, "one of gamma and sparsity_ratio"),
        ({"sparsity_ratio": 1.0}, "sparsity_ratio must be"),
        ({"sparsity_ratio": -0.1}, "sparsity_ratio must be"),
        ({"block_size": 100}, "block_q must be one of"),
    ],
)
def test_bad_arguments_of_flexprefill(arguments: dict[str, Any], message: str, qkv: Any) -> None:
    with pytest.raises(ValueError, match=message):
        Flexprefill_prefill(*qkv, **arguments)


def test_causality_is_said_once(qkv: Any) -> None:
    with pytest.raises(TypeError, match="is_causal is the argument `causal`"):
        Xattention_prefill(*qkv, is_causal=False)
    with pytest.raises(TypeError, match="causal must be True or False"):
        Xattention_prefill(*qkv, causal="yes")  # type: ignore[arg-type]


def test_shipped_configuration() -> None:
    """The five keys, and the values that a configuration without a file has."""
    shipped = json.loads(SHIPPED.read_text())
    assert shipped == {
        "stride": 16, "threshold": 0.95, "block_size": 64, "sparsity_ratio": 0.2, "adaptive_budget": 0.1,
    }  # fmt: skip
    for metric in ("xattn", "flex", "minfer", "flash", "full"):
        read, made = SparseConfig.from_json(metric=metric).selector(), SparseConfig(metric=metric).selector()
        assert read == made and (read.block_q, read.block_k) == (64, 64)


@pytest.mark.parametrize(
    ("metric", "changes", "expected"),
    [
        ("xattn", {"stride": 8}, XAttention(0.95, 8, block_q=64, block_k=64)),
        ("xattn", {"threshold": 0.7}, XAttention(0.7, 16, block_q=64, block_k=64)),
        ("flex", {"sparsity_ratio": 0.6}, RowShare(FlexPrefill(min_budget=0, block_q=64, block_k=64), 0.4)),
        ("minfer", {"adaptive_budget": 0.3}, MInference(adaptive_budget=0.3, block_q=64, block_k=64)),
        ("xattn", {"block_size": 128}, XAttention(0.95, 16)),
        ("flash", {"alpha": 0.3}, FlashPrefill(0.3, block_q=64, block_k=64)),
        ("full", {}, Dense(block_q=64, block_k=64)),
    ],
)
def test_every_key_is_used(metric: str, changes: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(SHIPPED.read_text()) | changes | {"metric": metric}))
    assert SparseConfig.from_json(path).selector() == expected


def test_rules_of_their_own() -> None:
    flex = SparseConfig(metric="flex", gamma=0.9, tau=0.2).selector()
    assert flex == FlexPrefill(0.9, 0.2, block_q=64, block_k=64)
    sizes = SparseConfig(metric="minfer", vertical_size=500, slash_size=700).selector()
    assert sizes == MInference("vertical_slash", 500, 700, block_q=64, block_k=64)
    heads = SparseConfig(threshold=[0.5, 0.9]).selector()  # type: ignore[arg-type]
    assert isinstance(heads, XAttention) and torch.equal(torch.as_tensor(heads.threshold), torch.tensor([0.5, 0.9]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"strid": 8}', r"unknown keys \['strid'\]"),
        ('{"stride": 8, "stride": 16}', "stand twice"),
        ('{"gamma": 0.9, "sparsity_ratio": 0.2}', "contradict"),
        ('{"adaptive_budget": 0.1, "vertical_size": 10, "slash_size": 10}', "takes the place of"),
        ('{"vertical_size": 10}', "go together"),
        ('{"metric": "flexprefill"}', "metric must be one of"),
        ('{"stride": 24}', "stride must be a divisor"),
        ('{"threshold": 1.5}', r"threshold must be in \[0, 1\]"),
        ('{"threshold": "high"}', "threshold must be a number"),
        ('{"sparsity_ratio": 1}', "sparsity_ratio must be"),
        ('{"adaptive_budget": 2}', "adaptive_budget must be"),
        ("[16]", "one JSON object"),
        ("{", "is no configuration"),
    ],
)
def test_bad_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        SparseConfig.from_json(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json"):
        SparseConfig.from_json(tmp_path / "none.json")


def test_row_share_refuses() -> None:
    ranked = XAttention()
    with pytest.raises(TypeError, match="ranked must be a Selector"):
        RowShare(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be in"):
        RowShare(ranked, 0.0)
    with pytest.raises(ValueError, match="belong to the selector that ranks"):
        RowShare(ranked, 0.5, local=128)
    assert RowShare(dataclasses.replace(ranked, block_q=64)).block_q == 64
