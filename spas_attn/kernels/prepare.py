"""What is made from Q, K and V before attention, each tensor read once (K twice for an exact mean).

``prepare`` turns Q or K into the means of sub-blocks that selection scores, the self-similarity of blocks
(SpargeAttn, arXiv 2502.18137) and K into int8 with one scale per tile (SageAttention, arXiv 2410.02367), in one pass.
``prepare_v`` turns V into fp8 with one scale per block, transposed, as the Hopper matrix unit takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .arithmetic import narrow, nearest_int8
from .columns import column_sums
from .operands import Rows, Valid, are_valid
from .recorded import launch
from .similarity import unit_rows

LOG2E = 1.4426950408889634
V_TILE = 128  # fp8 V is padded to whole tiles of so many keys
V_FLOOR = tl.constexpr(2.0**-60)  # a block of zeros has a scale, too: large enough to divide by in float32
SAMPLES = 256  # keys, at most, whose mean smooths K where nothing needs the exact mean: one program's work


@triton.jit
def _sum_rows(b_x, SIZE: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, DPAD: tl.constexpr):
    """Sums over stretches of SIZE tokens, [ROWS // SIZE, DPAD], of rows in the order of ``_prepare_kernel``."""
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
def _prepare_kernel(
    x, valid, sums, means, filled, block_filled, similarity, int8, scale, heads, length,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, POOL: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SMOOTH_POOLED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head; one function, because everything it makes comes from the rows that it holds.

    Row r of a tile here is token ``r % (ROWS / CHAIN) * CHAIN + r // (ROWS / CHAIN)``, so that CHAIN tokens in
    succession lie in one thread, which adds them without asking another.

    Args:
        x: Rows [B, H, L, D]; valid: Valid or None.
        sums: what K is smoothed by, a pair of float32 [B, H, DPAD] and [B, H]; or None.
        means ... scale: the fields of ``Side``; None for what is not wanted.
        POOL, BLOCK, TILE: tokens of a mean, of a self-similarity and of a scale.
        SMOOTH_POOLED: means and similarities are of the smoothed rows.
    """
    PADDING: tl.constexpr = valid is not None
    part = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    first = part * ROWS
    offs_d, offs_r = tl.arange(0, DPAD), tl.arange(0, ROWS)
    order = offs_r % (ROWS // CHAIN) * CHAIN + offs_r // (ROWS // CHAIN)  # [ROWS]
    taken = are_valid(valid, b, first + order, first + order < length)
    take = taken[:, None] & (offs_d < D)[None, :]  # [ROWS, DPAD]
    p_x = x.data + b * x.stride_b + h * x.stride_h + tl.cast(first, tl.int64) * x.stride_n
    p_rows = p_x + order[:, None] * x.stride_n + offs_d[None, :] * x.stride_d
    b_x = tl.load(p_rows, mask=take, other=0.0).to(tl.float32)  # [ROWS, DPAD]
    centre = tl.zeros([DPAD], tl.float32)
    smooth = b_x
    if sums is not None:
        centre = tl.load(sums[0] + head * DPAD + offs_d) / tl.maximum(tl.load(sums[1] + head), 1.0)
        smooth = tl.where(take, b_x - centre[None, :], 0.0)
    block, blocks = part * (ROWS // BLOCK) + tl.arange(0, max(1, ROWS // BLOCK)), tl.cdiv(length, BLOCK)
    if means is not None:
        n: tl.constexpr = ROWS // POOL
        which, total = part * n + tl.arange(0, n), tl.cdiv(length, POOL)  # [n]
        members = _members(taken, first, length, POOL, ROWS, CHAIN, PADDING)
        mean = _sum_rows(b_x, POOL, ROWS, CHAIN, DPAD) * (1.0 / tl.maximum(members, 1.0))[:, None]  # [n, DPAD]
        if SMOOTH_POOLED:
            mean = tl.where((members > 0)[:, None], mean - centre[None, :], 0.0)
        # A bf16 pair holds 16 bits of the mean, enough for scores that agree with float32's to its rounding.
        high = narrow(mean, tl.bfloat16)
        low = narrow(mean - high.to(tl.float32), tl.bfloat16)
        p_means = means + (head * total + which)[:, None] * (2 * DPAD) + offs_d[None, :]
        tl.store(p_means, high, mask=(which < total)[:, None])
        tl.store(p_means + DPAD, low, mask=(which < total)[:, None])
        if PADDING:
            if h == 0:
                tl.store(filled + b * total + which, (members > 0).to(tl.uint8), mask=which < total)
                some = _members(taken, first, length, BLOCK, ROWS, CHAIN, PADDING) > 0
                tl.store(block_filled + b * blocks + block, some.to(tl.uint8), mask=block < blocks)
    if similarity is not None:
        unit = unit_rows(smooth if SMOOTH_POOLED else b_x)
        members = _members(taken, first, length, BLOCK, ROWS, CHAIN, PADDING)
        mean = _sum_rows(unit, BLOCK, ROWS, CHAIN, DPAD) * (1.0 / tl.maximum(members, 1.0))[:, None]
        tl.store(similarity + head * blocks + block, tl.sum(mean * mean, 1), mask=block < blocks)
    if int8 is not None:
        m: tl.constexpr = ROWS // TILE
        largest = tl.max(tl.reshape(tl.abs(smooth), [CHAIN, ROWS // CHAIN, DPAD]), 0)
        largest = tl.max(tl.max(tl.reshape(largest, [m, TILE // CHAIN, DPAD]), 1), 1)
        step = tl.maximum(largest, 1e-12) / 127.0  # [m]
        tile, tiles = part * m + tl.arange(0, m), tl.cdiv(length, TILE)
        tl.store(scale + head * tiles + tile, step, mask=tile < tiles)
        p_int8 = int8 + (head * length + first) * DPAD
        _store_int8(p_int8, x, p_x, valid, b, step, sums, centre, first, length, D, DPAD, ROWS, TILE)


@triton.jit
def _store_int8(
    p_int8, x, p_x, valid, b, step, sums, centre, first, length,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Reads the rows again, from the cache: held in registers they would leave room for one program at a time."""
    STEP: tl.constexpr = min(TILE, 32)
    offs_d = tl.arange(0, DPAD)
    steps = 1.0 / step  # [ROWS // TILE]
    for start in tl.static_range(0, ROWS, STEP):
        offs_r = start + tl.arange(0, STEP)  # [STEP]
        inside = first + offs_r < length
        take = are_valid(valid, b, first + offs_r, inside)[:, None] & (offs_d < D)[None, :]
        b_x = tl.load(p_x + offs_r[:, None] * x.stride_n + offs_d[None, :] * x.stride_d, mask=take, other=0.0)
        b_x = b_x.to(tl.float32)  # [STEP, DPAD]
        if sums is not None:
            b_x = tl.where(take, b_x - centre[None, :], 0.0)
        factor = tl.sum(tl.where(tl.arange(0, ROWS // TILE) == start // TILE, steps, 0.0), 0)
        p_to = p_int8 + offs_r[:, None] * DPAD + offs_d[None, :]
        tl.store(p_to, nearest_int8(b_x * factor), mask=inside[:, None])


@triton.jit
def _prepare_v_kernel(
    v, valid, out, scale, heads, length, padded,
    D: tl.constexpr, DPAD: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KEYS keys of one head to fp8, every BLOCK of them with a scale.

    Args:
        v: Rows [B, H, L, D]; valid: Valid or None.
        out: fp8 [B, H, DPAD, padded]; scale: float32 [B, H, blocks].
    """
    PARTS: tl.constexpr = KEYS // BLOCK
    tile = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    offs_d, offs_n = tl.arange(0, DPAD), tl.arange(0, KEYS)
    # Position [h:1][g:2][l:1][e:1] of a group of 32 takes key [h:1][l:1][g:2][e:1].
    keys = (offs_n & ~15) | ((offs_n & 2) << 2) | ((offs_n & 12) >> 1) | (offs_n & 1)  # [KEYS]
    rows = tile * KEYS + keys
    taken = are_valid(valid, b, rows, rows < length)
    p_v = v.data + b * v.stride_b + h * v.stride_h + tl.cast(tile * KEYS, tl.int64) * v.stride_n
    p_v += keys[:, None] * v.stride_n + offs_d[None, :] * v.stride_d  # [KEYS, DPAD]
    b_v = tl.load(p_v, mask=taken[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.reshape(tl.abs(b_v), [PARTS, BLOCK, DPAD]), 1), 1)
    step = tl.maximum(largest, V_FLOOR) / 448.0  # [PARTS]
    factor = tl.reshape(tl.broadcast_to((1.0 / step)[:, None], [PARTS, BLOCK]), [KEYS])
    b_out = narrow(b_v * factor[:, None], out.dtype.element_ty)
    tl.store(out + (head * DPAD + offs_d)[:, None] * padded + tile * KEYS + offs_n[None, :], tl.trans(b_out))
    block, blocks = tile * PARTS + tl.arange(0, PARTS), tl.cdiv(length, BLOCK)
    tl.store(scale + head * blocks + block, step, mask=block < blocks)


@dataclass(frozen=True)
class Side:
    """What ``prepare`` makes of Q or of K; None for what was not asked for.

    Attributes:
        means: bf16 ``[B, H, n, 2, dim]``: the means of sub-blocks, each as a sum of two bf16 numbers.
        similarity: float32 ``[B, H, blocks]``, mean pairwise cosine of the rows of a block.
        filled, block_filled: uint8 ``[B, n]`` and ``[B, blocks]``: 1 where a (sub-)block has a valid token; None
            without padding.
        int8: ``[B, H, L, dim]``, contiguous; scale: float32 ``[B, H, ceil(L / tile)]``.
    """

    means: Tensor | None = None
    similarity: Tensor | None = None
    filled: Tensor | None = None
    block_filled: Tensor | None = None
    int8: Tensor | None = None
    scale: Tensor | None = None


def padded_dim(dim: int) -> int:
    """Head dim as prepared tensors hold it: a power of two, at least the 32 that 8-bit matrix products take."""
    return max(32, triton.next_power_of_2(dim))


def as_bytes(valid: Tensor | None) -> Tensor | None:
    """A boolean key mask as uint8, without a copy."""
    return valid if valid is None or valid.dtype == torch.uint8 else valid.view(torch.uint8)


def key_sums(k: Tensor, dim: int, valid: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    """What ``prepare`` smooths K with: sums of valid keys float32 ``[B * H, 1, dim]``, and how many, ``[B * H, 1]``.

    Softmax does not change when any vector is subtracted from all keys of a head, so the mean of at most
    ``SAMPLES`` keys at even distances does; ``exact`` takes all keys, for similarities that others compare with.
    """
    return column_sums(k, dim, valid, 1 if exact else max(1, cdiv(k.shape[2], SAMPLES)))


def prepare(
    x: Tensor,
    dim: int,
    *,
    pool: int | None = None,
    block: int = 128,
    similarity: bool = False,
    tile: int | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
    smooth_pooled: bool = False,
    valid: Tensor | None = None,
) -> Side:
    """Means, self-similarity and int8 of Q or K in one pass; ``x`` itself is only read.

    Args:
        x: ``[B, H, L, D]``, any strides.
        dim: padded head dim, a power of two (``padded_dim``).
        pool: length of the sub-blocks whose means are wanted, a divisor of ``block``; None for no means.
        block: mask block in tokens, 64 or 128.
        similarity: also measure the self-similarity of every block.
        tile: tokens that share an int8 scale, a power of two of at most 128; None for no int8.
        sums: from ``key_sums``: what to subtract before quantising, and with ``smooth_pooled`` before everything.
        smooth_pooled: means and similarities are of the smoothed tensor, too.
        valid: uint8 ``[B, L]``; tokens with 0 take no part, their int8 is zero.
    """
    batch, heads, length, d = x.shape
    rows = max(64, pool or 0, tile or 0, block if similarity or valid is not None else 0)
    warps = min(16, max(4, rows * dim // 2048))
    # Rows that a thread holds when the elements of a row are spread over threads by 16 bytes each.
    chain = max(1, rows * dim * x.element_size() // (512 * warps))
    chain = min(chain, pool or rows, tile or rows, block)

    def empty(wanted: object, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    fine, blocks = cdiv(length, pool or block), cdiv(length, block)
    padded = pool and valid is not None
    side = Side(
        means=empty(pool, batch, heads, fine, 2, dim, dtype=torch.bfloat16),
        similarity=empty(similarity, batch, heads, blocks),
        filled=empty(padded, batch, fine, dtype=torch.uint8),
        block_filled=empty(padded, batch, blocks, dtype=torch.uint8),
        int8=empty(tile, batch, heads, length, dim, dtype=torch.int8),
        scale=empty(tile, batch, heads, cdiv(length, tile or 1)),
    )
    launch(
        _prepare_kernel, (cdiv(length, rows), batch * heads),
        Rows.of(x), Valid.of(valid), sums, side.means, side.filled, side.block_filled, side.similarity, side.int8,
        side.scale, heads, length,
        D=d, DPAD=dim, ROWS=rows, CHAIN=chain, POOL=pool or 0, BLOCK=block, TILE=tile or 0,
        SMOOTH_POOLED=smooth_pooled, num_warps=warps,
    )  # fmt: skip
    return side


class Values(NamedTuple):
    """V in 8 bits.

    Attributes:
        data: float8_e4m3fn ``[B, Hkv, dim, Lk padded to a multiple of 128]``, zero in all padding. The keys of every
            group of 32 are permuted so that the accumulator of one product is the operand of the next without
            exchanging registers between threads.
        scale: float32 ``[B, Hkv, key blocks]``, above 0: largest magnitude / 448 of a block of keys.
    """

    data: Tensor
    scale: Tensor


def prepare_v(v: Tensor, dim: int, block: int, *, valid: Tensor | None = None) -> Values:
    """V to fp8 e4m3, one scale for every ``block`` keys of a head, transposed.

    fp8 is a floating format: how far a number lies below the largest hardly matters to its relative error.

    Args:
        v: ``[B, H, L, D]``, any strides.
        dim: padded head dim, a power of two.
        block: keys that share a scale, a power of two of at most 128.
        valid: uint8 ``[B, L]``; keys with 0 become zeros and do not count for the scale.
    """
    batch, heads, length, d = v.shape
    padded = cdiv(length, V_TILE) * V_TILE
    out = torch.empty(batch, heads, dim, padded, dtype=torch.float8_e4m3fn, device=v.device)
    scale = torch.empty(batch, heads, cdiv(length, block), dtype=torch.float32, device=v.device)
    launch(
        _prepare_v_kernel, (padded // V_TILE, batch * heads),
        Rows.of(v), Valid.of(valid), out, scale, heads, length, padded,
        D=d, DPAD=dim, KEYS=V_TILE, BLOCK=block, num_warps=4 if dim <= 128 else 8,
    )  # fmt: skip
    return Values(out, scale)
