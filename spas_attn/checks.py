"""Argument checks of the public calls: every refusal names the argument, what came and what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import Call
from .block_mask import BlockMask
from .selectors.base import per_head

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("bf16", "int8_bf16", "int8_fp8", "auto")
HEAD_DIMS = (16, 256)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    attn_mask: Tensor | None,
    window: int | None,
    layout: str,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pv_threshold: float | Tensor | None,
    precision: str,
    expected_density: float | None,
    mask: BlockMask | None = None,
) -> tuple[Call, tuple[Tensor, Tensor] | None]:
    """Check the arguments of a public call.

    Returns:
        The call in HND layout (views, no copies), and the cumulative lengths of packed sequences or None.
    """
    if layout not in ("HND", "NHD"):
        raise ValueError(f"layout must be 'HND' or 'NHD', got {layout!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    _check_tensors(q, k, v)
    if layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    _check_shapes(q, k, v)
    packed = _check_packed(q, k, cu_seqlens_q, cu_seqlens_k)
    if is_causal:
        _check_causal(q, k, packed)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be a positive number of keys or None, got {window!r}")
    if window is not None and not is_causal:
        raise ValueError("window needs is_causal=True: a query sees its last `window` keys")
    if mask is not None:
        _check_mask(mask, q, k)
    if attn_mask is not None and packed is not None:
        raise ValueError("attn_mask cannot be combined with packed sequences: leave the padding out of the pack")
    call = Call(
        q,
        k,
        v,
        is_causal=bool(is_causal),
        scale=_check_scale(scale, q.shape[-1]),
        attn_mask=_check_attn_mask(attn_mask, q, k),
        window=window,
        pv_threshold=_check_pv_threshold(pv_threshold, q),
        precision=precision,
        expected_density=_check_density(expected_density),
    )
    return call, packed


def _check_pv_threshold(pv_threshold: float | Tensor | None, q: Tensor) -> Tensor | None:
    if pv_threshold is None:
        return None
    if not isinstance(pv_threshold, (int, float, Tensor)):
        raise TypeError(f"pv_threshold must be a number, a tensor or None, got {type(pv_threshold).__name__}")
    if not isinstance(pv_threshold, Tensor) and math.isnan(pv_threshold):
        raise ValueError("pv_threshold must be a number, got nan")
    return per_head(pv_threshold, q.shape[1], "pv_threshold", q.device)


def _check_density(density: float | None) -> float | None:
    if density is None:
        return None
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(f"expected_density must be a number or None, got {type(density).__name__}")
    if not 0 <= density <= 1:
        raise ValueError(f"expected_density must be in [0, 1], got {density}")
    return float(density)


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return float(scale)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, [B, H, L, D] or [B, L, H, D], got {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device ({q.dtype}, {q.device}), got {x.dtype}, {x.device}"
            )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head dim, got {tuple(q.shape)} and {tuple(k.shape)} (HND)")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[1]} and {k.shape[1]}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q and k must not be empty, got {tuple(q.shape)} and {tuple(k.shape)} (HND)")
    if not HEAD_DIMS[0] <= q.shape[3] <= HEAD_DIMS[1]:
        raise ValueError(f"the head dim must be {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {q.shape[3]}")


def _check_packed(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together, got only one of them")
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {q.shape[0]}")
    for name, cu, length in (("cu_seqlens_q", cu_seqlens_q, q.shape[2]), ("cu_seqlens_k", cu_seqlens_k, k.shape[2])):
        if not isinstance(cu, Tensor):
            raise TypeError(f"{name} must be an int32 tensor [n + 1], got {type(cu).__name__}")
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 2:
            raise ValueError(f"{name} must be int32 [n + 1], got {cu.dtype} {tuple(cu.shape)}")
        ends = cu.tolist()
        if ends[0] != 0 or ends[-1] != length or any(a >= b for a, b in zip(ends[:-1], ends[1:], strict=True)):
            raise ValueError(f"{name} must rise from 0 to the total length {length}, got {ends}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    return cu_seqlens_q, cu_seqlens_k


def _check_causal(q: Tensor, k: Tensor, packed: tuple[Tensor, Tensor] | None) -> None:
    lengths = [(q.shape[2], k.shape[2])]
    if packed is not None:
        lengths = list(zip(packed[0].diff().tolist(), packed[1].diff().tolist(), strict=True))
    for q_len, k_len in lengths:
        if q_len > k_len:
            raise ValueError(f"is_causal needs Lq <= Lk (lower-right alignment), got Lq={q_len}, Lk={k_len}")


def _check_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    if (mask.q_len, mask.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"mask was made for lengths {mask.q_len} x {mask.k_len}, but q and k have {q.shape[2]} x {k.shape[2]}"
        )
    if tuple(mask.counts.shape[:2]) != tuple(q.shape[:2]):
        raise ValueError(f"mask has [B, H] = {list(mask.counts.shape[:2])}, but q has {list(q.shape[:2])}")
    if mask.counts.device != q.device:
        raise ValueError(f"mask is on {mask.counts.device}, but q is on {q.device}")


def _check_attn_mask(attn_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Key padding as ``[B, Lk]``, a full mask as ``[B, 1 or H, Lq, Lk]``."""
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a boolean tensor or None, got {type(attn_mask).__name__}")
    batch, heads, q_len, k_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if attn_mask.dtype != torch.bool:
        raise TypeError(f"attn_mask must be boolean (True = attend), got {attn_mask.dtype}")
    if attn_mask.device != q.device:
        raise ValueError(f"attn_mask must be on q's device {q.device}, got {attn_mask.device}")
    shape = tuple(attn_mask.shape)
    if shape == (batch, k_len):
        return attn_mask
    if shape == (batch, 1, 1, k_len):
        return attn_mask[:, 0, 0]
    if len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (q_len, k_len):
        return attn_mask.expand(batch, -1, -1, -1)
    raise ValueError(
        f"attn_mask must be [B, Lk], [B, 1, 1, Lk] or [B, 1 or Hq, Lq, Lk] with B={batch}, Hq={heads}, Lq={q_len}, "
        f"Lk={k_len}, got {shape}"
    )
