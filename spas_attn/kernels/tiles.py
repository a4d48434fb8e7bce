"""Tiles of K and V as the forward kernel loads them, and the token masks on their scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_k(
    k, k_desc, p_k, sequence, k_head, start, k_len,
    DIM: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Kᵀ of the keys from ``start`` on, [DPAD, BLOCK_N], zeros where there is nothing."""
    if k_desc is not None:  # the copy engine fills what lies outside with zeros by itself
        b_k = tl.trans(k_desc.load([sequence, k_head, start, 0]).reshape(BLOCK_N, DPAD))
    else:
        offs_n, offs_d = tl.arange(0, BLOCK_N)[None, :], tl.arange(0, DPAD)[:, None]
        p_k += tl.cast(start, tl.int64) * k.stride_n  # [DPAD, BLOCK_N]
        if MASKED:
            b_k = tl.load(p_k, mask=(start + offs_n < k_len) & (offs_d < DIM), other=0)
        elif DIM < DPAD:
            b_k = tl.load(p_k, mask=offs_d < DIM, other=0)
        else:
            b_k = tl.load(p_k)
    return b_k


@triton.jit
def load_v(
    v, v_desc, p_v, sequence, k_head, start, k_len,
    DIM: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """V of the keys from ``start`` on, [BLOCK_N, DPAD]; fp8 lies transposed in memory, whole and padded with zeros."""
    if v_desc is not None and FP8:
        b_v = tl.trans(v_desc.load([sequence, k_head, 0, start]).reshape(DPAD, BLOCK_N))
    elif v_desc is not None:
        b_v = v_desc.load([sequence, k_head, start, 0]).reshape(BLOCK_N, DPAD)
    else:
        offs_n, offs_d = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, DPAD)[None, :]
        p_v += tl.cast(start, tl.int64) * v.stride_n  # [BLOCK_N, DPAD]
        if MASKED and not FP8:
            b_v = tl.load(p_v, mask=(start + offs_n < k_len) & (offs_d < DIM), other=0)
        elif DIM < DPAD:
            b_v = tl.load(p_v, mask=offs_d < DIM, other=0)
        else:
            b_v = tl.load(p_v)
    return b_v


@triton.jit
def hide(b_s, cols, last_key, k_len, window, CAUSAL: tl.constexpr):
    """Scores, -inf where a query must not see a key; ``last_key`` [BLOCK_M]: the last one of each row if causal."""
    if CAUSAL:
        seen = cols[None, :] <= last_key[:, None]  # [BLOCK_M, BLOCK_N]
        if window is not None:
            seen &= cols[None, :] > last_key[:, None] - window
    else:
        seen = (cols < k_len)[None, :]
    return tl.where(seen, b_s, float("-inf"))


@triton.jit
def hide_padding(b_s, cols, k_len, p_valid, stride, p_tile_valid):
    """Scores, -inf for padded keys."""
    if tl.load(p_tile_valid) == 0:
        valid = tl.load(p_valid + cols * stride, mask=cols < k_len, other=0) != 0  # [BLOCK_N]
        b_s = tl.where(valid[None, :], b_s, float("-inf"))
    return b_s
