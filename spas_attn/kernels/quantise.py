"""Q and K to int8 with one scale per block (SageAttention, arXiv 2410.02367), K smoothed by its mean first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv

_CHUNK = 512  # keys whose sum one program of the mean pass takes
_STEP = 64


# fmt: off
@triton.jit
def _partial_sum_kernel(
    X, Valid, Partial,
    stride_b, stride_h, stride_n, stride_d, stride_valid_b, stride_valid_n,
    heads, length, chunks,
    D: tl.constexpr, DPAD: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, PADDING: tl.constexpr,
):
    # fmt: on
    chunk = tl.program_id(0)
    b = tl.cast(tl.program_id(1) // heads, tl.int64)
    h = tl.cast(tl.program_id(1) % heads, tl.int64)
    offs_d = tl.arange(0, DPAD)
    total = tl.zeros([DPAD], tl.float32)
    for first in range(0, CHUNK, STEP):
        rows = tl.cast(chunk * CHUNK + first + tl.arange(0, STEP), tl.int64)
        wanted = rows < length
        if PADDING:
            wanted &= tl.load(Valid + b * stride_valid_b + rows * stride_valid_n, mask=wanted, other=0) != 0
        at = b * stride_b + h * stride_h + rows[:, None] * stride_n + offs_d[None, :] * stride_d
        x = tl.load(X + at, mask=wanted[:, None] & (offs_d < D)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(Partial + (tl.cast(tl.program_id(1), tl.int64) * chunks + chunk) * DPAD + offs_d, total)


# fmt: off
@triton.jit
def _quantise_kernel(
    X, Mean, Valid, Out, Scale,
    stride_b, stride_h, stride_n, stride_d, stride_valid_b, stride_valid_n,
    heads, length, blocks, factor,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr, PADDING: tl.constexpr,
):
    # fmt: on
    block = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    offs_d = tl.arange(0, DPAD)
    rows = tl.cast(block * BLOCK + tl.arange(0, BLOCK), tl.int64)
    inside = rows < length
    wanted = inside
    if PADDING:
        wanted &= tl.load(Valid + b * stride_valid_b + rows * stride_valid_n, mask=inside, other=0) != 0
    at = b * stride_b + h * stride_h + rows[:, None] * stride_n + offs_d[None, :] * stride_d
    take = wanted[:, None] & (offs_d < D)[None, :]
    x = tl.load(X + at, mask=take, other=0.0).to(tl.float32)
    if SMOOTH:
        mean = tl.load(Mean + head * DPAD + offs_d)
        x = tl.where(take, x - mean[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1e-12) / 127.0
    # Adding 1.5 * 2^23 leaves the nearest integer in the low bits, on every device alike.
    integer = (x / scale + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    to = (head * length + rows)[:, None] * DPAD + offs_d[None, :]
    tl.store(Out + to, integer.to(tl.int8), mask=inside[:, None])
    tl.store(Scale + head * blocks + block, scale * factor)


def mean_over_valid(x: Tensor, valid: Tensor | None, dim: int) -> Tensor:
    """Mean over the tokens that may be attended to.

    Args:
        x: ``[B, H, L, D]``, any strides.
        valid: uint8 ``[B, L]``, 0 = padding, or None for all tokens.
        dim: padded head dim, a power of two.

    Returns:
        float32 ``[B, H, dim]``, the columns from D on 0. Partial sums are added in a fixed order.
    """
    batch, heads, length, d = x.shape
    chunks = cdiv(length, _CHUNK)
    partial = torch.empty(batch, heads, chunks, dim, dtype=torch.float32, device=x.device)
    strides = (0, 0) if valid is None else valid.stride()
    # fmt: off
    _partial_sum_kernel[(chunks, batch * heads)](
        x, x if valid is None else valid, partial,
        *x.stride(), *strides,
        heads, length, chunks,
        D=d, DPAD=dim, CHUNK=_CHUNK, STEP=_STEP, PADDING=valid is not None,
    )
    # fmt: on
    if valid is None:
        return partial.sum(2) / max(length, 1)
    return partial.sum(2) / valid.sum(-1).clamp(min=1)[:, None, None]


def quantise(
    x: Tensor, block: int, dim: int, *, factor: float = 1.0, mean: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """To int8, one scale per head and block of ``block`` tokens; ``x`` itself is only read.

    Args:
        x: ``[B, H, L, D]``, any strides.
        block: tokens that share a scale, a power of two.
        dim: padded head dim, a power of two.
        factor: multiplied into the stored scales.
        mean: float32 ``[B, H, dim]`` to subtract first, or None.
        valid: uint8 ``[B, L]``; tokens with 0 become zeros and do not count for the scale.

    Returns:
        int8 ``[B, H, L, dim]``, contiguous, and float32 scales ``[B, H, ceil(L / block)]``.
    """
    batch, heads, length, d = x.shape
    blocks = cdiv(length, block)
    out = torch.empty(batch, heads, length, dim, dtype=torch.int8, device=x.device)
    scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    strides = (0, 0) if valid is None else valid.stride()
    # fmt: off
    _quantise_kernel[(blocks, batch * heads)](
        x, scale if mean is None else mean, x if valid is None else valid, out, scale,
        *x.stride(), *strides,
        heads, length, blocks, factor,
        D=d, DPAD=dim, BLOCK=block, SMOOTH=mean is not None, PADDING=valid is not None,
    )
    # fmt: on
    return out, scale
