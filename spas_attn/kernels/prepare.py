"""Everything that is made from Q, K and V before attention, each tensor read once (V and an exact mean of K twice).

``prepare`` turns Q or K into the means of sub-blocks that selection scores, the self-similarity of blocks
(SpargeAttn, arXiv 2502.18137) and int8 with one scale per tile (SageAttention, arXiv 2410.02367), in one pass.
``prepare_v`` turns V into fp8 with one scale per channel, transposed, as the Hopper matrix unit takes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask, cdiv
from .arithmetic import INTERPRETED, narrow, nearest_int8
from .columns import partial_columns

LOG2E = 1.4426950408889634
SAMPLES = 256  # keys, at most, whose mean smooths K where nothing needs the exact mean: one program's work
V_TILE = 128  # fp8 V is padded to whole tiles of so many keys


@triton.jit
def _sum_rows(x, SIZE: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, DPAD: tl.constexpr):
    """Sums over stretches of SIZE tokens, ``[ROWS // SIZE, DPAD]``, of rows in the order of ``_prepare_kernel``."""
    chains = tl.sum(tl.reshape(x, [CHAIN, ROWS // CHAIN, DPAD]), 0)
    return tl.sum(tl.reshape(chains, [ROWS // SIZE, SIZE // CHAIN, DPAD]), 1)


@triton.jit
def _members(valid, first, length, SIZE: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, PADDING: tl.constexpr):
    """How many tokens of every stretch of SIZE take part, float32 ``[ROWS // SIZE]``."""
    if PADDING:
        chains = tl.sum(tl.reshape(valid.to(tl.float32), [CHAIN, ROWS // CHAIN]), 0)
        members = tl.sum(tl.reshape(chains, [ROWS // SIZE, SIZE // CHAIN]), 1)
    else:
        left = length - first - tl.arange(0, ROWS // SIZE) * SIZE
        members = tl.minimum(tl.maximum(left, 0), SIZE).to(tl.float32)
    return members


# fmt: off
@triton.jit
def _prepare_kernel(
    X, Valid, Sums, Counts, Pooled, Filled, BlockFilled, Similarity, Int8, Scale,
    stride_b, stride_h, stride_n, stride_d, stride_valid_b, stride_valid_n,
    heads, length, factor,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, CHAIN: tl.constexpr, POOL: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SMOOTH: tl.constexpr, SIMILARITY: tl.constexpr,
    SMOOTH_POOLED: tl.constexpr, PADDING: tl.constexpr, INTERPRET: tl.constexpr,
):
    """One program takes ROWS tokens of one head; with POOL or TILE 0 it makes no means or no int8.

    Row r of a tensor here is token ``r % (ROWS / CHAIN) * CHAIN + r // (ROWS / CHAIN)``, so that CHAIN tokens in
    succession lie in one thread, which adds them without asking another.
    """
    # fmt: on
    part = tl.program_id(0)
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    first = part * ROWS
    offs_d, offs_r = tl.arange(0, DPAD), tl.arange(0, ROWS)
    order = offs_r % (ROWS // CHAIN) * CHAIN + offs_r // (ROWS // CHAIN)
    valid = first + order < length
    valid_row = Valid + b * stride_valid_b
    if PADDING:
        valid &= tl.load(valid_row + (first + order) * tl.cast(stride_valid_n, tl.int64), mask=valid, other=0) != 0
    x_at = X + b * stride_b + h * stride_h + tl.cast(first, tl.int64) * stride_n
    take = valid[:, None] & (offs_d < D)[None, :]
    x = tl.load(x_at + order[:, None] * stride_n + offs_d[None, :] * stride_d, mask=take, other=0.0).to(tl.float32)
    centre = tl.zeros([DPAD], tl.float32)
    smooth = x
    if SMOOTH:
        centre = tl.load(Sums + head * DPAD + offs_d) / tl.maximum(tl.load(Counts + head), 1.0)
        smooth = tl.where(take, x - centre[None, :], 0.0)
    if POOL > 0:
        n: tl.constexpr = ROWS // POOL
        which, total = part * n + tl.arange(0, n), tl.cdiv(length, POOL)
        members = _members(valid, first, length, POOL, ROWS, CHAIN, PADDING)
        mean = _sum_rows(x, POOL, ROWS, CHAIN, DPAD) * (1.0 / tl.maximum(members, 1.0))[:, None]
        if SMOOTH_POOLED:
            mean = tl.where((members > 0)[:, None], mean - centre[None, :], 0.0)
        # A bf16 pair holds 16 bits of the mean, enough for scores that agree with float32's to its rounding.
        high = narrow(mean, tl.bfloat16, INTERPRET)
        low = narrow(mean - high.to(tl.float32), tl.bfloat16, INTERPRET)
        to = Pooled + (head * total + which)[:, None] * (2 * DPAD) + offs_d[None, :]
        tl.store(to, high, mask=(which < total)[:, None])
        tl.store(to + DPAD, low, mask=(which < total)[:, None])
        if PADDING:
            if h == 0:
                tl.store(Filled + b * total + which, (members > 0).to(tl.uint8), mask=which < total)
                block, blocks = part * (ROWS // BLOCK) + tl.arange(0, ROWS // BLOCK), tl.cdiv(length, BLOCK)
                some = _members(valid, first, length, BLOCK, ROWS, CHAIN, PADDING) > 0
                tl.store(BlockFilled + b * blocks + block, some.to(tl.uint8), mask=block < blocks)
    if SIMILARITY:
        # Mean pairwise cosine of the rows of a block: the squared norm of the mean of the unit rows.
        judged = smooth if SMOOTH_POOLED else x
        unit = judged * (1.0 / tl.maximum(tl.sqrt(tl.sum(judged * judged, 1)), 1e-12))[:, None]
        members = _members(valid, first, length, BLOCK, ROWS, CHAIN, PADDING)
        mean = _sum_rows(unit, BLOCK, ROWS, CHAIN, DPAD) * (1.0 / tl.maximum(members, 1.0))[:, None]
        block, blocks = part * (ROWS // BLOCK) + tl.arange(0, ROWS // BLOCK), tl.cdiv(length, BLOCK)
        tl.store(Similarity + head * blocks + block, tl.sum(mean * mean, 1), mask=block < blocks)
    if TILE > 0:
        m: tl.constexpr = ROWS // TILE
        largest = tl.max(tl.reshape(tl.abs(smooth), [CHAIN, ROWS // CHAIN, DPAD]), 0)
        largest = tl.max(tl.max(tl.reshape(largest, [m, TILE // CHAIN, DPAD]), 1), 1)
        scale = tl.maximum(largest, 1e-12) / 127.0
        tile, tiles = part * m + tl.arange(0, m), tl.cdiv(length, TILE)
        tl.store(Scale + head * tiles + tile, scale * factor, mask=tile < tiles)
        _store_int8(
            Int8 + (head * length + first) * DPAD, x_at, valid_row, scale, centre, first, length,
            stride_n, stride_d, stride_valid_n, D, DPAD, ROWS, TILE, SMOOTH, PADDING,
        )  # fmt: skip


# fmt: off
@triton.jit
def _store_int8(
    to, x_at, valid_row, scale, centre, first, length, stride_n, stride_d, stride_valid_n,
    D: tl.constexpr, DPAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SMOOTH: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Reads the rows again, from the cache: held in registers they would leave room for one program at a time."""
    # fmt: on
    STEP: tl.constexpr = min(TILE, 32)
    offs_d = tl.arange(0, DPAD)
    steps = 1.0 / scale
    for start in tl.static_range(0, ROWS, STEP):
        rows = start + tl.arange(0, STEP)
        inside = first + rows < length
        valid = inside
        if PADDING:
            valid &= tl.load(valid_row + (first + rows) * tl.cast(stride_valid_n, tl.int64), mask=inside, other=0) != 0
        take = valid[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_at + rows[:, None] * stride_n + offs_d[None, :] * stride_d, mask=take, other=0.0).to(tl.float32)
        if SMOOTH:
            x = tl.where(take, x - centre[None, :], 0.0)
        step = tl.sum(tl.where(tl.arange(0, ROWS // TILE) == start // TILE, steps, 0.0), 0)
        tl.store(to + rows[:, None] * DPAD + offs_d[None, :], nearest_int8(x * step), mask=inside[:, None])


# fmt: off
@triton.jit
def _prepare_v_kernel(
    V, Valid, Amax, Out, Scale,
    stride_b, stride_h, stride_n, stride_d, stride_valid_b, stride_valid_n,
    heads, length, padded, chunks,
    D: tl.constexpr, DPAD: tl.constexpr, KEYS: tl.constexpr, CHUNKS: tl.constexpr, PERMUTE: tl.constexpr,
    PADDING: tl.constexpr, INTERPRET: tl.constexpr,
):
    """KEYS keys of one head to fp8, stored [DPAD, padded]."""
    # fmt: on
    # From the last tile on: the pass before this one has left the end of V in the cache.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.cast(tl.num_programs(1) - 1 - tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    offs_d, offs_n = tl.arange(0, DPAD), tl.arange(0, KEYS)
    keys = offs_n
    if PERMUTE:
        # Position [h:1][g:2][l:1][e:1] of a group of 32 takes key [h:1][l:1][g:2][e:1].
        keys = (offs_n & ~15) | ((offs_n & 2) << 2) | ((offs_n & 12) >> 1) | (offs_n & 1)
    rows = tile * KEYS + keys
    valid = rows < length
    if PADDING:
        valid_at = Valid + b * stride_valid_b + rows * tl.cast(stride_valid_n, tl.int64)
        valid &= tl.load(valid_at, mask=valid, other=0) != 0
    v_at = V + b * stride_b + h * stride_h + tl.cast(tile * KEYS, tl.int64) * stride_n
    v_at += keys[:, None] * stride_n + offs_d[None, :] * stride_d
    v = tl.load(v_at, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
    at = tl.arange(0, CHUNKS)
    amax_at = Amax + (head * chunks + at)[:, None] * DPAD + offs_d[None, :]
    amax = tl.max(tl.load(amax_at, mask=(at < chunks)[:, None], other=0.0), 0)
    amax = tl.maximum(amax, 1e-30)
    eighth = narrow(v * (448.0 / amax)[None, :], Out.dtype.element_ty, INTERPRET)
    to = Out + (head * DPAD + offs_d)[:, None] * padded + tile * KEYS + offs_n[None, :]
    tl.store(to, tl.trans(eighth))
    if tile == 0:
        tl.store(Scale + head * DPAD + offs_d, amax / 448.0)


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


@dataclass(frozen=True)
class Prepared:
    """What one pass over Q and one over K leave for the attention kernels; None for what was not asked for.

    Attributes:
        mask: the selected blocks.
        q, k: int8 tensors and scales; the scales of Q include the softmax scale and log2(e), K is smoothed.
        key_sums: what K was smoothed with, see :func:`key_sums`.
    """

    mask: BlockMask
    q: Side
    k: Side
    key_sums: tuple[Tensor, Tensor] | None


def padded_dim(dim: int) -> int:
    """Head dim as prepared tensors hold it: a power of two, at least the 32 that 8-bit matrix products take."""
    return max(32, triton.next_power_of_2(dim))


def key_order() -> Tensor:
    """Which key of a group of 32 stands at each position of a permuted fp8 V, int64 ``[32]``."""
    at = torch.arange(32)
    return (at & ~15) | ((at & 2) << 2) | ((at & 12) >> 1) | (at & 1)


def as_bytes(valid: Tensor | None) -> Tensor | None:
    """A boolean key mask as uint8, without a copy."""
    return valid if valid is None or valid.dtype == torch.uint8 else valid.view(torch.uint8)


def key_sums(k: Tensor, dim: int, valid: Tensor | None, exact: bool) -> tuple[Tensor, Tensor]:
    """What ``prepare`` smooths K with: sums of valid keys float32 ``[B * H, 1, dim]``, and how many, ``[B * H, 1]``.

    Softmax does not change when any vector is subtracted from all keys of a head, so the mean of at most
    ``SAMPLES`` keys at even distances does; ``exact`` takes all keys, for similarities that others compare with.
    """
    every = 1 if exact else max(1, cdiv(k.shape[2], SAMPLES))
    sums, counts = partial_columns(k, dim, valid, cdiv(k.shape[2], every), every, amax=False)
    return (sums, counts) if sums.shape[1] == 1 else (sums.sum(1, keepdim=True), counts.sum(1, keepdim=True))


def _warps(rows: int, dim: int) -> int:
    return min(16, max(4, rows * dim // 2048))


def prepare(
    x: Tensor,
    dim: int,
    *,
    pool: int | None = None,
    block: int = 128,
    similarity: bool = False,
    tile: int | None = None,
    factor: float = 1.0,
    sums: tuple[Tensor, Tensor] | None = None,
    smooth_pooled: bool = False,
    valid: Tensor | None = None,
    num_warps: int | None = None,
) -> Side:
    """Means, self-similarity and int8 of Q or K in one pass; ``x`` itself is only read.

    Args:
        x: ``[B, H, L, D]``, any strides.
        dim: padded head dim, a power of two (``padded_dim``).
        pool: length of the sub-blocks whose means are wanted, a divisor of ``block``; None for no means.
        block: mask block in tokens, 64 or 128.
        similarity: also measure the self-similarity of every block.
        tile: tokens that share an int8 scale, a power of two of at most 128; None for no int8.
        factor: multiplied into the int8 scales.
        sums: from ``key_sums``: what to subtract before quantising, and with ``smooth_pooled`` before everything.
        smooth_pooled: means and similarities are of the smoothed tensor, too.
        valid: uint8 ``[B, L]``; tokens with 0 take no part, their int8 is zero.
        num_warps: Triton's launch option; chosen by size by default.
    """
    batch, heads, length, d = x.shape
    rows = max(64, pool or 0, tile or 0, block if similarity or valid is not None else 0)
    warps = num_warps or _warps(rows, dim)
    # Rows that a thread holds when the elements of a row are spread over threads by 16 bytes each.
    chain = max(1, rows * dim * x.element_size() // (512 * warps))
    chain = min(chain, pool or rows, tile or rows, block)
    grid = (cdiv(length, rows), batch * heads)

    def empty(wanted: object, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    fine, blocks = cdiv(length, pool or block), cdiv(length, block)
    padded = pool and valid is not None
    side = Side(
        empty(pool, batch, heads, fine, 2, dim, dtype=torch.bfloat16),
        empty(similarity, batch, heads, blocks),
        empty(padded, batch, fine, dtype=torch.uint8),
        empty(padded, batch, blocks, dtype=torch.uint8),
        empty(tile, batch, heads, length, dim, dtype=torch.int8),
        empty(tile, batch, heads, cdiv(length, tile or 1)),
    )
    outs = (side.means, side.filled, side.block_filled, side.similarity, side.int8, side.scale)
    # fmt: off
    _prepare_kernel[grid](
        x, x if valid is None else valid, *((x, x) if sums is None else sums),
        *(x if out is None else out for out in outs),  # pointers that the kernel never touches
        *x.stride(), *((0, 0) if valid is None else valid.stride()),
        heads, length, factor,
        D=d, DPAD=dim, ROWS=rows, CHAIN=chain, POOL=pool or 0, BLOCK=block, TILE=tile or 0,
        SMOOTH=sums is not None, SIMILARITY=similarity, SMOOTH_POOLED=smooth_pooled,
        PADDING=valid is not None, INTERPRET=INTERPRETED, num_warps=warps,
    )
    # fmt: on
    return side


def prepare_v(
    v: Tensor,
    dim: int,
    *,
    valid: Tensor | None = None,
    permute: bool = True,
    dtype: torch.dtype = torch.float8_e4m3fn,
    num_warps: int = 4,
) -> tuple[Tensor, Tensor]:
    """V to fp8 e4m3, one scale per channel (largest magnitude / 448), transposed.

    Args:
        v: ``[B, H, L, D]``, any strides.
        dim: padded head dim, a power of two.
        valid: uint8 ``[B, L]``; keys with 0 become zeros and do not count for the scale.
        permute: store the keys of every group of 32 in ``key_order``: so the accumulator of one product is the
            operand of the next without exchanging registers between threads.
        dtype: float8_e4m3fn; another floating type for tests.

    Returns:
        ``[B, H, dim, L padded to a multiple of 128]``, zero in all padding, and float32 scales ``[B, H, dim]``.
    """
    batch, heads, length, d = v.shape
    padded = cdiv(length, V_TILE) * V_TILE
    out = torch.empty(batch, heads, dim, padded, dtype=dtype, device=v.device)
    scale = torch.empty(batch, heads, dim, dtype=torch.float32, device=v.device)
    amax, _ = partial_columns(v, dim, valid, length, 1, amax=True)
    chunks = amax.shape[1]
    # fmt: off
    _prepare_v_kernel[(padded // V_TILE, batch * heads)](
        v, v if valid is None else valid, amax, out, scale,
        *v.stride(), *((0, 0) if valid is None else valid.stride()),
        heads, length, padded, chunks,
        D=d, DPAD=dim, KEYS=V_TILE, CHUNKS=triton.next_power_of_2(chunks), PERMUTE=permute,
        PADDING=valid is not None, INTERPRET=INTERPRETED, num_warps=num_warps if dim <= 128 else 2 * num_warps,
    )
    # fmt: on
    return out, scale
