"""Scores of every query for the mean keys of blocks, as FlashPrefill (arXiv 2603.06199) takes them.

Each program holds one query block and goes over the mean keys once; a column needs no other column, so nothing is
carried from one step to the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .arithmetic import dot, narrow
from .operands import Rows
from .prepare import LOG2E
from .recorded import launch


@triton.jit
def row_scores_kernel(
    q, k_means, block_filled, scores, heads, group, q_len, k_len, window, scale,
    D: tl.constexpr, DPAD: tl.constexpr, N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """log2 of the exponentials summed over the rows of one query block, for N key blocks at a time.

    Args:
        q: Rows [B, Hq, Lq, D].
        k_means: bf16 [B, Hkv, nk, 2, DPAD], each a sum of two numbers.
        block_filled: uint8 [B, nk], 0 for blocks of padding; or None.
        scores: [B, Hq, nq, nk]: to be written, the bits of float32; -inf where no row sees the whole block.
        scale: factor on q·k, log2(e) included.
        EXACT: bf16 holds q as it is.
    """
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    pid = tl.program_id(0)
    head = tl.cast(pid % (tl.num_programs(0) // nq), tl.int64)
    i = pid // (tl.num_programs(0) // nq)
    if CAUSAL:
        i = nq - 1 - i  # the longest first
    b, h = head // heads, head % heads
    offs_d = tl.arange(0, DPAD)
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    p_q = q.data + b * q.stride_b + h * q.stride_h
    p_q += tl.cast(rows, tl.int64)[:, None] * q.stride_n + offs_d[None, :] * q.stride_d
    b_q = tl.load(p_q, mask=(rows < q_len)[:, None] & (offs_d < D)[None, :], other=0.0)
    if EXACT:
        q_high = b_q
        q_low = b_q
    else:
        q_high = narrow(b_q.to(tl.float32), tl.bfloat16)
        q_low = narrow(b_q.to(tl.float32) - q_high.to(tl.float32), tl.bfloat16)
    last_key = tl.where(rows < q_len, rows + k_len - q_len, -1)  # [BLOCK_Q], the last key that a row sees
    first_key = last_key * 0
    p_k = k_means + (b * (heads // group) + h // group) * nk * (2 * DPAD)
    p_scores = scores + (head * nq + i) * nk
    begin, stop = 0, nk
    if CAUSAL:
        stop = tl.minimum(tl.maximum(tl.max(last_key, 0), -1) // BLOCK_K + 1, nk)
        if window is not None:
            first_key = last_key - window + 1
            begin = tl.maximum(i * BLOCK_Q + k_len - q_len - window + 1, 0) // BLOCK_K // N * N
    for start in range(begin, stop, N):
        block = start + tl.arange(0, N)
        p_means = p_k + block[None, :] * (2 * DPAD) + offs_d[:, None]  # [DPAD, N]
        k_high = tl.load(p_means, mask=(block < nk)[None, :], other=0.0)
        k_low = tl.load(p_means + DPAD, mask=(block < nk)[None, :], other=0.0)
        products = dot(q_high, k_high, None)
        products = dot(q_high, k_low, products)
        if not EXACT:
            products = dot(q_low, k_high, products)
        seen = (rows < q_len)[:, None] & (block < nk)[None, :]
        if CAUSAL:
            end = tl.minimum((block + 1) * BLOCK_K, k_len) - 1
            seen &= end[None, :] <= last_key[:, None]
            if window is not None:
                seen &= end[None, :] >= first_key[:, None]
        if block_filled is not None:
            seen &= (tl.load(block_filled + b * nk + block, mask=block < nk, other=0) != 0)[None, :]
        products = tl.where(seen, products * scale, float("-inf"))
        peak = tl.max(products, 0)  # [N]
        anchor = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(products - anchor[None, :]), 0)
        score = tl.where(total > 0, anchor + tl.log2(total), float("-inf"))
        tl.store(p_scores + block, score.to(tl.int32, bitcast=True), mask=block < stop)


def row_scores(
    q: Tensor,
    k_means: Tensor,
    scores: Tensor,
    *,
    block_q: int,
    block_k: int,
    k_len: int,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    block_filled: Tensor | None = None,
    columns: int = 32,
    warps: int = 4,
    stages: int = 2,
) -> None:
    """Write the bits of the scores, base 2, into ``scores``, int32 ``[B, Hq, nq, nk]``.

    Args:
        q: ``[B, Hq, Lq, D]``, any strides.
        k_means: bf16 ``[B, Hkv, nk, 2, dim]``, from ``prepare``.
        block_filled: uint8 ``[B, nk]``, 0 for blocks of padding; None without.
    """
    batch, heads, q_len, d = q.shape
    dim = k_means.shape[-1]
    launch(
        row_scores_kernel, (cdiv(q_len, block_q) * batch * heads,),
        Rows.of(q), k_means, block_filled, scores, heads, heads // k_means.shape[1], q_len, k_len,
        window if is_causal else None, scale * LOG2E,
        D=d, DPAD=dim, N=columns, BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=is_causal,
        EXACT=q.dtype == torch.bfloat16, num_warps=warps, num_stages=stages,
    )  # fmt: skip
