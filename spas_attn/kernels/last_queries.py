"""What the last queries of a prompt attend to, by key and by distance (FlexPrefill, MInference), in two sweeps.

The keys are split over programs. The first sweep leaves the log-sum-exp of every row and part of the keys; the second
sums the probabilities over the rows, in columns and along diagonals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .arithmetic import dot
from .operands import Rows, Valid, are_valid
from .prepare import LOG2E, padded_dim
from .recorded import launch

_TILE = 128  # keys of a tile, at least as many as rows
_PARTS = 64  # most parts of the keys


@triton.jit
def _last_rows(q, b, h, last_row, count, D: tl.constexpr, DPAD: tl.constexpr, M: tl.constexpr):
    """The ``count`` rows that end with ``last_row``, [M, DPAD], zeros behind them, and their indices."""
    rows = last_row - count + 1 + tl.arange(0, M)
    offs_d = tl.arange(0, DPAD)
    p_q = q.data + b * q.stride_b + h * q.stride_h
    p_q += tl.cast(rows, tl.int64)[:, None] * q.stride_n + offs_d[None, :] * q.stride_d
    inside = (rows >= 0) & (rows <= last_row)
    return tl.load(p_q, mask=inside[:, None] & (offs_d < D)[None, :], other=0.0), rows


@triton.jit
def _token_scores(
    b_q, rows, k, valid, b, kh, start, q_len, k_len, window, scale,
    D: tl.constexpr, DPAD: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] in base 2 of rows for the keys from ``start`` on; -inf for keys that a row does not see."""
    keys = start + tl.arange(0, N)
    offs_d = tl.arange(0, DPAD)
    taken = are_valid(valid, b, keys, keys < k_len)
    p_k = k.data + b * k.stride_b + kh * k.stride_h
    p_k += tl.cast(keys, tl.int64)[None, :] * k.stride_n + offs_d[:, None] * k.stride_d
    b_k = tl.load(p_k, mask=taken[None, :] & (offs_d < D)[:, None], other=0.0)  # [DPAD, N]
    scores = dot(b_q, b_k, None) * scale
    position = rows[:, None] + k_len - q_len
    seen = taken[None, :] & (rows >= 0)[:, None]
    if CAUSAL:
        seen &= keys[None, :] <= position
        if window is not None:
            seen &= keys[None, :] > position - window
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _last_row_of(last_row, b, q_len):
    row = q_len - 1
    if last_row is not None:
        row = tl.load(last_row + b)
    return row


@triton.jit
def log_sums_kernel(
    q, k, valid, last_row, log_sums, heads, group, q_len, k_len, window, scale, count, span, parts,
    D: tl.constexpr, DPAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """log2 of the exponentials of each of M rows summed over ``span`` keys: float32 [B, Hq, parts, M].

    Args:
        q, k: Rows [B, Hq, Lq, D] and [B, Hkv, Lk, D]; valid: Valid or None.
        last_row: int32 [B], index of the last of the ``count`` queries; None for the last of all.
    """
    part = tl.program_id(0) // (tl.num_programs(0) // parts)
    head = tl.cast(tl.program_id(0) % (tl.num_programs(0) // parts), tl.int64)
    b, h = head // heads, head % heads
    b_q, rows = _last_rows(q, b, h, _last_row_of(last_row, b, q_len), count, D, DPAD, M)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, k_len), N):
        scores = _token_scores(
            b_q, rows, k, valid, b, h // group, start, q_len, k_len, window, scale, D, DPAD, N, CAUSAL
        )
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - anchor) + tl.sum(tl.exp2(scores - anchor[:, None]), 1)
        peak = new_peak
    log_sum = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(log_sums + (head * parts + part) * M + tl.arange(0, M), log_sum)


@triton.jit
def masses_kernel(
    q, k, valid, last_row, weight, log_sums, columns, diagonals, heads, group, q_len, k_len, window, scale, count, span,
    parts,
    D: tl.constexpr, DPAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Probabilities of the rows, weighted, summed in columns and along the diagonals of tiles.

    Args:
        weight: float32 [B, M], of the rows.
        log_sums: from ``log_sums_kernel``.
        columns: float32 [B, Hq, tiles * N], to be written.
        diagonals: float32 [B, Hq, 2, tiles, N], to be written: element t of tile j is the sum over the pairs of row r
            and column c of the tile with c - r == t, and in the second half with c - r == t - N.
    """
    part = tl.program_id(0) // (tl.num_programs(0) // parts)
    head = tl.cast(tl.program_id(0) % (tl.num_programs(0) // parts), tl.int64)
    b, h = head // heads, head % heads
    tiles = tl.cdiv(k_len, N)
    b_q, rows = _last_rows(q, b, h, _last_row_of(last_row, b, q_len), count, D, DPAD, M)
    offs_m, offs_n, offs_p = tl.arange(0, M), tl.arange(0, N), tl.arange(0, PARTS)
    p_sums = log_sums + (head * parts + offs_p)[None, :] * M + offs_m[:, None]  # [M, PARTS]
    sums = tl.load(p_sums, mask=(offs_p < parts)[None, :], other=float("-inf"))
    peak = tl.max(sums, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(sums - peak[:, None]), 1)
    log_sum = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), 0.0)  # [M]
    b_weight = tl.load(weight + b * M + offs_m)
    shift = offs_m[:, None] + offs_n[None, :]  # [M, N]
    for start in range(part * span, tl.minimum((part + 1) * span, k_len), N):
        scores = _token_scores(
            b_q, rows, k, valid, b, h // group, start, q_len, k_len, window, scale, D, DPAD, N, CAUSAL
        )
        p = tl.exp2(scores - log_sum[:, None]) * b_weight[:, None]
        tl.store(columns + head * tiles * N + start + offs_n, tl.sum(p, 0))
        skewed = tl.gather(p, shift % N, 1)  # row r turned by r places: diagonals stand in columns
        p_diagonals = diagonals + head * 2 * tiles * N + start + offs_n
        tl.store(p_diagonals, tl.sum(tl.where(shift < N, skewed, 0.0), 0))
        tl.store(p_diagonals + tiles * N, tl.sum(tl.where(shift < N, 0.0, skewed), 0))


def last_masses(
    q: Tensor,
    k: Tensor,
    count: int,
    *,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    valid: Tensor | None = None,
    last_row: Tensor | None = None,
    weight: Tensor,
    warps: int | None = None,
    stages: int = 2,
    span: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean attention of ``count`` queries on each key, and at each distance.

    Args:
        q, k: ``[B, Hq, Lq, D]`` and ``[B, Hkv, Lk, D]``, any strides.
        count: rows, at most 128.
        valid: uint8 ``[B, Lk]``, 0 for padding; None without.
        last_row: int32 ``[B]``, index of the last of the queries; None for the last of all.
        weight: float32 ``[B or 1, count]``, factors of the rows.

    Returns:
        float32 ``[B, Hq, Lk]``, and ``[B, Hq, Lk + up to 255]``: element x is the mass at the distance
        ``position of the first row + 128 - x`` back from the query to the key.
    """
    (batch, heads, q_len, d), k_len = q.shape, k.shape[2]
    dim, n, device = padded_dim(d), _TILE, q.device
    m = max(16, triton.next_power_of_2(count))
    tiles = cdiv(k_len, n)
    span = span or n * cdiv(tiles, _PARTS)
    parts = cdiv(k_len, span)
    log_sums = torch.empty(batch, heads, parts, m, dtype=torch.float32, device=device)
    columns = torch.empty(batch, heads, tiles * n, dtype=torch.float32, device=device)
    pieces = torch.empty(batch, heads, 2, tiles, n, dtype=torch.float32, device=device)
    weight = torch.nn.functional.pad(weight, (0, m - count)).expand(batch, -1).contiguous()
    group, window = heads // k.shape[1], window if is_causal else None
    wide = 16 if q.dtype == torch.float32 and dim > 64 else 8
    common = {"D": d, "DPAD": dim, "M": m, "N": n, "CAUSAL": is_causal, "num_warps": warps or wide}
    options = {"num_stages": stages if dim <= 128 and q.element_size() == 2 else 1}
    grid = (parts * batch * heads,)
    launch(
        log_sums_kernel, grid,
        Rows.of(q), Rows.of(k), Valid.of(valid), last_row, log_sums, heads, group, q_len, k_len, window, scale * LOG2E,
        count, span, parts, **common, **options,
    )  # fmt: skip
    launch(
        masses_kernel, grid,
        Rows.of(q), Rows.of(k), Valid.of(valid), last_row, weight, log_sums, columns, pieces, heads, group, q_len,
        k_len, window, scale * LOG2E, count, span, parts, **common, PARTS=triton.next_power_of_2(parts), **options,
    )  # fmt: skip
    # The second half of a tile continues the first half of the tile before it.
    pad = torch.nn.functional.pad
    diagonals = pad(pieces[:, :, 0], (0, 0, 1, 0)) + pad(pieces[:, :, 1], (0, 0, 0, 1))
    return columns[..., :k_len], diagonals.flatten(2)
