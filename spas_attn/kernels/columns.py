"""Sums of the columns of ``[B, H, L, D]`` tensors, over all tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .operands import Rows, Valid, are_valid
from .recorded import launch

_STEP = 64  # rows taken at a time
_SPAN, CHUNKS = 512, 64  # least rows of a program, most programs of a head


class ColumnSums(NamedTuple):
    """Sums in parts: no atomics, so that whoever adds them gets the same every time.

    Attributes:
        total: float32 ``[B * H, chunks, dim]``; number: float32 ``[B * H, chunks]``, how many rows a sum is of.
        chunks: at most ``CHUNKS``.
    """

    total: Tensor
    number: Tensor
    chunks: int


@triton.jit
def _column_kernel(
    x, valid, out, count, heads, length, span, chunks,
    D: tl.constexpr, DPAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sums of ``span`` rows, and how many take part.

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
    end = tl.minimum((chunk + 1) * span, length)
    for first in range(chunk * span, end, STEP):
        rows = tl.cast(first + tl.arange(0, STEP), tl.int64)  # [STEP]
        wanted = are_valid(valid, b, rows, rows < end)
        p_x = p_columns + rows[:, None] * x.stride_n  # [STEP, DPAD]
        total += tl.load(p_x, mask=wanted[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        number += wanted.to(tl.float32)
    place = head * chunks + chunk
    tl.store(out + place * DPAD + offs_d, tl.sum(total, 0))
    tl.store(count + place, tl.sum(number, 0))


def column_sums(x: Tensor, dim: int, valid: Tensor | None) -> ColumnSums:
    """Sums over the valid tokens of ``[B, H, L, D]``, any strides, D padded to ``dim``."""
    batch, heads, length, d = x.shape
    span = max(_SPAN, cdiv(cdiv(length, CHUNKS), _STEP) * _STEP)
    chunks = cdiv(length, span)
    total = torch.empty(batch * heads, chunks, dim, dtype=torch.float32, device=x.device)
    number = torch.empty(batch * heads, chunks, dtype=torch.float32, device=x.device)
    launch(
        _column_kernel, (chunks, batch * heads),
        Rows.of(x), Valid.of(valid), total, number, heads, length, span, chunks,
        D=d, DPAD=dim, STEP=_STEP, num_warps=4 if dim <= 128 else 8,
    )  # fmt: skip
    return ColumnSums(total, number, chunks)
