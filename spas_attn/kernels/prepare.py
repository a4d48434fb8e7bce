"""Everything that is made from Q, K and V before attention, in one launch that reads each of them once.

Q and K become the means of sub-blocks that selection scores and the self-similarity of blocks (SpargeAttn, arXiv
2502.18137), K becomes int8 with one scale per block (SageAttention, arXiv 2410.02367), V becomes fp8 with one scale per
block, transposed, as the Hopper matrix unit takes it. The programs of the launch share the three tensors among them; no
program waits for another: what K is smoothed by, each works out for itself from a few keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .arithmetic import narrow, nearest_int8
from .columns import CHUNKS, column_sums
from .operands import Keys, Rows, Side, Valid, Values, are_valid
from .recorded import launch
from .similarity import unit_rows

LOG2E = 1.4426950408889634
ROWS = 128  # tokens of a program; fp8 V is padded to whole multiples
SAMPLES = 32  # keys, at most, whose mean smooths K where nothing needs the exact mean
V_FLOOR = tl.constexpr(2.0**-60)  # a block of zeros has a scale, too: large enough to divide by in float32


class Prepared(NamedTuple):
    """What ``prepare`` made: of Q and of K for selection, of K and of V in 8 bits; None for what was not asked for."""

    q: Side = Side()
    k: Side = Side()
    keys: Keys | None = None
    values: Values | None = None


@triton.jit
def _sum_rows(b_x, SIZE: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, DPAD: tl.constexpr):
    """Sums over stretches of SIZE tokens, [ROWS // SIZE, DPAD], of rows in the order of ``_side``."""
    chains = tl.sum(tl.reshape(b_x, [CHAIN, ROWS // CHAIN, DPAD]), 0)
    return tl.sum(tl.reshape(chains, [ROWS // SIZE, SIZE // CHAIN, DPAD]), 1)


@triton.jit
def _members(taken, first, length, SIZE: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, PADDING: tl.constexpr):
    """How many tokens of every stretch of SIZE take part, float32 [ROWS // SIZE]."""
    if PADDING:
        chains = tl.sum(tl.reshape(taken.to(tl.float32), [CHAIN, ROWS // CHAIN]), 0)
        members = tl.sum(tl.reshape(chains, [ROWS // SIZE, SIZE // CHAIN]), 1)
    else:
        left = length - first - tl.arange(0, ROWS // SIZE) * SIZE
        members = tl.minimum(tl.maximum(left, 0), SIZE).to(tl.float32)
    return members


@triton.jit
def _rows(x, valid, b, h, first, offs, length, D: tl.constexpr, DPAD: tl.constexpr):
    """Tokens ``first + offs`` of a head, float32 [offs, DPAD], zero where they take no part, and whether they do."""
    offs_d = tl.arange(0, DPAD)
    taken = are_valid(valid, b, first + offs, first + offs < length)
    p_x = x.data + b * x.stride_b + h * x.stride_h + tl.cast(first, tl.int64) * x.stride_n
    p_x += offs[:, None] * x.stride_n + offs_d[None, :] * x.stride_d
    b_x = tl.load(p_x, mask=taken[:, None] & (offs_d < D)[None, :], other=0.0)
    return b_x.to(tl.float32), taken


@triton.jit
def _centre(
    k, valid, sums, b, h, head, length, every,
    D: tl.constexpr, DPAD: tl.constexpr, SAMPLES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """What K of a head is smoothed by, float32 [DPAD]: alike in all programs, which add in the same order.

    Softmax does not change when any vector is subtracted from all keys of a head, so the mean of a few does.
    """
    if sums is not None:
        chunk = tl.arange(0, CHUNKS)
        p_sums = sums.total + (head * sums.chunks + chunk)[:, None] * DPAD + tl.arange(0, DPAD)[None, :]
        total = tl.sum(tl.load(p_sums, mask=(chunk < sums.chunks)[:, None], other=0.0), 0)
        number = tl.sum(tl.load(sums.number + head * sums.chunks + chunk, mask=chunk < sums.chunks, other=0.0), 0)
    else:
        # From the middle of the first stretch on: the first key is like no other in many models.
        offs = tl.cast(tl.arange(0, SAMPLES), tl.int64) * every
        b_k, taken = _rows(k, valid, b, h, every // 2, offs, length, D, DPAD)
        total, number = tl.sum(b_k, 0), tl.sum(taken.to(tl.float32), 0)
    return total / tl.maximum(number, 1.0)


@triton.jit
def _means(
    b_x, taken, centre, out, b, h, head, part, length,
    DPAD: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
    PADDING: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Means of the sub-blocks of a tile, less ``centre`` where it is not None, and which of them are filled."""
    n: tl.constexpr = ROWS // POOL
    first, offs_d = part * ROWS, tl.arange(0, DPAD)
    which, total = part * n + tl.arange(0, n), tl.cdiv(length, POOL)  # [n]
    members = _members(taken, first, length, POOL, ROWS, CHAIN, PADDING)
    mean = _sum_rows(b_x, POOL, ROWS, CHAIN, DPAD) * (1.0 / tl.maximum(members, 1.0))[:, None]  # [n, DPAD]
    if centre is not None:
        mean = tl.where((members > 0)[:, None], mean - centre[None, :], 0.0)
    high = narrow(mean, tl.bfloat16)
    p_means = out.means + (head * total + which)[:, None] * ((2 if PAIRS else 1) * DPAD) + offs_d[None, :]
    tl.store(p_means, high, mask=(which < total)[:, None])
    if PAIRS:  # 16 bits of the mean, enough for scores that agree with float32's to its rounding
        low = narrow(mean - high.to(tl.float32), tl.bfloat16)
        tl.store(p_means + DPAD, low, mask=(which < total)[:, None])
    if PADDING:
        if h == 0:
            block, blocks = part * (ROWS // BLOCK) + tl.arange(0, ROWS // BLOCK), tl.cdiv(length, BLOCK)
            tl.store(out.filled + b * total + which, (members > 0).to(tl.uint8), mask=which < total)
            some = _members(taken, first, length, BLOCK, ROWS, CHAIN, PADDING) > 0
            tl.store(out.block_filled + b * blocks + block, some.to(tl.uint8), mask=block < blocks)


@triton.jit
def _side(
    x, valid, centre, out, keys, b, h, head, part, length,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, POOL: tl.constexpr,
    BLOCK: tl.constexpr, SMOOTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A tile of Q or of K: for selection, and to int8 where there is ``keys.int8``.

    Row r of a tile here is token ``r % (ROWS / CHAIN) * CHAIN + r // (ROWS / CHAIN)``, so that CHAIN tokens in
    succession lie in one thread, which adds them without asking another.
    """
    PADDING: tl.constexpr = valid is not None
    PARTS: tl.constexpr = ROWS // BLOCK
    first, offs_r = part * ROWS, tl.arange(0, ROWS)
    order = offs_r % (ROWS // CHAIN) * CHAIN + offs_r // (ROWS // CHAIN)  # [ROWS]
    b_x, taken = _rows(x, valid, b, h, first, order, length, D, DPAD)
    smooth = b_x
    if centre is not None:
        take = taken[:, None] & (tl.arange(0, DPAD) < D)[None, :]  # [ROWS, DPAD]
        smooth = tl.where(take, b_x - centre[None, :], 0.0)
    block, blocks = part * PARTS + tl.arange(0, PARTS), tl.cdiv(length, BLOCK)
    if out.means is not None:
        _means(
            b_x, taken, centre if SMOOTH else None, out, b, h, head, part, length,
            DPAD, ROWS, CHAIN, POOL, BLOCK, PADDING, PAIRS,
        )  # fmt: skip
    if out.similarity is not None:
        unit = unit_rows(smooth if SMOOTH else b_x)
        members = _members(taken, first, length, BLOCK, ROWS, CHAIN, PADDING)
        mean = _sum_rows(unit, BLOCK, ROWS, CHAIN, DPAD) * (1.0 / tl.maximum(members, 1.0))[:, None]
        tl.store(out.similarity + head * blocks + block, tl.sum(mean * mean, 1), mask=block < blocks)
    if keys is not None:
        largest = tl.max(tl.reshape(tl.abs(smooth), [CHAIN, ROWS // CHAIN, DPAD]), 0)
        largest = tl.max(tl.max(tl.reshape(largest, [PARTS, BLOCK // CHAIN, DPAD]), 1), 1)
        step = tl.maximum(largest, 1e-12) / 127.0  # [PARTS]
        tl.store(keys.scale + head * blocks + block, step, mask=block < blocks)
        p_int8 = keys.int8 + (head * length + first) * DPAD
        _store_int8(p_int8, x, valid, centre, 1.0 / step, b, h, first, length, D, DPAD, ROWS, BLOCK)


@triton.jit
def _store_int8(
    p_int8, x, valid, centre, factors, b, h, first, length,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads the rows again, from the cache: held in registers they would leave room for one program at a time."""
    STEP: tl.constexpr = min(BLOCK, 32)
    offs_d = tl.arange(0, DPAD)
    for start in tl.static_range(0, ROWS, STEP):
        offs_r = start + tl.arange(0, STEP)  # [STEP]
        b_x, taken = _rows(x, valid, b, h, first, offs_r, length, D, DPAD)
        b_x = tl.where(taken[:, None] & (offs_d < D)[None, :], b_x - centre[None, :], 0.0)  # [STEP, DPAD]
        factor = tl.sum(tl.where(tl.arange(0, ROWS // BLOCK) == start // BLOCK, factors, 0.0), 0)
        p_to = p_int8 + offs_r[:, None] * DPAD + offs_d[None, :]
        tl.store(p_to, nearest_int8(b_x * factor), mask=(first + offs_r < length)[:, None])


@triton.jit
def _values(
    v, valid, out, b, h, head, part, length,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of V to fp8; like K's, its rows are read again from the cache."""
    PARTS: tl.constexpr = ROWS // BLOCK
    STEP: tl.constexpr = min(BLOCK, 64)
    first, offs_r = part * ROWS, tl.arange(0, ROWS)
    order = offs_r % (ROWS // CHAIN) * CHAIN + offs_r // (ROWS // CHAIN)  # as in ``_side``
    b_v, _ = _rows(v, valid, b, h, first, order, length, D, DPAD)
    largest = tl.max(tl.reshape(tl.abs(b_v), [CHAIN, ROWS // CHAIN, DPAD]), 0)
    largest = tl.max(tl.max(tl.reshape(largest, [PARTS, BLOCK // CHAIN, DPAD]), 1), 1)
    # Rounded up to a power of two, of which attention reads off logarithm and reciprocal; fp8 loses nothing by that.
    bits = (tl.maximum(largest, V_FLOOR) / 448.0).to(tl.int32, bitcast=True)
    step = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)  # [PARTS]
    block, blocks = part * PARTS + tl.arange(0, PARTS), tl.cdiv(length, BLOCK)
    tl.store(out.scale + head * blocks + block, step, mask=block < blocks)
    offs_d, offs_n = tl.arange(0, DPAD), tl.arange(0, STEP)
    p_out = out.data + (head * DPAD + offs_d)[:, None] * (tl.cdiv(length, ROWS) * ROWS) + first + offs_n[None, :]
    # Position [h:1][g:2][l:1][e:1] of a group of 32 takes key [h:1][l:1][g:2][e:1].
    keys = (offs_n & ~15) | ((offs_n & 2) << 2) | ((offs_n & 12) >> 1) | (offs_n & 1)  # [STEP]
    for start in tl.static_range(0, ROWS, STEP):
        b_v, _ = _rows(v, valid, b, h, first, start + keys, length, D, DPAD)  # [STEP, DPAD]
        factor = tl.sum(tl.where(tl.arange(0, PARTS) == start // BLOCK, 1.0 / step, 0.0), 0)
        tl.store(p_out + start, tl.trans(narrow(b_v * factor, out.data.dtype.element_ty)))


@triton.jit
def prepare_kernel(
    q, k, v, valid_q, valid, sums, q_side, k_side, keys, values, batch, heads, k_heads, q_len, k_len, every,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr, CHUNKS: tl.constexpr,
    QUERIES: tl.constexpr, CHAIN_Q: tl.constexpr, CHAIN_K: tl.constexpr, CHAIN_V: tl.constexpr, POOL_Q: tl.constexpr,
    POOL_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SMOOTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens of one head of K, of V or of Q.

    In turn, so that what K's programs wait for (they add up a sample first) is hidden by the others' loads.

    Args:
        q, k, v: Rows [B, H, L, D] or None; valid_q, valid: Valid, padding of the queries and the keys, or None.
        sums: ColumnSums of K, of at most CHUNKS chunks, whose mean smooths K; None: a mean of SAMPLES keys, every
            ``every``-th.
        q_side, k_side: Side; keys: Keys or None; values: Values, where there is v.
        QUERIES: programs of Q for one of K.
        POOL_Q, POOL_K: tokens of a mean.  BLOCK_Q, BLOCK_K: tokens of a self-similarity, and of a scale.
        SMOOTH: means and similarities of K are of the smoothed keys.  PAIRS: means are pairs of numbers.
    """
    FIRST_V: tl.constexpr = 0 if k is None else 1
    FIRST_Q: tl.constexpr = FIRST_V if v is None else FIRST_V + 1
    turns: tl.constexpr = FIRST_Q if q is None else FIRST_Q + QUERIES
    turn, number = tl.program_id(0) % turns, tl.program_id(0) // turns
    tiles = tl.cdiv(k_len, ROWS)
    part, head = number % tiles, tl.cast(number // tiles, tl.int64)
    b, h = head // k_heads, head % k_heads
    if k is not None:
        if (turn == 0) & (b < batch):
            centre = None
            if SMOOTH or keys is not None:
                centre = _centre(k, valid, sums, b, h, head, k_len, every, D, DPAD, SAMPLES, CHUNKS)
            if keys is not None:
                if part == 0:
                    tl.store(keys.mean + head * DPAD + tl.arange(0, DPAD), centre)
            _side(
                k, valid, centre, k_side, keys, b, h, head, part, k_len,
                D, DPAD, ROWS, CHAIN_K, POOL_K, BLOCK_K, SMOOTH, PAIRS,
            )  # fmt: skip
    if v is not None:
        if (turn == FIRST_V) & (b < batch):
            _values(v, valid, values, b, h, head, part, k_len, D, DPAD, ROWS, CHAIN_V, BLOCK_K)
    if q is not None:
        number = number * QUERIES + turn - FIRST_Q
        tiles = tl.cdiv(q_len, ROWS)
        part, head = number % tiles, tl.cast(number // tiles, tl.int64)
        b, h = head // heads, head % heads
        if (turn >= FIRST_Q) & (b < batch):
            _side(
                q, valid_q, None, q_side, None, b, h, head, part, q_len,
                D, DPAD, ROWS, CHAIN_Q, POOL_Q, BLOCK_Q, False, PAIRS,
            )  # fmt: skip


def padded_dim(dim: int) -> int:
    """Head dim as prepared tensors hold it: a power of two, at least the 32 that 8-bit matrix products take."""
    return max(32, triton.next_power_of_2(dim))


def as_bytes(valid: Tensor | None) -> Tensor | None:
    """A boolean key mask as uint8, without a copy."""
    return valid if valid is None or valid.dtype == torch.uint8 else valid.view(torch.uint8)


def _new_side(
    x: Tensor | None, dim: int, pool: int | None, block: int, similarity: bool, padded: bool, pairs: bool
) -> Side:
    if x is None:
        return Side()
    batch, heads, length, _ = x.shape
    blocks, fine = cdiv(length, block), cdiv(length, pool or block)
    return Side(
        None if pool is None else x.new_empty(batch, heads, fine, 2 if pairs else 1, dim, dtype=torch.bfloat16),
        x.new_empty(batch, heads, blocks, dtype=torch.float32) if similarity else None,
        x.new_empty(batch, fine, dtype=torch.uint8) if pool and padded else None,
        x.new_empty(batch, blocks, dtype=torch.uint8) if pool and padded else None,
    )


def prepare(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    block_q: int = 128,
    block_k: int = 128,
    pool_q: int | None = None,
    pool_k: int | None = None,
    pairs: bool = True,
    similarity: bool = False,
    smooth: bool = False,
    int8: bool = False,
    valid_q: Tensor | None = None,
    valid: Tensor | None = None,
) -> Prepared:
    """One launch (and for similarities of smoothed keys one before it, for their exact mean); inputs are only read.

    Args:
        q: ``[B, Hq, Lq, D]``, any strides; None where nothing is wanted of it.
        k: ``[B, Hkv, Lk, D]``, likewise; v: the same, where it is wanted in fp8.
        block_q, block_k: tokens of a mask block, powers of two of at most 128; block_k keys share a scale.
        pool_q, pool_k: tokens of the means that are wanted, divisors of the blocks; None for no means.
        pairs: means with 16 bits, not 8.
        similarity: also measure the self-similarity of every block of Q and of K.
        smooth: means and similarities of K are of the smoothed keys.
        int8: K in 8 bits, too.
        valid_q, valid: uint8 ``[B, Lq]`` and ``[B, Lk]``; tokens with 0 take no part, in 8 bits they are zero.
    """
    given = next((x for x in (k, v, q) if x is not None), None)
    if given is None:
        return Prepared()
    batch, k_heads, k_len, d = given.shape
    dim = padded_dim(d)
    heads, q_len = (k_heads, 0) if q is None else q.shape[1:3]
    q_side = _new_side(q, dim, pool_q, block_q, similarity, valid_q is not None, pairs)
    k_side = _new_side(k, dim, pool_k, block_k, similarity, valid is not None, pairs)
    keys = values = sums = None
    shape, blocks, tiles = (batch, k_heads), cdiv(k_len, block_k), cdiv(k_len, ROWS)
    if k is not None and int8:
        scale = k.new_empty(*shape, blocks, dtype=torch.float32)
        keys = Keys(k.new_empty(*shape, k_len, dim, dtype=torch.int8), scale, scale.new_empty(*shape, dim))
    if v is not None:
        data = v.new_empty(*shape, dim, tiles * ROWS, dtype=torch.float8_e4m3fn)
        values = Values(data, v.new_empty(*shape, blocks, dtype=torch.float32))
    if k is not None and similarity and smooth:
        sums = column_sums(k, dim, valid)
    warps = min(16, max(4, ROWS * dim // 2048))
    # Rows that a thread holds when the elements of a row are spread over threads by 16 bytes each.
    chain = max(1, ROWS * dim * given.element_size() // (512 * warps))
    q_programs, kv_programs = cdiv(q_len, ROWS) * heads * batch, tiles * k_heads * batch
    kv = (k is not None) + (v is not None)
    queries = cdiv(q_programs, kv_programs) if kv else 1
    turns = kv_programs if kv else q_programs
    # At head dim 128 one program more fits on a multiprocessor so, for a few spilled registers.
    options = {"maxnreg": 64} if dim == 128 and given.is_cuda else {}
    launch(
        prepare_kernel, (turns * (kv + (queries if q is not None else 0)),),
        None if q is None else Rows.of(q), None if k is None else Rows.of(k), None if v is None else Rows.of(v),
        Valid.of(valid_q), Valid.of(valid), sums, q_side, k_side, keys, values, batch, heads, k_heads, q_len, k_len,
        cdiv(k_len, SAMPLES),
        D=d, DPAD=dim, ROWS=ROWS, SAMPLES=SAMPLES, CHUNKS=CHUNKS, QUERIES=queries,
        CHAIN_Q=min(chain, pool_q or block_q), CHAIN_K=min(chain, pool_k or block_k), CHAIN_V=min(chain, block_k),
        POOL_Q=pool_q or 0, POOL_K=pool_k or 0, BLOCK_Q=block_q, BLOCK_K=block_k, SMOOTH=smooth, PAIRS=pairs,
        num_warps=warps, **options,
    )  # fmt: skip
    return Prepared(q_side, k_side, keys, values)
