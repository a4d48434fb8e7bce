"""Argument checks of a call: every refusal names the argument, what came and what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .block_mask import BlockMask

PerHead = float | Tensor  # one value, or a tensor [Hq]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 256)


def per_head(value: PerHead, heads: int, name: str, device: torch.device) -> Tensor:
    """``value`` as a float32 tensor ``[heads]``."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=device)
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.shape[0] not in (1, heads)):
        raise ValueError(f"{name} must be a float or a tensor [{heads}], got shape {tuple(tensor.shape)}")
    return tensor.expand(heads)


def check_range(name: str, value: PerHead, low: float, high: float, *, above: bool = False) -> None:
    """Reject numbers outside [low, high] (with ``above``: (low, high]) and NaN, in a float or a tensor.

    A tensor's values are read, which waits for its device; under torch.compile and in a graph's capture they are not.
    """
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a tensor of numbers, got {value.dtype}")
        if value.dim() > 1:
            raise ValueError(f"{name} must be a float or a tensor [Hq], got shape {tuple(value.shape)}")
        if torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        fits = (value > low if above else value >= low) & (value <= high)
        shown: object = value.tolist()
        good = bool(fits.all())
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor [Hq], got {type(value).__name__}")
    else:
        shown = value
        good = (value > low if above else value >= low) and value <= high
    if not good:
        raise ValueError(f"{name} must be in {'(' if above else '['}{low:g}, {high:g}], got {shown}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Reject a value that is not among the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Reject what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_window(window: int | None, is_causal: bool) -> None:
    """Reject windows that are no numbers of keys, or come without causality."""
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a positive number of keys or None, got {window!r}")
    if not is_causal:
        raise ValueError("window needs is_causal=True: a query sees its last `window` keys")


def check_error_bound(bound: float) -> float:
    """``error_bound`` as a number above 0."""
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
        raise ValueError(f"error_bound must be a number above 0 (a relative error), got {bound!r}")
    return float(bound)


def check_pv_threshold(pv_threshold: float | Tensor | None, q: Tensor) -> Tensor | None:
    """PV thresholds as float32 ``[Hq]``, None when PV skip is off."""
    if pv_threshold is None:
        return None
    check_range("pv_threshold", pv_threshold, 0, math.inf, above=True)  # 0 and less would skip every block
    return per_head(pv_threshold, q.shape[1], "pv_threshold", q.device)


def check_density(density: float | None) -> float | None:
    """An expected density in [0, 1], or None."""
    if density is None:
        return None
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(f"expected_density must be a number or None, got {type(density).__name__}")
    if not 0 <= density <= 1:
        raise ValueError(f"expected_density must be in [0, 1], got {density}")
    return float(density)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale; ``head_dim ** -0.5`` by default."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, got {scale}")
    return float(scale)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Reject what is no 4-D floating tensor of one dtype and device."""
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


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Reject shapes (HND) that do not belong together."""
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


def check_packed(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Bounds of packed sequences, one tensor where both are equal; None when the call holds none.

    They are read here unless they are one tensor that is not on the host: then the call need not wait for it.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together, got only one of them")
    if q.shape[0] != 1:
        raise ValueError(f"packed sequences need a batch of 1, got {q.shape[0]}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor):
            raise TypeError(f"{name} must be an int32 tensor [n + 1], got {type(cu).__name__}")
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 2:
            raise ValueError(f"{name} must be int32 [n + 1], got {cu.dtype} {tuple(cu.shape)}")
    same = cu_seqlens_q is cu_seqlens_k and q.shape[2] == k.shape[2]
    for name, cu, length in (("cu_seqlens_q", cu_seqlens_q, q.shape[2]), ("cu_seqlens_k", cu_seqlens_k, k.shape[2])):
        if not same or is_readable(cu):
            check_ends(name, cu, length)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )
    equal = same or (is_readable(cu_seqlens_q) and is_readable(cu_seqlens_k) and cu_seqlens_q.equal(cu_seqlens_k))
    return cu_seqlens_q, cu_seqlens_q if equal else cu_seqlens_k


def is_readable(cu_seqlens: Tensor) -> bool:
    """Whether bounds can be read without waiting for a device."""
    return cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ends(name: str, cu_seqlens: Tensor, length: int) -> list[int]:
    """The bounds as numbers, read on the host; a ValueError unless they rise from 0 to ``length``."""
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a >= b for a, b in zip(ends[:-1], ends[1:], strict=True)):
        raise ValueError(f"{name} must rise from 0 to the total length {length}, got {ends}")
    return ends


def check_sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    """Logits of attention sinks as float32 ``[Hq]`` on q's device."""
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a tensor [Hq] or None, got {type(sinks).__name__}")
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be floating-point logits, got {sinks.dtype}")
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks must be [Hq] = [{q.shape[1]}], got {tuple(sinks.shape)}")
    return sinks.to(q.device, torch.float32)


def check_causal(is_causal: bool, q: Tensor, k: Tensor, packed: tuple[Tensor, Tensor] | None) -> None:
    """Reject more queries than keys under causality, in any sequence."""
    if not is_causal:
        return
    lengths = [(q.shape[2], k.shape[2])]
    if packed is not None and packed[0] is not packed[1]:
        lengths = list(zip(packed[0].diff().tolist(), packed[1].diff().tolist(), strict=True))
    for q_len, k_len in lengths:
        if q_len > k_len:
            raise ValueError(f"is_causal needs Lq <= Lk (lower-right alignment), got Lq={q_len}, Lk={k_len}")


def check_mask(mask: BlockMask | None, q: Tensor, k: Tensor) -> None:
    """Reject a block mask of other lengths, heads or device."""
    if mask is None:
        return
    if (mask.q_len, mask.k_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"mask was made for lengths {mask.q_len} x {mask.k_len}, but q and k have {q.shape[2]} x {k.shape[2]}"
        )
    if tuple(mask.counts.shape[:2]) != tuple(q.shape[:2]):
        raise ValueError(f"mask has [B, H] = {list(mask.counts.shape[:2])}, but q has {list(q.shape[:2])}")
    if mask.counts.device != q.device:
        raise ValueError(f"mask is on {mask.counts.device}, but q is on {q.device}")


def check_attn_mask(attn_mask: Tensor | None, q: Tensor, k: Tensor, packed: object) -> Tensor | None:
    """Key padding as ``[B, Lk]``, a full mask as ``[B, 1 or H, Lq, Lk]``."""
    if attn_mask is None:
        return None
    if packed is not None:
        raise ValueError("attn_mask cannot be combined with packed sequences: leave the padding out of the pack")
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
