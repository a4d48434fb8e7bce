"""Attention of some heads on their own keys, as a StreamingCache calls it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune import SparseAttention
from autotune.tuned import FILE_KEYS
from spas_attn import BlockMask, block_sparse_attention
from spas_attn.call import Call
from spas_attn.selectors import ByHead, Dense
from spas_attn.selectors.by_head import for_heads

_OTHERS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # all but cuDNN


def of_heads(inner: SparseAttention, places: tuple[int, ...]) -> SparseAttention:
    """The attention of a layer's full heads, with their thresholds."""
    selector, tuned = inner.selector, inner.tuned
    assert isinstance(selector, ByHead) and tuned is not None
    precision: Any = inner.precision
    made = SparseAttention(
        inner.l1, inner.pv_l1, inner.tail, selector=for_heads(selector.rest, places, len(selector.streams)),
        backend=inner.backend, precision=precision,
    )  # fmt: skip
    tensors = {name: getattr(tuned, name)[..., list(places)] for name in FILE_KEYS.values()}
    made.set_thresholds(dataclasses.replace(tuned, **tensors))
    return made


def of_all_heads(mask: BlockMask, q: Tensor) -> BlockMask:
    """One head's lists for all heads of a call."""
    batch, heads = q.shape[:2]
    lists = (mask.counts.expand(batch, heads, -1), mask.indices.expand(batch, heads, -1, -1))
    return BlockMask(*lists, mask.block_q, mask.block_k, mask.q_len, mask.k_len, trusted=True)


def allowed(mask: Any, length: int, tokens: int, device: torch.device) -> Tensor | None:
    """What a mask of a short call allows: bool ``[B or 1, 1, length, tokens]``; None for all keys."""
    if mask is None and length == 1:
        return None
    keys = torch.arange(tokens, device=device)
    below = (keys <= torch.arange(tokens - length, tokens, device=device)[:, None])[None, None]
    if mask is None:
        return below
    if isinstance(mask, Tensor) and mask.dim() == 2:  # FlashAttention's: of the keys
        return below & mask[:, None, None, :tokens].bool()
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] < tokens:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a StreamingCache needs masks of sdpa, eager or FlashAttention, the same for all heads: {found}"
        )
    mask = mask[..., :tokens]
    return mask if mask.dtype == torch.bool else mask == 0


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention of a few rows: the query heads of a KV head are rows of one call, so that it is read once."""
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    if mask is not None and length > 1:
        mask = mask.repeat(1, 1, group, 1)
    out = few_rows(q.reshape(batch, k.shape[1], group * length, -1), k, v, mask, scale)
    if mask is not None and length > 1:  # what a row of padding gets differs from kernel to kernel
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0)
    return out.reshape(batch, heads, length, -1)


def few_rows(rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA without cuDNN, which it prefers on some GPUs: cuDNN plans for every new number of keys (40 ms, and 490 ms
    with a mask, on an H200 with torch 2.11), so in decoding for every token.
    """
    if not rows.is_cuda:
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    if mask is None and _has_flash(rows.device, rows.dtype, rows.shape[-1]):
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.default(rows, k, v, scale=scale)[0]
        return out
    with sdpa_kernel(_OTHERS):
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)


@functools.cache
def _has_flash(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether PyTorch's FlashAttention computes such calls."""
    half = dtype in (torch.float16, torch.bfloat16) and dim % 8 == 0 and dim <= 256
    return (
        half
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def causal(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, once: Callable[..., Any]) -> Tensor:
    """Dense causal attention, of a chunk at the end of more keys too; ``once`` keeps what a forward's layers share."""
    if q.shape[2] == k.shape[2] and seen is None:
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    one = Call(q[:, :1], k[:, :1], k[:, :1], True, scale, seen)
    blocks = once("all", lambda: Dense().mask_of(one))
    return block_sparse_attention(q, k, v, of_all_heads(blocks, q), is_causal=True, scale=scale, attn_mask=seen)
