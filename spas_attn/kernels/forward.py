"""Block-sparse attention, forward: one program per query tile walks the kept key blocks with an online softmax.

The key blocks of a query tile fall into runs (ascending, so PV skip sees keys in order): those that every row sees in
full, which need no token mask at all, and around them those at the causal diagonal, at the window's edge and at the
ragged end, which do. Key padding is tested by one scalar per tile.

Three precisions share the walk: both products in the inputs' own type; Q and K in int8 (SageAttention, arXiv
2410.02367), Q quantised per row when its tile is loaded; and P and V in fp8 besides (SageAttention2, arXiv 2411.10958).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, narrow, nearest_int8


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
def _key_tile(
    K, k_at, b, kh, start, in_length,
    QK_D: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):
    """Kᵀ of one tile, [DPAD, BLOCK_N]; the copy engine fills what lies outside with zeros by itself."""
    # fmt: on
    in_dim = (tl.arange(0, DPAD) < QK_D)[:, None]
    if TMA:
        k = tl.trans(K.load([b, kh, start, 0]).reshape(BLOCK_N, DPAD))
    elif MASKED:
        k = tl.load(k_at, mask=in_length[None, :] & in_dim, other=0)
    elif QK_D < DPAD:
        k = tl.load(k_at, mask=in_dim, other=0)
    else:
        k = tl.load(k_at)
    return k


# fmt: off
@triton.jit
def _value_tile(
    V, v_at, b, kh, start, in_length,
    V_D: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """V of one tile, [BLOCK_N, DPAD]; in fp8 it lies transposed in memory, whole and padded with zeros."""
    # fmt: on
    in_dim = (tl.arange(0, DPAD) < V_D)[None, :]
    if TMA and FP8:
        v = tl.trans(V.load([b, kh, 0, start]).reshape(DPAD, BLOCK_N))
    elif TMA:
        v = V.load([b, kh, start, 0]).reshape(BLOCK_N, DPAD)
    elif MASKED and not FP8:
        v = tl.load(v_at, mask=in_length[:, None] & in_dim, other=0)
    elif V_D < DPAD:
        v = tl.load(v_at, mask=in_dim, other=0)
    else:
        v = tl.load(v_at)
    return v


@triton.jit
def _probabilities(scores, scale, anchor, SHIFT: tl.constexpr, INT8: tl.constexpr):
    """exp2 of ``(scores - SHIFT) * scale - anchor``; scale is one per row in int8, else one for all."""
    if INT8:
        exponent = scores * scale[:, None] - (SHIFT * scale + anchor)[:, None]
    else:
        exponent = scores * scale - anchor[:, None]
    return tl.exp2(exponent)


# fmt: off
@triton.jit
def _absorb(
    acc, total, peak, scores, scale, new_peak, v,
    SHIFT: tl.constexpr, INT8: tl.constexpr, FP8: tl.constexpr, HIDING: tl.constexpr, INTERPRET: tl.constexpr,
):
    """One step of the online softmax in base 2."""
    # fmt: on
    anchor = new_peak
    if HIDING:
        # Nothing seen yet: any finite anchor makes exp2(-inf - anchor) zero instead of NaN.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = tl.exp2(peak - anchor)
    if FP8:
        # P up to 2^8 instead of 1: fp8 ends at 448, and below 2^-6 it loses digits. The factor cancels in acc / total.
        p = _probabilities(scores, scale, anchor - 8.0, SHIFT, INT8)
        total = total * decay + tl.sum(p, 1)
        BLOCK_M: tl.constexpr = p.shape[0]
        BLOCK_N: tl.constexpr = p.shape[1]
        p = narrow(p, tl.float8e4nv, INTERPRET)
        # In this order of the keys (prepare.py stores V in it) a thread's scores are what it feeds to the next product.
        p = p.reshape(BLOCK_M, BLOCK_N // 32, 2, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(BLOCK_M, BLOCK_N)
        acc = dot(p, v, acc * decay[:, None], INTERPRET)
    else:
        p = _probabilities(scores, scale, anchor, SHIFT, INT8)
        total = total * decay + tl.sum(p, 1)
        acc = dot(narrow(p, v.dtype, INTERPRET), v, acc * decay[:, None], INTERPRET)
    return acc, total, new_peak


# fmt: off
@triton.jit
def _walk(
    acc, total, peak, q, q_scale, K, V, b, kh, k_ptrs, v_ptrs, stride_kn, stride_vn, row, k_scales,
    key_valid, stride_valid, tile_valid, limit, wants, threshold, lo, hi, k_len, window,
    QK_D: tl.constexpr, V_D: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, MASK_K: tl.constexpr,
    SPARSE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, INT8: tl.constexpr,
    FP8: tl.constexpr, SKIP: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, INTERPRET: tl.constexpr,
):
    """Take key blocks ``lo`` to ``hi`` of the list into the running softmax; MASKED ones pay for token masks."""
    # fmt: on
    PARTS: tl.constexpr = MASK_K // BLOCK_N
    # int32 -> float32 runs at a quarter of the rate of an addition. Adding the bits of 1.5 * 2^23 instead gives that
    # number plus the score, exact below 2^22 (127 * 127 * 256 is); the softmax's subtrahend takes it away again.
    SHIFT: tl.constexpr = 12582912.0 if INT8 else 0.0
    offs_n = tl.arange(0, BLOCK_N)
    # A masked run is a tile or two: overlapping its loads would only cost the full run registers and shared memory.
    STAGES: tl.constexpr = 1 if MASKED else None
    for part in tl.range(lo * PARTS, hi * PARTS, num_stages=STAGES):
        if SPARSE:
            start = tl.load(row + part // PARTS) * MASK_K + (part % PARTS) * BLOCK_N
        else:
            start = part * BLOCK_N
        cols = start + offs_n
        far = tl.cast(start, tl.int64)
        in_length = cols < k_len
        k = _key_tile(K, k_ptrs + far * stride_kn, b, kh, start, in_length, QK_D, DPAD, BLOCK_N, TMA, MASKED)
        if INT8:
            scores = (tl.dot(q, k, out_dtype=tl.int32) + 0x4B400000).to(tl.float32, bitcast=True)
            # Beyond the cap, where a step of the integers is half a power of two, the subtrahend could not be rounded.
            scale = tl.minimum(q_scale * tl.load(k_scales + start // MASK_K), 0.5)
        else:
            scores = dot(q, k, None, INTERPRET)
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
        v_at = v_ptrs + far * stride_vn
        if SKIP:
            behind = tl.where(wants & (tile_peak > float("-inf")), tile_peak - new_peak, float("-inf"))
            if tl.max(behind, 0) + threshold > 0:
                v = _value_tile(V, v_at, b, kh, start, in_length, V_D, DPAD, BLOCK_N, FP8, TMA, MASKED)
                acc, total, peak = _absorb(
                    acc, total, peak, scores, scale, new_peak, v, SHIFT, INT8, FP8, MASKED or PADDING, INTERPRET
                )
        else:
            v = _value_tile(V, v_at, b, kh, start, in_length, V_D, DPAD, BLOCK_N, FP8, TMA, MASKED)
            acc, total, peak = _absorb(
                acc, total, peak, scores, scale, new_peak, v, SHIFT, INT8, FP8, MASKED or PADDING, INTERPRET
            )
    return acc, total, peak


@triton.jit
def _quantise_rows(q, softmax_scale):
    """int8 of each row and its scale, softmax factor included."""
    q = q.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(q), 1), 1e-12) / 127.0
    return nearest_int8(q / scale[:, None]), scale * softmax_scale


@triton.jit
def _finish(acc, total, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """The output rows; 0 where nothing was seen."""
    out = tl.where(total[:, None] > 0, acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    if dtype == tl.float16:
        # P is rounded, its sum is not: a mean of values near the end of the range may come out just above it.
        out = tl.where(tl.abs(out) < float("inf"), tl.minimum(tl.maximum(out, -65504.0), 65504.0), out)
    return narrow(out, dtype, INTERPRET)


# fmt: off
@triton.jit
def sparse_attention_fwd_kernel(
    Q, K, V, Out, Lse, KScale, KMean, VScale, Counts, Indices, KeyValid, TileValid, Threshold,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_in, stride_valid_b, stride_valid_n,
    heads, group, q_len, k_len, window, softmax_scale,
    D: tl.constexpr, Q_D: tl.constexpr, QK_D: tl.constexpr, V_D: tl.constexpr, DPAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_Q: tl.constexpr, MASK_K: tl.constexpr, SPARSE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDING: tl.constexpr, RAGGED: tl.constexpr, INT8: tl.constexpr,
    FP8: tl.constexpr, SKIP: tl.constexpr, WITH_LSE: tl.constexpr, TMA: tl.constexpr, INTERPRET: tl.constexpr,
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
    q = tl.load(q_at, mask=inside[:, None] & (offs_d < Q_D)[None, :], other=0)
    k_ptrs, v_ptrs = q_at, q_at  # never read where the copy engine loads the tiles
    if not TMA:
        k_ptrs = K + b * stride_kb + kh * stride_kh + offs_n[None, :] * stride_kn + offs_d[:, None] * stride_kd
        v_ptrs = V + b * stride_vb + kh * stride_vh + offs_n[:, None] * stride_vn + offs_d[None, :] * stride_vd
    kv_head = b * (heads // group) + kh
    q_scale, k_scales, shift = softmax_scale, KScale, 0.0
    if INT8:
        if WITH_LSE:  # K comes without its mean, which lowered all scores of a row by the same
            mean = tl.load(KMean + kv_head * DPAD + offs_d)
            shift = tl.sum(q.to(tl.float32) * mean[None, :], 1) * softmax_scale
        q, q_scale = _quantise_rows(q, softmax_scale)
        k_scales = KScale + kv_head * tl.cdiv(k_len, MASK_K)
    row, count, threshold = Indices, 0, 0.0
    if SPARSE:
        block = first_row // MASK_Q
        row = Indices + b * stride_ib + h * stride_ih + tl.cast(block, tl.int64) * stride_in
        count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    if SKIP:
        threshold = tl.load(Threshold + h)
    if CAUSAL or RAGGED:
        begin, full_begin, full_end, end = _runs(
            row, count, first_row, q_len, k_len, window, BLOCK_M, MASK_K, SPARSE, CAUSAL, WINDOW
        )
    else:
        begin, full_begin, end = 0, 0, count if SPARSE else k_len // MASK_K
        full_end = end
    acc = tl.zeros([BLOCK_M, DPAD], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    limit = rows + (k_len - q_len)
    for run in tl.static_range(0 if WINDOW else 1, 3 if CAUSAL or RAGGED else 2):
        lo = begin if run == 0 else (full_begin if run == 1 else full_end)
        hi = full_begin if run == 0 else (full_end if run == 1 else end)
        acc, total, peak = _walk(
            acc, total, peak, q, q_scale, K, V, b.to(tl.int32), kh.to(tl.int32), k_ptrs, v_ptrs, stride_kn, stride_vn,
            row, k_scales, KeyValid + b * stride_valid_b, stride_valid_n, TileValid + b * tiles_n, limit, inside,
            threshold, lo, hi, k_len, window,
            QK_D, V_D, DPAD, BLOCK_N, MASK_K, SPARSE, CAUSAL, WINDOW, PADDING, INT8, FP8, SKIP, TMA, run != 1,
            INTERPRET,
        )  # fmt: skip
    if WITH_LSE:
        log2_total = tl.log2(total) + (-8.0 if FP8 else 0.0)
        lse = tl.where(total > 0, (peak + log2_total + shift) * 0.6931471805599453, float("-inf"))
        tl.store(Lse + head * q_len + rows, lse, mask=inside)
    if FP8:
        acc = acc * tl.load(VScale + kv_head * DPAD + offs_d)[None, :]
    o_first = Out + b * stride_ob + h * stride_oh + far * stride_on
    o_at = o_first + offs_m[:, None] * stride_on + offs_d[None, :] * stride_od
    tl.store(o_at, _finish(acc, total, Out.dtype.element_ty, INTERPRET), mask=inside[:, None] & (offs_d < D)[None, :])
