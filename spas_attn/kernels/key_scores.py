"""Scores of pooled queries for key blocks, judged by every key: one sweep over K, as ExactKeys takes them.

The sweep leaves the log-sum-exp of every row and key block and carries nothing from one key block to the next, so that
the keys of a head are split over as many programs as the GPU wants. The kernel that keeps blocks (``select.py``)
normalises the rows of a query block when it reads them. The rows of all query heads of a KV head share a tile of K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .arithmetic import INTERPRETED, dot, narrow
from .config import shared_memory_limit
from .launch import descriptor
from .operands import Rows, Valid, are_valid
from .prepare import LOG2E, padded_dim
from .recorded import launch

_SCRATCH = 1 << 24  # scores, float32, that are held at a time whatever the length
_ROWS = 64  # of a tile
_PROGRAMS = 768  # among which the keys of a head are split, if there are not more rows: three waves on an H100
_STRETCH = (512, 2048)  # keys that a program goes over: at least, and no more before there are eight times as many


class RowSums(NamedTuple):
    """What the sweep leaves of some query blocks: float32 ``[B, Hq, rows, nk]``, base 2.

    Only the blocks between the first and the last key that a row may see are written, -inf where it sees none of them.

    Attributes:
        data: memory of these and more.
        first, blocks: the query blocks that it holds.
    """

    data: Tensor
    first: int
    blocks: int


@triton.jit
def _row_range(rows, inside, q_len, k_len, window, documents, POOL: tl.constexpr, CAUSAL: tl.constexpr):
    """First and last key that rows of POOL queries see, -1 for the last of those that are not ``inside``."""
    low, high = rows * 0, rows * 0 + k_len - 1
    if CAUSAL:
        start = rows * POOL + k_len - q_len
        high = tl.minimum(start + POOL, k_len) - 1
        if window is not None:
            low = tl.maximum(start - window + 1, 0)
    if documents is not None:
        low = tl.maximum(low, tl.load(documents + rows * POOL // 128, mask=inside, other=0))
    return low, tl.where(inside, high, -1)


@triton.jit
def probability(
    sums, head, i, block, q_len, k_len, window, documents, PEAK: tl.constexpr,
    PER_Q: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Softmax over the key blocks ``block``, the mean over the PER_Q rows of query block ``i``, float32 [1, NK].

    With PEAK the largest of the rows instead.
    """
    POOL: tl.constexpr = BLOCK_Q // PER_Q
    nk = tl.cdiv(k_len, BLOCK_K)
    p_row = sums.data + (head * sums.blocks + i - sums.first) * PER_Q * nk + block
    found, counted = tl.zeros([1, NK], tl.float32), tl.zeros([1, 1], tl.float32)
    for x in tl.range(0, PER_Q, loop_unroll_factor=min(PER_Q, 4)):
        row = i * PER_Q + x
        low, high = _row_range(row, row * POOL < q_len, q_len, k_len, window, documents, POOL, CAUSAL)
        seen = (block * BLOCK_K <= high) & (block * BLOCK_K + BLOCK_K > low)
        log_mass = tl.load(p_row + tl.cast(x, tl.int64) * nk, mask=seen, other=float("-inf"))
        peak = tl.max(log_mass, 1, keep_dims=True)
        p = tl.exp2(log_mass - tl.where(peak == float("-inf"), 0.0, peak))
        total = tl.sum(p, 1, keep_dims=True)
        p *= 1.0 / tl.where(total > 0, total, 1.0)
        if PEAK:
            found = tl.maximum(found, p)
        else:
            counted += (total > 0).to(tl.float32)
            found += p
    if not PEAK:
        found *= 1.0 / tl.maximum(counted, 1.0)
    return found


@triton.jit
def _vectors(
    p_rows, inside, stride_d, dims, dtype: tl.constexpr, D_ROWS: tl.constexpr, DPAD: tl.constexpr, PAIR: tl.constexpr
):
    """The dimensions ``dims`` of rows, [M, len(dims)] in ``dtype``; see ``key_scores_kernel``."""
    pointers = p_rows[:, None] + dims[None, :] * stride_d
    take = inside[:, None] & (dims < D_ROWS)[None, :]
    b_q = tl.load(pointers, mask=take, other=0.0)
    if PAIR:
        b_q = b_q.to(tl.float32) + tl.load(pointers + DPAD, mask=take, other=0.0).to(tl.float32)
        b_q = narrow(b_q, dtype)
    return b_q


@triton.jit
def _fp32_scores(
    p_rows, inside, stride_d, k, p_k, cols, k_len,
    D: tl.constexpr, DPAD: tl.constexpr, D_ROWS: tl.constexpr, PAIR: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Products [M, N] of rows and the keys ``cols``, a few dimensions at a time: no matrix unit computes fp32."""
    scores = tl.zeros([M, N], tl.float32)
    for step in range(0, DPAD, 32):
        dims = step + tl.arange(0, 32)
        p_tile = p_k + tl.cast(cols, tl.int64)[None, :] * k.stride_n + dims[:, None] * k.stride_d  # [32, N]
        b_k = tl.load(p_tile, mask=(cols < k_len)[None, :] & (dims < D)[:, None], other=0.0)
        scores = dot(_vectors(p_rows, inside, stride_d, dims, tl.float32, D_ROWS, DPAD, PAIR), b_k, scores)
    return scores


@triton.jit
def _half_scores(
    b_q, k, k_desc, p_k, b, kh, start, cols, k_len,
    D: tl.constexpr, DPAD: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Products [M, N] of rows and the keys ``cols``, those from ``start`` on."""
    offs_d = tl.arange(0, DPAD)
    if k_desc is not None:  # the copy engine fills what lies outside with zeros by itself
        b_k = tl.trans(k_desc.load([b.to(tl.int32), kh.to(tl.int32), start, 0]).reshape(N, DPAD))  # [DPAD, N]
    else:
        p_tile = p_k + tl.cast(start, tl.int64) * k.stride_n
        p_tile += tl.arange(0, N)[None, :] * k.stride_n + offs_d[:, None] * k.stride_d
        if MASKED:
            b_k = tl.load(p_tile, mask=(cols < k_len)[None, :] & (offs_d < D)[:, None], other=0.0)
        elif D < DPAD:
            b_k = tl.load(p_tile, mask=(offs_d < D)[:, None], other=0.0)
        else:
            b_k = tl.load(p_tile)
    return dot(b_q, b_k, None)


@triton.jit
def _log2(x):
    """log2 to 2^-22, -inf of 0: one instruction, where that of the libraries takes twenty."""
    if INTERPRETED:
        y = tl.where(x > 0, tl.log2(tl.where(x > 0, x, 1.0)), float("-inf"))
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def _block_sums(scores, anchor, scale, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """log2 of the exponentials summed over each key block, [M, N / BLOCK_K], from the products of M rows and N keys.

    The largest score of a block need not be known: beside ``anchor``, [M], float32 holds 2^-126 to 2^127. What lies
    below is nothing beside the row's largest; where something lies above, the result is infinite.
    """
    scores = tl.reshape(scores * scale - anchor[:, None], [M, N // BLOCK_K, BLOCK_K])
    return anchor[:, None] + _log2(tl.sum(tl.exp2(scores), 2))


@triton.jit
def _masked_block_sums(
    scores, valid, b, cols, low, high, k_len, scale, lower,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``_block_sums`` whatever the scores; row r sees the keys ``low[r]``, without ``lower`` 0, to ``high[r]``."""
    seen = cols[None, :] <= high[:, None]
    if lower is not None:
        seen &= cols[None, :] >= low[:, None]
    if valid is not None:
        seen &= are_valid(valid, b, cols, cols < k_len)[None, :]
    scores = tl.reshape(tl.where(seen, scores, float("-inf")), [M, N // BLOCK_K, BLOCK_K])
    peak = tl.max(scores, 2) * scale
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    return anchor + _log2(tl.sum(tl.exp2(scores * scale - anchor[:, :, None]), 2))


@triton.jit
def key_scores_kernel(
    vectors, k, k_desc, valid, filled, documents, sums, k_heads, q_len, k_len, window, scale, tiles, splits, stretch,
    D: tl.constexpr, DPAD: tl.constexpr, D_ROWS: tl.constexpr, GROUP: tl.constexpr, POOL: tl.constexpr,
    STEP: tl.constexpr, PAIR: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """M rows of one KV head against ``stretch`` key blocks; one function, because it is one tile that it holds.

    Row x of a KV head is row ``x // GROUP`` of query head ``x % GROUP`` of its group: heads side by side, so that
    causality is as tight as with one head, and groups of any size fill the tile.

    Args:
        vectors: Rows [B, Hq, n, D_ROWS], what speaks for POOL queries each: of every STEP the last. With PAIR a row
            goes on with DPAD numbers more, which its rounding to bf16 has left.
        k: Rows [B, Hkv, Lk, D]; k_desc: its descriptor, or None.
        valid: Valid, key padding, or None; filled: uint8 [B, rows], 0 for rows without a query; or None.
        documents: int32, first row of the packed sequence of every 128 rows; or None.
        sums: RowSums, to be written.
        scale: factor on q·k, log2(e) included.
        tiles, splits: programs along the rows and along the keys of a KV head.
        M, N: rows and keys of a tile, whole key blocks.
    """
    PER_Q: tl.constexpr = BLOCK_Q // POOL
    WIDE: tl.constexpr = N // BLOCK_K
    pid = tl.program_id(0)
    tile, split = pid % tiles, pid // tiles % splits  # programs that share keys run side by side
    kv = tl.cast(pid // (tiles * splits), tl.int64)
    b, kh = kv // k_heads, kv % k_heads
    nk = tl.cdiv(k_len, BLOCK_K)
    flat = tile * M + tl.arange(0, M)
    place, h = flat // GROUP, kh * GROUP + flat % GROUP  # [M]; place: among the rows of this launch
    row = sums.first * PER_Q + place
    inside = (place < sums.blocks * PER_Q) & (row * POOL < q_len)
    low, high = _row_range(row, inside, q_len, k_len, window, documents, POOL, CAUSAL)
    lower = window if documents is None else documents
    begin = 0
    if lower is not None:
        begin = tl.min(tl.where(inside, low, k_len), 0) // BLOCK_K
    first = begin + split * stretch
    last = tl.minimum(first + stretch, (tl.max(high, 0) + BLOCK_K) // BLOCK_K)
    if first < last:
        p_rows = tl.minimum(row * STEP + STEP - 1, q_len - 1).to(tl.int64) * vectors.stride_n
        p_rows += vectors.data + b * vectors.stride_b + h * vectors.stride_h  # [M]
        dtype: tl.constexpr = k.data.dtype.element_ty
        FP32: tl.constexpr = dtype == tl.float32
        b_q = None
        if not FP32:
            b_q = _vectors(p_rows, inside, vectors.stride_d, tl.arange(0, DPAD), dtype, D_ROWS, DPAD, PAIR)
        shown = inside
        if filled is not None:
            shown &= tl.load(filled + b * tl.cdiv(q_len, POOL) + row, mask=inside, other=0) != 0
        p_k = k.data + b * k.stride_b + kh * k.stride_h
        p_sums = sums.data + ((b * k_heads * GROUP + h) * sums.blocks * PER_Q + place) * nk  # [M]
        # Blocks that all rows see whole need no mask; where padding or a lower bound may hide any key there are none.
        PLAIN: tl.constexpr = valid is None and lower is None
        full = first
        if PLAIN:
            full = tl.minimum(last, (tl.min(tl.where(inside, high, k_len - 1), 0) + 1) // BLOCK_K)
            full = first + tl.maximum(full - first, 0) // WIDE * WIDE
        anchor, largest = tl.zeros([M], tl.float32), tl.zeros([M, WIDE], tl.float32)
        for MASKED in tl.static_range(0 if PLAIN else 1, 2):
            begin, end = full if MASKED else first, last if MASKED else full
            for block in tl.range(begin, end, WIDE):
                cols = block * BLOCK_K + tl.arange(0, N)
                if FP32:
                    scores = _fp32_scores(
                        p_rows, inside, vectors.stride_d, k, p_k, cols, k_len, D, DPAD, D_ROWS, PAIR, M, N
                    )
                else:
                    scores = _half_scores(b_q, k, k_desc, p_k, b, kh, block * BLOCK_K, cols, k_len, D, DPAD, N, MASKED)
                if MASKED:
                    b_sums = _masked_block_sums(scores, valid, b, cols, low, high, k_len, scale, lower, M, N, BLOCK_K)
                    b_sums = tl.where(shown[:, None], b_sums, float("-inf"))
                else:
                    if block == first:
                        anchor = tl.max(scores, 1) * scale
                    b_sums = _block_sums(scores, anchor, scale, M, N, BLOCK_K)
                    largest = tl.maximum(largest, b_sums)
                which = block + tl.arange(0, WIDE)
                tl.store(p_sums[:, None] + which[None, :], b_sums, mask=inside[:, None] & (which < nk)[None, :])
            if not MASKED:  # scores that differ by more than float32 can hold: all over again, block by block
                full = tl.where(tl.max(tl.max(largest, 1), 0) == float("inf"), first, full)


def row_sums(lists: Tensor, per_q: int, group: int) -> Iterator[RowSums]:
    """Memory for the scores of some query blocks at a time, the same memory again and again.

    Args:
        lists: int32 ``[B, Hq, nq, nk]``, the lists of kept blocks; the scores never take more memory, beyond 64 MiB.
        per_q: rows of a query block.
        group: query heads per KV head.
    """
    batch, heads, nq, nk = lists.shape
    unit = max(1, _ROWS // (per_q * group))  # query blocks that fill a tile
    parts = cdiv(lists.numel() * per_q, max(lists.numel(), _SCRATCH))
    blocks = nq if parts == 1 else max(unit, nq // parts // unit * unit)
    data = torch.empty(batch * heads * blocks * per_q * nk, dtype=torch.float32, device=lists.device)
    for first in range(0, nq, blocks):
        yield RowSums(data, first, min(blocks, nq - first))


def key_scores(
    vectors: Tensor,
    k: Tensor,
    sums: RowSums,
    q_len: int,
    *,
    step: int,
    pool: int,
    block_q: int,
    block_k: int,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    valid: Tensor | None = None,
    filled: Tensor | None = None,
    documents: Tensor | None = None,
    tiles: tuple[int, int, int, int] | None = None,
) -> None:
    """Write the log-sum-exps of the query blocks that ``sums`` is for.

    Args:
        vectors: what speaks for the queries: means, bf16 ``[B, Hq, n, 1 or 2, dim]`` from ``prepare``, with ``step`` 1;
            or real queries in K's dtype, of every ``step`` rows of ``[B, Hq, L, D]`` the last.
        k: ``[B, Hkv, Lk, D]``, any strides.
        q_len: Lq.
        pool: queries that a row speaks for.
        valid: uint8 ``[B, Lk]``, key padding; filled: uint8 ``[B, n]``, 0 for rows without a query; None without.
        documents: ``Call.document_start``.
        tiles: rows, keys, warps and stages of a tile; chosen from a table by default.
        others: as in ``Selector.select``.
    """
    (batch, k_heads, k_len, d), heads = k.shape, vectors.shape[1]
    dim, means, group = padded_dim(d), vectors.dim() == 5, heads // k_heads
    m, n, warps, stages = tiles or _tiles(k, dim, block_k)
    n = max(n, block_k)
    window = window if is_causal else None
    programs, blocks = cdiv(sums.blocks * (block_q // pool) * group, m), cdiv(k_len, block_k)
    if is_causal:
        last = min((sums.first + sums.blocks) * block_q, q_len) + k_len - q_len
        blocks = cdiv(last, block_k)
        if window is not None and documents is None:
            blocks = min(blocks, cdiv(window + cdiv(m, group) * pool, block_k) + 1)
    stretch = _stretch(blocks * programs * batch * k_heads, n // block_k, n)
    splits = cdiv(blocks, stretch)
    launch(
        key_scores_kernel, (programs * splits * batch * k_heads,),
        Rows.of(vectors[:, :, :, 0] if means else vectors), Rows.of(k), descriptor(k, (n, dim)), Valid.of(valid),
        filled, documents, sums, k_heads, q_len, k_len, window, scale * LOG2E, programs, splits, stretch,
        D=d, DPAD=dim, D_ROWS=dim if means else d, GROUP=group, POOL=pool, STEP=step,
        PAIR=means and vectors.shape[3] == 2, M=m, N=n, BLOCK_Q=block_q, BLOCK_K=block_k, CAUSAL=is_causal,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _stretch(blocks: int, wide: int, n: int) -> int:
    """Key blocks that a program goes over, whole tiles of ``wide`` blocks and ``n`` keys.

    Args:
        blocks: key blocks that all programs go over.
    """
    least, most = (max(1, keys // n) for keys in _STRETCH)
    tiles = blocks // (_PROGRAMS * wide)
    return max(least, min(tiles, most), tiles // 8) * wide


def _tiles(k: Tensor, dim: int, block_k: int) -> tuple[int, int, int, int]:
    """Rows, keys, warps and stages; of 64 rows and 4 warps several programs share a multiprocessor."""
    if k.dtype == torch.float32:
        return 32, block_k, 8, 1
    limit = shared_memory_limit(k.device) - 2048
    for n, stages in ((128, 3), (128, 2), (64, 3), (64, 2)):
        if n >= block_k and 2 * dim * (_ROWS + n * stages) <= limit and dim <= 128:
            return _ROWS, n, 4, stages
    return _ROWS, block_k, 8, 1
