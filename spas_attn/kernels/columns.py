"""Sums of the columns of ``[B, H, L, D]`` tensors, over all tokens or every n-th."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .operands import Rows, Valid, are_valid
from .recorded import launch

_STEP = 64  # rows taken at a time
_SPAN, _CHUNKS = 512, 64  # least rows of a program, most programs of a head


@triton.jit
def _column_kernel(
    x, valid, out, count, heads, length, tokens, every, span, chunks,
    D: tl.constexpr, DPAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of ``span`` of the ``tokens`` rows 0, every, 2 every, ...: sums and their number.

    Args:
        x: Rows [B, H, L, D]; valid: Valid or None.
        out: float32 [B, H, chunks, DPAD]; count: float32 [B, H, chunks].
    """
    chunk = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    offs_d = tl.arange(0, DPAD)
    p_columns = x.data + b * x.stride_b + h * x.stride_h + offs_d[None, :] * x.stride_d  # [1, DPAD]
    total = tl.zeros([STEP, DPAD], tl.float32)
    number = tl.zeros([STEP], tl.float32)
    end = tl.minimum((chunk + 1) * span, tokens)
    for first in range(chunk * span, end, STEP):
        visited = first + tl.arange(0, STEP)  # [STEP]
        rows = tl.cast(visited, tl.int64) * every
        wanted = are_valid(valid, b, rows, (visited < end) & (rows < length))
        p_x = p_columns + rows[:, None] * x.stride_n  # [STEP, DPAD]
        total += tl.load(p_x, mask=wanted[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        number += wanted.to(tl.float32)
    place = head * chunks + chunk
    tl.store(out + place * DPAD + offs_d, tl.sum(total, 0))
    tl.store(count + place, tl.sum(number, 0))


def column_sums(x: Tensor, dim: int, valid: Tensor | None, every: int) -> tuple[Tensor, Tensor]:
    """Sums over every ``every``-th valid token, float32 ``[B * H, 1, dim]``, and their number, ``[B * H, 1]``."""
    batch, heads, length, d = x.shape
    tokens = cdiv(length, every)
    span = max(_SPAN, cdiv(cdiv(tokens, _CHUNKS), _STEP) * _STEP)
    chunks = cdiv(tokens, span)
    # Partial sums and no atomics, so that they are joined in a fixed order.
    sums = torch.empty(batch * heads, chunks, dim, dtype=torch.float32, device=x.device)
    counts = torch.empty(batch * heads, chunks, dtype=torch.float32, device=x.device)
    launch(
        _column_kernel, (chunks, batch * heads),
        Rows.of(x), Valid.of(valid), sums, counts, heads, length, tokens, every, span, chunks,
        D=d, DPAD=dim, STEP=_STEP, num_warps=4 if dim <= 128 else 8,
    )  # fmt: skip
    return (sums, counts) if chunks == 1 else (sums.sum(1, keepdim=True), counts.sum(1, keepdim=True))
