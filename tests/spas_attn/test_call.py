"""Call: what it holds, and what the library makes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from spas_attn import BlockMask, Call, block_sparse_attention, sparse_attention
from spas_attn.selectors import TopK

Q, K = torch.randn(2, 4, 100, 32), torch.randn(2, 2, 150, 32)


def make(**options: Any) -> Call:
    return Call.make(Q, K, K, **options)


def test_views_and_defaults() -> None:
    call = make()
    assert call.q.data_ptr() == Q.data_ptr()
    assert (call.q_len, call.k_len, call.offset, call.group) == (100, 150, 50, 2)
    assert (call.scale, call.precision, call.mask, call.blocks, call.text) == (32**-0.5, "native", None, None, ())
    nhd = Call.make(Q.transpose(1, 2), K.transpose(1, 2), K.transpose(1, 2), layout="NHD")
    assert nhd.q.shape == Q.shape
    assert nhd.q.data_ptr() == Q.data_ptr()
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.scale = 1.0  # type: ignore[misc]


def test_the_old_name_of_native_precision() -> None:
    assert make(precision="bf16") == make(precision="native")
    assert torch.equal(
        sparse_attention(Q, K, K, TopK(), precision="bf16", strict=True),  # type: ignore[arg-type]
        sparse_attention(Q, K, K, TopK(), strict=True),
    )


@pytest.mark.parametrize("value", [3.0, torch.tensor(3.0), torch.full((4,), 3.0), torch.full((1,), 3)])
def test_pv_threshold_is_per_head(value: Any) -> None:
    call = make(pv_threshold=value)
    assert call.pv_threshold is not None
    assert call.pv_threshold.tolist() == [3.0] * 4
    assert call.pv_threshold.dtype == torch.float32


def test_a_mask_brings_its_block_sizes() -> None:
    mask = BlockMask.from_dense(torch.ones(2, 4, 2, 2, dtype=torch.bool), 100, 150, 64, 128)
    assert make(mask=mask).blocks == make().replace(mask=mask).blocks == (64, 128)
    with pytest.raises(TypeError, match="maks"):
        make().replace(maks=mask)


def test_masks_of_keys_queries_and_tokens() -> None:
    padding = torch.ones(2, 150, dtype=torch.bool)
    padding[0, :60] = False
    for attn_mask in (padding, padding[:, None, None]):
        call = make(attn_mask=attn_mask, is_causal=True, window=20)
        assert call.key_mask is not None
        assert torch.equal(call.key_mask, padding)
        queries = call.query_mask()
        assert queries is not None
        assert torch.equal(queries, padding[:, 50:]), "queries are the last tokens"
    i, j = torch.arange(30, 40)[:, None] + 50, torch.arange(150)
    expected = ((j <= i) & (j > i - 20))[None, None] & padding[:, None, None]
    assert torch.equal(torch.as_tensor(call.token_mask(30, 40)), expected)
    assert make(attn_mask=padding).query_mask() is None, "cross-attention: nothing is known of the queries"
    full = torch.ones(2, 1, 100, 150, dtype=torch.bool)
    assert make(attn_mask=full).key_mask is None
    assert make().token_mask(0, 100) is None


def test_split() -> None:
    cu = torch.tensor([0, 40, 100], dtype=torch.int32), torch.tensor([0, 100, 150], dtype=torch.int32)
    call = Call.make(Q[:1], K[:1], K[:1], cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], scale=0.3)
    parts = call.split()
    assert [(part.q_len, part.k_len, part.scale, part.cu_seqlens_q) for part in parts] == [
        (40, 100, 0.3, None),
        (60, 50, 0.3, None),
    ]
    assert len(make().split()) == 1
    mask = TopK(0.5).select(Q[:1], K[:1], is_causal=False, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1])
    with pytest.raises(TypeError, match="brings its own cu_seqlens"):
        block_sparse_attention(Q[:1], K[:1], K[:1], mask, cu_seqlens_q=cu[0])
