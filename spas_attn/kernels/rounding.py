"""Narrowing casts that round to nearest also under Triton's interpreter, which truncates."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to dtype; for fp8, |x| must be at most 448."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    if INTERPRET and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = (x + 24576.0) - 24576.0  # steps of 2^-9 below 2^-6
        x = tl.where(tl.abs(x) < 0.015625, subnormal, normal)
    return x.to(dtype)
