"""Sums and largest magnitudes of the columns of ``[B, H, L, D]`` tensors, over all tokens or every n-th."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv

_STEP = 64  # rows taken at a time
_SPAN, _CHUNKS = 512, 64  # least rows of a program, most programs of a head


# fmt: off
@triton.jit
def _column_kernel(
    X, Valid, Out, Count,
    stride_b, stride_h, stride_n, stride_d, stride_valid_b, stride_valid_n,
    heads, length, tokens, every, span, chunks,
    D: tl.constexpr, DPAD: tl.constexpr, STEP: tl.constexpr, AMAX: tl.constexpr, PADDING: tl.constexpr,
):
    """Per column, the sum or the largest magnitude of ``span`` of the ``tokens`` rows 0, every, 2 every, ..."""
    # fmt: on
    chunk = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    offs_d = tl.arange(0, DPAD)
    columns = X + b * stride_b + h * stride_h + offs_d[None, :] * stride_d
    total = tl.zeros([STEP, DPAD], tl.float32)
    count = tl.zeros([STEP], tl.float32)
    end = tl.minimum((chunk + 1) * span, tokens)
    for first in range(chunk * span, end, STEP):
        visited = first + tl.arange(0, STEP)
        rows = tl.cast(visited, tl.int64) * every
        wanted = (visited < end) & (rows < length)
        if PADDING:
            wanted &= tl.load(Valid + b * stride_valid_b + rows * stride_valid_n, mask=wanted, other=0) != 0
        x = tl.load(columns + rows[:, None] * stride_n, mask=wanted[:, None] & (offs_d < D)[None, :], other=0.0)
        x = x.to(tl.float32)
        if AMAX:
            total = tl.maximum(total, tl.abs(x))
        else:
            total += x
            count += wanted.to(tl.float32)
    to = head * chunks + chunk
    if AMAX:
        tl.store(Out + to * DPAD + offs_d, tl.max(total, 0))
    else:
        tl.store(Out + to * DPAD + offs_d, tl.sum(total, 0))
        tl.store(Count + to, tl.sum(count, 0))


def partial_columns(
    x: Tensor, dim: int, valid: Tensor | None, tokens: int, every: int, *, amax: bool
) -> tuple[Tensor, Tensor]:
    """Partial column statistics float32 ``[B * H, chunks, dim]`` and the rows in each, float32 ``[B * H, chunks]``.

    ``tokens`` rows are taken, every ``every``-th. No atomics: partial results are put together in a fixed order.
    """
    batch, heads, length, d = x.shape
    span = max(_SPAN, cdiv(cdiv(tokens, _CHUNKS), _STEP) * _STEP)
    chunks = cdiv(tokens, span)
    out = torch.empty(batch * heads, chunks, dim, dtype=torch.float32, device=x.device)
    count = out if amax else torch.empty(batch * heads, chunks, dtype=torch.float32, device=x.device)
    # fmt: off
    _column_kernel[(chunks, batch * heads)](
        x, x if valid is None else valid, out, count,
        *x.stride(), *((0, 0) if valid is None else valid.stride()),
        heads, length, tokens, every, span, chunks,
        D=d, DPAD=dim, STEP=_STEP, AMAX=amax, PADDING=valid is not None, num_warps=4 if dim <= 128 else 8,
    )
    # fmt: on
    return out, count
