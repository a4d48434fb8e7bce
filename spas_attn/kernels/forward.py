"""Block-sparse attention, forward: one program per query tile walks the kept key blocks with an online softmax.

The key blocks of a query tile fall into runs (ascending, so PV skip sees keys in order): those that every row sees in
full, which need no token mask at all, and around them those at the causal diagonal, at the window's edge and at the
ragged end, which do. Key padding is tested by one scalar per tile.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask, cdiv
from . import config as configs
from .quantise import mean_over_valid, quantise

LOG2E = 1.4426950408889634


@triton.jit
def _narrow(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """Cast float32 to dtype; the interpreter truncates to bf16, so there the rounding is done on the bits."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc, INTERPRET: tl.constexpr):
    """a @ b + acc in float32; the interpreter's matrix product cannot take 16-bit operands."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _kept_before(row, count, bound, CHUNK: tl.constexpr):
    """How many of the first ``count`` entries of an ascending index row are below ``bound``."""
    before = 0
    for first in range(0, count, CHUNK):
        at = first + tl.arange(0, CHUNK)
        index = tl.load(row + at, mask=at < count, other=2147483647)
        before += tl.sum((index < bound).to(tl.int32), 0)
    return before


# fmt: off
@triton.jit
def _runs(
    row, count, first_row, q_len, k_len, window,
    BLOCK_M: tl.constexpr, MASK_K: tl.constexpr, SPARSE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):
    """Four ascending bounds in the list of key blocks: masked run, full run, masked run lie between them."""
    # fmt: on
    offset = k_len - q_len
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    begin, full_begin = 0, 0
    end, full_end = tl.cdiv(k_len, MASK_K), k_len // MASK_K
    if CAUSAL:
        end = (last_row + offset) // MASK_K + 1
        full_end = (first_row + offset + 1) // MASK_K
        if WINDOW:
            begin = tl.maximum(first_row + offset - window + 1, 0) // MASK_K
            full_begin = tl.cdiv(tl.maximum(last_row + offset - window + 1, 0), MASK_K)
    if SPARSE:
        if WINDOW:
            begin = _kept_before(row, count, begin, 128)
            full_begin = _kept_before(row, count, full_begin, 128)
        full_end = _kept_before(row, count, full_end, 128)
        if CAUSAL:
            end = _kept_before(row, count, end, 128)
        else:
            end = count
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.minimum(tl.maximum(full_begin, full_end), end)
    return begin, full_begin, full_end, end


@triton.jit
def _load_tile(at, in_length, in_dim, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """A tile of K or V; only ragged tiles and padded head dims pay for a mask."""
    if MASKED:
        tile = tl.load(at, mask=in_length & in_dim, other=0)
    elif PADDED:
        tile = tl.load(at, mask=in_dim, other=0)
    else:
        tile = tl.load(at)
    return tile


# fmt: off
@triton.jit
def _hide(
    scores, cols, limit, k_len, window, key_valid, stride_valid, tile_valid,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, MASKED: tl.constexpr,
):
    """-inf where a query must not see a key; ``limit`` is the last key of each row under causality."""
    # fmt: on
    if MASKED:
        if CAUSAL:
            seen = cols[None, :] <= limit[:, None]
            if WINDOW:
                seen &= cols[None, :] > limit[:, None] - window
        else:
            seen = (cols < k_len)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    if PADDING:
        if tl.load(tile_valid) == 0:
            kept = tl.load(key_valid + cols * stride_valid, mask=cols < k_len, other=0) != 0
            scores = tl.where(kept[None, :], scores, float("-inf"))
    return scores


# fmt: off
@triton.jit
def _absorb(
    acc, total, peak, scores, scale, new_peak, v_at, in_length,
    D: tl.constexpr, DPAD: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr, HIDING: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Load V and do one step of the online softmax in base 2, the scores being ``(scores - SHIFT) * scale``."""
    # fmt: on
    v = _load_tile(v_at, in_length[:, None], (tl.arange(0, DPAD) < D)[None, :], D < DPAD, MASKED)
    anchor = new_peak
    if HIDING:
        # Nothing seen yet: any finite anchor makes exp2(-inf - anchor) zero instead of NaN.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(scores * scale - (SHIFT * scale + anchor)[:, None])
    decay = tl.exp2(peak - anchor)
    total = total * decay + tl.sum(p, 1)
    acc = _dot(_narrow(p, v.dtype, INTERPRET), v, acc * decay[:, None], INTERPRET)
    return acc, total, new_peak


# fmt: off
@triton.jit
def _walk(
    acc, total, peak, q, q_scale, k_ptrs, v_ptrs, stride_kn, stride_vn, row, k_scales,
    key_valid, stride_valid, tile_valid, limit, wants, threshold, lo, hi, k_len, window,
    D: tl.constexpr, QK_D: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, MASK_K: tl.constexpr,
    SPARSE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, INT8: tl.constexpr,
    SKIP: tl.constexpr, MASKED: tl.constexpr, INTERPRET: tl.constexpr,
):
    """Take key blocks ``lo`` to ``hi`` of the list into the running softmax; MASKED ones pay for token masks."""
    # fmt: on
    PARTS: tl.constexpr = MASK_K // BLOCK_N
    # int32 -> float32 runs at a quarter of the rate of an addition. Adding the bits of 1.5 * 2^23 instead gives that
    # number plus the score, exact below 2^22 (127 * 127 * 256 is); the softmax's subtrahend takes it away again.
    SHIFT: tl.constexpr = 12582912.0 if INT8 else 0.0
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, DPAD)
    for part in range(lo * PARTS, hi * PARTS):
        if SPARSE:
            start = tl.load(row + part // PARTS) * MASK_K + (part % PARTS) * BLOCK_N
        else:
            start = part * BLOCK_N
        cols = start + offs_n
        far = tl.cast(start, tl.int64)
        k_at = k_ptrs + far * stride_kn
        v_at = v_ptrs + far * stride_vn
        in_length = cols < k_len
        k = _load_tile(k_at, in_length[None, :], (offs_d < QK_D)[:, None], QK_D < DPAD, MASKED)
        if INT8:
            scores = (tl.dot(q, k, out_dtype=tl.int32) + 0x4B400000).to(tl.float32, bitcast=True)
            # Beyond the cap, where a step of the integers is half a power of two, the subtrahend could not be rounded.
            scale = tl.minimum(q_scale * tl.load(k_scales + start // BLOCK_N), 0.5)
        else:
            scores = _dot(q, k, None, INTERPRET)
            scale = q_scale
        scores = _hide(
            scores, cols, limit, k_len, window, key_valid, stride_valid, tile_valid + start // BLOCK_N,
            CAUSAL, WINDOW, PADDING, MASKED,
        )  # fmt: skip
        tile_peak = (tl.max(scores, 1) - SHIFT) * scale
        if not INT8:
            # Rounded up, so that no multiply-add of a huge score comes out above 0 and its exponential overflows.
            tile_peak = tl.maximum(tile_peak * (1 + 2.0**-23), tile_peak * (1 - 2.0**-23))
        new_peak = tl.maximum(peak, tile_peak)
        if SKIP:
            behind = tl.where(wants & (tile_peak > float("-inf")), tile_peak - new_peak, float("-inf"))
            if tl.max(behind, 0) + threshold > 0:
                acc, total, peak = _absorb(
                    acc, total, peak, scores, scale, new_peak, v_at, in_length,
                    D, DPAD, SHIFT, MASKED, MASKED or PADDING, INTERPRET,
                )  # fmt: skip
        else:
            acc, total, peak = _absorb(
                acc, total, peak, scores, scale, new_peak, v_at, in_length,
                D, DPAD, SHIFT, MASKED, MASKED or PADDING, INTERPRET,
            )  # fmt: skip
    return acc, total, peak


@triton.jit
def _finish(acc, total, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """The output rows; 0 where nothing was seen."""
    out = tl.where(total[:, None] > 0, acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    if dtype == tl.float16:
        # P is rounded, its sum is not: a mean of values near the end of the range may come out just above it.
        out = tl.where(tl.abs(out) < float("inf"), tl.minimum(tl.maximum(out, -65504.0), 65504.0), out)
    return _narrow(out, dtype, INTERPRET)


# fmt: off
@triton.jit
def _sparse_attention_fwd_kernel(
    Q, K, V, Out, QScale, KScale, Counts, Indices, KeyValid, TileValid, Threshold,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_in, stride_valid_b, stride_valid_n,
    heads, group, q_len, k_len, window, softmax_scale,
    D: tl.constexpr, QK_D: tl.constexpr, DPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, SPARSE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    PADDING: tl.constexpr, INT8: tl.constexpr, SKIP: tl.constexpr, INTERPRET: tl.constexpr,
):
    # fmt: on
    tiles_m, tiles_n = tl.cdiv(q_len, BLOCK_M), tl.cdiv(k_len, BLOCK_N)
    pid = tl.program_id(0)
    tile = pid % tiles_m
    if CAUSAL:
        tile = tiles_m - 1 - tile  # the longest rows first
    head = tl.cast(pid // tiles_m, tl.int64)
    b, h = head // heads, head % heads
    kh = h // group
    first_row = tile * BLOCK_M
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DPAD)
    rows = first_row + offs_m
    inside, far = rows < q_len, tl.cast(first_row, tl.int64)

    q_first = Q + b * stride_qb + h * stride_qh + far * stride_qn
    q_at = q_first + offs_m[:, None] * stride_qn + offs_d[None, :] * stride_qd
    q = tl.load(q_at, mask=inside[:, None] & (offs_d < QK_D)[None, :], other=0)
    k_ptrs = K + b * stride_kb + kh * stride_kh + offs_n[None, :] * stride_kn + offs_d[:, None] * stride_kd
    v_ptrs = V + b * stride_vb + kh * stride_vh + offs_n[:, None] * stride_vn + offs_d[None, :] * stride_vd
    q_scale, k_scales = softmax_scale, KScale
    if INT8:
        q_scale = tl.load(QScale + head * tiles_m + tile)
        k_scales = KScale + (head // group) * tiles_n
    row, count, threshold = Indices, 0, 0.0
    if SPARSE:
        block = first_row // MASK_Q
        row = Indices + b * stride_ib + h * stride_ih + tl.cast(block, tl.int64) * stride_in
        count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    if SKIP:
        threshold = tl.load(Threshold + h)
    begin, full_begin, full_end, end = _runs(
        row, count, first_row, q_len, k_len, window, BLOCK_M, MASK_K, SPARSE, CAUSAL, WINDOW
    )
    acc = tl.zeros([BLOCK_M, DPAD], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    limit = rows + (k_len - q_len)
    for run in tl.static_range(0 if WINDOW else 1, 3):
        lo = begin if run == 0 else (full_begin if run == 1 else full_end)
        hi = full_begin if run == 0 else (full_end if run == 1 else end)
        acc, total, peak = _walk(
            acc, total, peak, q, q_scale, k_ptrs, v_ptrs, stride_kn, stride_vn, row, k_scales,
            KeyValid + b * stride_valid_b, stride_valid_n, TileValid + b * tiles_n, limit, inside, threshold,
            lo, hi, k_len, window,
            D, QK_D, DPAD, BLOCK_N, MASK_K, SPARSE, CAUSAL, WINDOW, PADDING, INT8, SKIP, run != 1, INTERPRET,
        )  # fmt: skip
    o_first = Out + b * stride_ob + h * stride_oh + far * stride_on
    o_at = o_first + offs_m[:, None] * stride_on + offs_d[None, :] * stride_od
    tl.store(o_at, _finish(acc, total, Out.dtype.element_ty, INTERPRET), mask=inside[:, None] & (offs_d < D)[None, :])


INTERPRETED = not isinstance(_sparse_attention_fwd_kernel, triton.JITFunction)


def _kind(q: Tensor, int8: bool) -> str:
    return "int8" if int8 else "float" if q.dtype == torch.float32 else "half"


def padded_dim(dim: int, int8: bool) -> int:
    """Head dim as the kernels hold it: a power of two, at least what the matrix units take."""
    return max(32 if int8 else 16, triton.next_power_of_2(dim))


def whole_block_config(q: Tensor, mask: BlockMask, int8: bool) -> configs.Config | None:
    """The configuration that judges PV skip per block of the mask, or None where such tiles do not fit."""
    limit = configs.shared_memory_limit(q.device)
    blocks = (mask.block_q, mask.block_k)
    return configs.choose_whole_blocks(_kind(q, int8), padded_dim(q.shape[-1], int8), limit, blocks)


def sparse_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    pv_threshold: Tensor | None = None,
    int8: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Launch the forward kernel (and with ``int8`` the quantising ones before it).

    Args:
        q: ``[B, Hq, Lq, D]``; k, v ``[B, Hkv, Lk, D]``, any strides; fp16, bf16 or fp32.
        mask: the blocks to compute, None for all.
        scale: positive factor on q·k.
        is_causal: lower-right aligned.
        window: with causality, a query sees its last ``window`` keys.
        key_mask: bool ``[B, Lk]``, True = attend.
        pv_threshold: float32 ``[Hq]``, log2 units; only with a mask whose blocks fit (``whole_block_config``).
        int8: quantise Q and K per block; K is smoothed by the mean of its valid tokens. Under causality a later token
            then reaches earlier outputs through mean and scales, within the quantisation error.
        out: where to write, shaped like q.
    """
    out = torch.empty_like(q) if out is None else out
    if out.numel() == 0:
        return out
    dim = padded_dim(q.shape[-1], int8)
    limit = configs.shared_memory_limit(q.device)
    config = None
    if pv_threshold is not None and mask is not None:
        config = whole_block_config(q, mask, int8)
    skip = config is not None
    if config is None:
        blocks = None if mask is None else (mask.block_q, mask.block_k)
        config = configs.choose(_kind(q, int8), dim, limit, blocks)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        _launch(q, k, v, mask, scale, is_causal, window, key_mask, pv_threshold if skip else None, int8, out, config)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    pv_threshold: Tensor | None,
    int8: bool,
    out: Tensor,
    config: configs.Config,
) -> None:
    (batch, heads, q_len, d), k_len = q.shape, k.shape[2]
    dim, group = padded_dim(d, int8), heads // k.shape[1]
    valid = None if key_mask is None else key_mask.to(torch.uint8)
    q_scale = k_scale = q  # a pointer that the kernel never reads
    if int8:
        mean = mean_over_valid(k, valid, dim)
        q, q_scale = quantise(q, config.block_m, dim, factor=scale * LOG2E)
        k, k_scale = quantise(k, config.block_n, dim, mean=mean, valid=valid)
        v = v.to(torch.bfloat16) if v.dtype == torch.float32 else v
    counts = indices = q
    if mask is not None:
        counts = mask.counts.expand(batch, heads, -1).contiguous()
        indices = mask.indices.expand(batch, heads, -1, -1)
        indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    # fmt: off
    _sparse_attention_fwd_kernel[(cdiv(q_len, config.block_m) * batch * heads,)](
        q, k, v, out, q_scale, k_scale, counts, indices,
        q if valid is None else valid, q if valid is None else _tile_valid(valid, config.block_n),
        q if pv_threshold is None else pv_threshold,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        *counts.stride()[:2], *indices.stride()[:3], *((0, 0) if valid is None else valid.stride()),
        heads, group, q_len, k_len, window or 0, scale * LOG2E,
        D=d, QK_D=dim if int8 else d, DPAD=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        MASK_Q=mask.block_q if mask else config.block_m, MASK_K=mask.block_k if mask else config.block_n,
        SPARSE=mask is not None, CAUSAL=is_causal, WINDOW=is_causal and window is not None,
        PADDING=valid is not None, INT8=int8, SKIP=pv_threshold is not None, INTERPRET=INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )
    # fmt: on


def _tile_valid(valid: Tensor, block: int) -> Tensor:
    """uint8 ``[B, ceil(Lk / block)]``: 1 where all keys of the tile may be attended to."""
    padded = torch.nn.functional.pad(valid, (0, -valid.shape[1] % block))
    return padded.unflatten(1, (-1, block)).amin(-1)
