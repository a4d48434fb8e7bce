"""Casts and products that come out alike on a GPU and under Triton's interpreter, which truncates and lacks 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to dtype; for fp8, |x| must be at most 448."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (x + 24576.0) - 24576.0  # steps of 2^-9 below 2^-6
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(dtype)


@triton.jit
def nearest_int8(x):
    """float32 within +-127 to the nearest int8: adding 1.5 * 2^23 leaves it in the low bits, on every device alike."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def dot(a, b, acc):
    """a @ b + acc in float32; the interpreter's matrix product cannot take 16-bit operands."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


INTERPRETED = tl.constexpr(not isinstance(narrow, triton.JITFunction))
