"""How probable key blocks are for query blocks by strided scores, the antidiagonals of XAttention (arXiv 2503.16428).

The score of ``stride`` queries for ``stride`` keys is one inner product of ``stride * D`` numbers, the queries in
reversed order, so that a tile of scores is a matrix product with a long inner dimension. One sweep over the keys leaves
the log-sum-exp of every row and key block in memory of the program's own, which it reads back, mostly from the second
cache, as soon as the row's sum is known; a second sweep would cost as much as the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .arithmetic import dot
from .config import shared_memory_limit
from .operands import Rows, Valid
from .prepare import LOG2E, padded_dim
from .probabilities import _bounds
from .recorded import launch

_CHUNK = 16  # key blocks that are normalised at a time


@triton.jit
def _piece(
    x, p_x, first, groups, which, step, length, p_valid, stride_valid,
    D: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Token ``which`` of TILE groups from ``first`` on, dimensions from ``step`` on; [TILE, STEP], 0 outside."""
    # Groups past the end are read as the last one; nobody sees what comes out.
    group = tl.minimum(first + tl.arange(0, TILE), groups - 1)
    token = tl.cast(group, tl.int64) * STRIDE + which
    dims = step + tl.arange(0, STEP)
    pointers = p_x + token[:, None] * x.stride_n + dims[None, :] * x.stride_d
    if WHOLE:
        return tl.load(pointers)
    taken = token < length
    if p_valid is not None:
        taken &= tl.load(p_valid + token * stride_valid, mask=taken, other=0) != 0
    return tl.load(pointers, mask=taken[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _strided_scores(
    q, k, p_q, p_k, p_valid, stride_valid, row, start, q_len, k_len,
    D: tl.constexpr, DPAD: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Products [M, N] of the query groups from ``row`` on and the key groups from ``start`` on."""
    groups_q, groups_k = tl.cdiv(q_len, STRIDE), tl.cdiv(k_len, STRIDE)
    PARTS: tl.constexpr = DPAD // STEP
    acc = tl.zeros([M, N], tl.float32)
    for part in range(STRIDE * PARTS):
        r, step = part // PARTS, part % PARTS * STEP
        b_q = _piece(q, p_q, row, groups_q, STRIDE - 1 - r, step, q_len, None, 0, D, STRIDE, M, STEP, WHOLE)
        b_k = _piece(k, p_k, start, groups_k, r, step, k_len, p_valid, stride_valid, D, STRIDE, N, STEP, WHOLE)
        acc = dot(b_q, tl.trans(b_k), acc)
    return acc


@triton.jit
def strided_kernel(
    q, k, valid, filled, probs, scratch, batch, heads, group, q_len, k_len, window, scale, pitch,
    D: tl.constexpr, DPAD: tl.constexpr, STRIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Probabilities of the query blocks of tile after tile of M groups; the programs share the tiles evenly.

    Args:
        q, k: Rows [B, Hq, Lq, D] and [B, Hkv, Lk, D].
        valid: Valid, key padding, or None; filled: uint8 [B, groups of keys], 0 for padding; or None.
        probs: [B, Hq, nq, nk]: to be written, the bits of float32 probabilities.
        scratch: float32 [programs, M, pitch].
        scale: factor on a sum of q·k, log2(e) included.
        M, N: query and key groups of a tile, whole blocks; STEP: dimensions of a step; CHUNK: key blocks.
        WHOLE: groups and head dims are whole and nothing is padding, so that nothing need be masked.
    """
    PER_Q: tl.constexpr = BLOCK_Q // STRIDE
    PER_K: tl.constexpr = BLOCK_K // STRIDE
    groups_q, groups_k = tl.cdiv(q_len, STRIDE), tl.cdiv(k_len, STRIDE)
    nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
    tiles = tl.cdiv(groups_q, M)
    p_scratch = scratch + tl.cast(tl.program_id(0), tl.int64) * M * pitch + tl.arange(0, M)[:, None] * pitch
    p_stored = scratch + tl.cast(tl.program_id(0), tl.int64) * M * pitch
    for task in range(tl.program_id(0), tiles * batch * heads, tl.num_programs(0)):
        tile = task // (batch * heads)
        if CAUSAL:
            tile = tiles - 1 - tile  # the longest first
        head = tl.cast(task % (batch * heads), tl.int64)
        b, h = head // heads, head % heads
        p_q = q.data + b * q.stride_b + h * q.stride_h
        p_k = k.data + b * k.stride_b + h // group * k.stride_h
        p_valid, stride_valid = None, 0
        if valid is not None:
            p_valid, stride_valid = valid.data + b * valid.stride_b, valid.stride_n
        row = tile * M
        low, high, _ = _bounds(
            row + tl.arange(0, M), q_len, k_len, window, None, None, STRIDE, BLOCK_Q, BLOCK_K, CAUSAL
        )
        stop = tl.max(high, 0) + 1
        begin = 0
        if window is not None:
            begin = tl.min(low, 0) // N * N

        peak = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        for start in range(begin, stop, N):
            scores = _strided_scores(
                q, k, p_q, p_k, p_valid, stride_valid, row, start, q_len, k_len,
                D, DPAD, STRIDE, M, N, STEP, WHOLE,
            )  # fmt: skip
            cols = start + tl.arange(0, N)
            seen = cols[None, :] <= high[:, None]
            if window is not None:
                seen &= cols[None, :] >= low[:, None]
            if filled is not None:
                seen &= (tl.load(filled + b * groups_k + cols, mask=cols < groups_k, other=0) != 0)[None, :]
            scores = tl.reshape(tl.where(seen, scores * scale, float("-inf")), [M, N // PER_K, PER_K])
            block_peak = tl.max(scores, 2)  # [M, N // PER_K]
            anchor = tl.where(block_peak == float("-inf"), 0.0, block_peak)
            mass = tl.sum(tl.exp2(scores - anchor[:, :, None]), 2)
            log_mass = tl.where(mass > 0, anchor + tl.log2(mass), float("-inf"))
            tl.store(p_scratch + (start // PER_K + tl.arange(0, N // PER_K))[None, :], log_mass)
            new_peak = tl.maximum(peak, tl.max(log_mass, 1))
            anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(log_mass - anchor[:, None]), 1)
            peak = new_peak
        nonempty = total > 0
        log_sum = tl.where(nonempty, peak + tl.log2(tl.where(nonempty, total, 1.0)), 0.0)  # [M]
        counted = tl.sum(tl.reshape(nonempty.to(tl.int32), [M // PER_Q, PER_Q]), 1)
        weight = 1.0 / tl.maximum(counted, 1).to(tl.float32)  # [M // PER_Q]
        tl.debug_barrier()  # what other threads stored is read now

        block_row = tile * (M // PER_Q) + tl.arange(0, M // PER_Q)
        p_probs = probs + (head * nq + block_row)[:, None] * nk
        # Every visible block of these rows gets a value, also those of which no group is seen.
        last = nk
        if CAUSAL:
            last_row = tl.minimum(tl.minimum((tile + 1) * M, groups_q) * STRIDE, q_len) - 1
            last = tl.minimum(tl.maximum(last_row + k_len - q_len, -1) // BLOCK_K + 1, nk)
        written = begin // PER_K + tl.cdiv(tl.maximum(stop - begin, 0), N) * (N // PER_K)
        for first in range(begin // PER_K, last, CHUNK):
            block = first + tl.arange(0, CHUNK)
            p_mass = p_stored + tl.arange(0, M)[:, None] * pitch + block[None, :]
            log_mass = tl.load(p_mass, mask=(block < written)[None, :], other=float("-inf"))
            p = tl.reshape(tl.exp2(log_mass - log_sum[:, None]), [M // PER_Q, PER_Q, CHUNK])
            p = tl.sum(p, 1) * weight[:, None]  # [M // PER_Q, CHUNK]
            inside = (block_row < nq)[:, None] & (block < last)[None, :]
            tl.store(p_probs + block[None, :], p.to(tl.int32, bitcast=True), mask=inside)
        tl.debug_barrier()  # the next tile writes where this one was read


def _programs(device: torch.device, tasks: int) -> int:
    """How many programs share the tiles: one for each multiprocessor."""
    if device.type != "cuda":
        return min(tasks, 2)
    return min(tasks, torch.cuda.get_device_properties(device).multi_processor_count)


def strided_probabilities(
    q: Tensor,
    k: Tensor,
    probs: Tensor,
    *,
    stride: int,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    valid: Tensor | None = None,
    filled: Tensor | None = None,
    tiles: tuple[int, int, int, int, int] | None = None,
) -> None:
    """Write the bits of the probabilities float32 into ``probs``, int32 ``[B, Hq, nq, nk]``.

    Args:
        q, k: ``[B, Hq, Lq, D]`` and ``[B, Hkv, Lk, D]``, any strides.
        stride: tokens of a group, a divisor of both block sizes.
        valid, filled: uint8 ``[B, Lk]`` and ``[B, groups]``: 0 for tokens and groups of padding; None without.
    """
    batch, heads, q_len, d = q.shape
    k_len, device = k.shape[2], q.device
    dim = padded_dim(d)
    m, n, step, warps, stages = tiles or _tiles(q, k, stride, dim)
    groups_q, nk = cdiv(q_len, stride), cdiv(k_len, block_k)
    pitch = cdiv(nk * (block_k // stride), n) * (n // (block_k // stride))
    programs = _programs(device, cdiv(groups_q, m) * batch * heads)
    scratch = torch.empty(programs, m, pitch, dtype=torch.float32, device=device)
    whole = d == dim and q_len % stride == 0 and k_len % stride == 0 and valid is None
    launch(
        strided_kernel, (programs,),
        Rows.of(q), Rows.of(k), Valid.of(valid), filled, probs, scratch, batch, heads,
        heads // k.shape[1], q_len, k_len, window if is_causal else None, scale * LOG2E / stride, pitch,
        D=d, DPAD=dim, STRIDE=stride, M=m, N=n, STEP=min(step, dim), BLOCK_Q=block_q, BLOCK_K=block_k,
        CAUSAL=is_causal, WHOLE=whole, CHUNK=min(_CHUNK, triton.next_power_of_2(nk)),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _tiles(q: Tensor, k: Tensor, stride: int, dim: int) -> tuple[int, int, int, int, int]:
    """Query groups, key groups, dimensions of a step, warps and stages."""
    least = 128 // stride
    if q.dtype == torch.float32:
        return max(32, least), max(32, least), 32, 8, 2
    step = min(64, dim)
    m = 128 if cdiv(q.shape[2], stride) >= 128 else max(64, least)
    for n, stages in ((256, 3), (128, 3), (128, 2), (64, 2)):
        if (m + n) * step * 2 * stages <= shared_memory_limit(q.device) - 8192 and n >= least:
            return m, n, step, 8, stages
    return max(64, least), max(64, least), min(32, step), 4, 2
