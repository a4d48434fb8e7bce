"""Block-sparse attention, forward: one program per query tile walks the kept key blocks with an online softmax.

The key blocks of a query tile fall into runs (ascending, so PV skip sees keys in order): those that every row sees in
full, which need no token mask at all, and around them those at the causal diagonal, at the window's edge and at the
ragged end, which do. Key padding is tested by one scalar per tile.

Three precisions share the walk: both products in the inputs' own type; Q and K in int8 (SageAttention, arXiv
2410.02367), Q quantised per row when its tile is loaded; and P and V in fp8 besides (SageAttention2, arXiv 2411.10958).

Names: ``p_`` are pointers, ``b_`` tiles in registers or shared memory, ``offs_`` offsets within a tile. M counts
queries, N keys, and DPAD is the head dim padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, narrow, nearest_int8
from .tiles import hide, hide_padding, load_k, load_v


@triton.jit
def kept_before(p_indices, count, bound, CHUNK: tl.constexpr):
    """How many of the first ``count`` entries of an ascending list are below ``bound``."""
    before = 0
    for first in range(0, count, CHUNK):
        at = first + tl.arange(0, CHUNK)  # [CHUNK]
        index = tl.load(p_indices + at, mask=at < count, other=2147483647)
        before += tl.sum((index < bound).to(tl.int32), 0)
    return before


@triton.jit
def runs(
    p_indices, count, first_row, q_len, k_len, window,
    BLOCK_M: tl.constexpr, MASK_K: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Four ascending bounds in the list of key blocks: masked run, full run, masked run lie between them."""
    offset = k_len - q_len
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    begin, full_begin = 0, 0
    end, full_end = tl.cdiv(k_len, MASK_K), k_len // MASK_K
    if CAUSAL:
        end = (last_row + offset) // MASK_K + 1
        full_end = (first_row + offset + 1) // MASK_K
        if window is not None:
            begin = tl.maximum(first_row + offset - window + 1, 0) // MASK_K
            full_begin = tl.cdiv(tl.maximum(last_row + offset - window + 1, 0), MASK_K)
    if p_indices is not None:  # from numbers of blocks to places in the list of kept ones
        if window is not None:
            begin = kept_before(p_indices, count, begin, 128)
            full_begin = kept_before(p_indices, count, full_begin, 128)
        if CAUSAL or RAGGED:
            full_end = kept_before(p_indices, count, full_end, 128)
        if CAUSAL:
            end = kept_before(p_indices, count, end, 128)
        else:
            end = count
    if CAUSAL or RAGGED:
        full_begin = tl.minimum(full_begin, end)
        full_end = tl.minimum(tl.maximum(full_begin, full_end), end)
    else:
        full_end = end
    return begin, full_begin, full_end, end


@triton.jit
def first_key(p_indices, part, end, MASK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key of a tile, read once more: a second use of an index keeps Triton from loading it ahead."""
    PARTS: tl.constexpr = MASK_K // BLOCK_N
    start = part * BLOCK_N
    if p_indices is not None:
        start = tl.load(p_indices + part // PARTS, mask=part < end, other=0) * MASK_K + (part % PARTS) * BLOCK_N
    return start


@triton.jit
def _scores(b_q, b_k, q_scale, p_k_scale, block, INT8: tl.constexpr):
    """Products of a tile, [BLOCK_M, BLOCK_N], of int8 ``SHIFT`` too high, and the factor that makes them scores."""
    scale = q_scale
    if INT8:
        b_s = (tl.dot(b_q, b_k, out_dtype=tl.int32) + 0x4B400000).to(tl.float32, bitcast=True)
        # Beyond the cap, where an integer's step is half a power of two, the subtrahend could not be rounded.
        scale = tl.minimum(q_scale * tl.load(p_k_scale + block), 0.5)  # [BLOCK_M]
    else:
        b_s = dot(b_q, b_k, None)
    return b_s, scale


@triton.jit
def _largest(b_s, scale, SHIFT: tl.constexpr, INT8: tl.constexpr):
    """The largest score of every row, [BLOCK_M]."""
    peak = (tl.max(b_s, 1) - SHIFT) * scale
    if not INT8:
        # Rounded up, so that no multiply-add of a huge score comes out above 0 and its exponential overflows.
        peak = tl.maximum(peak * (1 + 2.0**-23), peak * (1 - 2.0**-23))
    return peak


@triton.jit
def _log2_and_reciprocal(scale):
    """Of a power of two, from its bits."""
    bits = scale.to(tl.int32, bitcast=True)
    return ((bits >> 23) - 127).to(tl.float32), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _comes_near(tile_peak, peak, inside, pv_threshold):
    """PV skip: whether a tile's largest score comes within the threshold of the largest so far, in any row."""
    behind = tl.where(inside & (tile_peak > float("-inf")), tile_peak - peak, float("-inf"))  # [BLOCK_M]
    return tl.max(behind, 0) + pv_threshold > 0


@triton.jit
def _weights(b_s, scale, anchor, SHIFT: tl.constexpr, INT8: tl.constexpr):
    """exp2 of the scores less ``anchor`` [BLOCK_M], [BLOCK_M, BLOCK_N]."""
    if INT8:
        return tl.exp2(b_s * scale[:, None] - (SHIFT * scale + anchor)[:, None])
    else:
        return tl.exp2(b_s * scale - anchor[:, None])


@triton.jit
def _product(b_p, b_v, acc, FP8: tl.constexpr):
    """acc + b_p @ b_v."""
    b_p = narrow(b_p, b_v.dtype)
    if FP8:
        # In this order of the keys (prepare.py stores V in it) a thread's scores are what it feeds to the next product.
        M: tl.constexpr = b_p.shape[0]
        N: tl.constexpr = b_p.shape[1]
        b_p = b_p.reshape(M, N // 32, 2, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(M, N)
    return dot(b_p, b_v, acc)


@triton.jit
def _quantise_rows(b_q, softmax_scale):
    """int8 of each row [BLOCK_M, DPAD] and its scale [BLOCK_M], softmax factor included."""
    b_q = b_q.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(b_q), 1), 1e-12) / 127.0
    return nearest_int8(b_q / scale[:, None]), scale * softmax_scale


@triton.jit
def _finish(acc, total, dtype: tl.constexpr):
    """The output rows [BLOCK_M, DPAD]; 0 where nothing was seen."""
    out = tl.where(total[:, None] > 0, acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    if dtype == tl.float16:
        # P is rounded, its sum is not: a mean of values near the end of the range may come out just above it.
        out = tl.where(tl.abs(out) < float("inf"), tl.minimum(tl.maximum(out, -65504.0), 65504.0), out)
    return narrow(out, dtype)


@triton.jit
def sparse_attention_fwd_kernel(
    q, k, v, o, lse, k_desc, v_desc, k_scale, k_mean, v_scale, blocks, valid, tile_valid, pv_threshold,
    heads, group, together, q_len, k_len, window, softmax_scale,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries of one head; one function, because its parts would share nearly every name here.

    Args:
        q, o: Rows [B, Hq, Lq, D]; in int8 q is padded to DPAD where D is no multiple of 16.
        k, v: Rows [B, Hkv, Lk, D], in int8 [.., DPAD], v in fp8 as well; None where descriptors stand for them.
        k_desc, v_desc: descriptors of tiles [1, 1, BLOCK_N, DPAD], of fp8 v [1, 1, DPAD, BLOCK_N]; or None.
        k_scale, v_scale: float32 [B, Hkv, key blocks]; None: no int8 and no fp8.
        k_mean: float32 [B, Hkv, DPAD], what int8 keys come without; needed for lse only.
        lse: float32 [B, Hq, Lq], or None.
        blocks: Blocks to compute, None for all.
        valid, tile_valid: key padding, and uint8 [B, key tiles]: 1 where a tile has none; or None.
        pv_threshold: float32 [Hq], or None.
        together: heads whose tiles run side by side, a divisor of heads.
        window: keys that a query sees under causality, or None.
        softmax_scale: factor on q·k, log2(e) included.
        MASK_Q, MASK_K: blocks of the mask, multiples of BLOCK_M and BLOCK_N; without a mask equal to them.
        RAGGED: k_len is no multiple of MASK_K.
    """
    INT8: tl.constexpr = k_scale is not None
    FP8: tl.constexpr = v_scale is not None
    Q_DIM: tl.constexpr = DPAD if INT8 and D % 16 != 0 else D
    K_DIM: tl.constexpr = DPAD if INT8 else D
    V_DIM: tl.constexpr = DPAD if FP8 else D
    PARTS: tl.constexpr = MASK_K // BLOCK_N
    EDGES: tl.constexpr = CAUSAL or RAGGED  # some tiles are seen in part
    # int32 -> float32 runs at a quarter of the rate of an addition. Adding the bits of 1.5 * 2^23 instead gives that
    # number plus the score, exact below 2^22 (127 * 127 * 256 is); the softmax's subtrahend takes it away again.
    SHIFT: tl.constexpr = 12582912.0 if INT8 else 0.0

    tiles_n = tl.cdiv(k_len, BLOCK_N)
    group_size = tl.cdiv(q_len, BLOCK_M) * together
    heads_before = tl.program_id(0) // group_size * together
    place = tl.program_id(0) % group_size
    tile, head = place // together, heads_before + place % together
    if CAUSAL:
        tile = tl.cdiv(q_len, BLOCK_M) - 1 - tile  # the longest rows first
    sequence = head // heads
    k_head = (head - sequence * heads) // group
    head, b, kh = tl.cast(head, tl.int64), tl.cast(sequence, tl.int64), tl.cast(k_head, tl.int64)
    h, kv_head = head - b * heads, b * (heads // group) + kh
    first_row = tile * BLOCK_M
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DPAD)
    rows = first_row + offs_m  # [BLOCK_M]
    inside, far = rows < q_len, tl.cast(first_row, tl.int64)
    last_key = rows + (k_len - q_len)  # [BLOCK_M]

    p_q = q.data + b * q.stride_b + h * q.stride_h + far * q.stride_n
    p_q += offs_m[:, None] * q.stride_n + offs_d[None, :] * q.stride_d
    b_q = tl.load(p_q, mask=inside[:, None] & (offs_d < Q_DIM)[None, :], other=0)  # [BLOCK_M, DPAD]
    p_k, p_v = None, None
    if k_desc is None:
        p_k = k.data + b * k.stride_b + kh * k.stride_h + offs_n[None, :] * k.stride_n + offs_d[:, None] * k.stride_d
        p_v = v.data + b * v.stride_b + kh * v.stride_h + offs_n[:, None] * v.stride_n + offs_d[None, :] * v.stride_d
    q_scale, shift, p_k_scale, p_v_scale = softmax_scale, 0.0, k_scale, v_scale
    if INT8:
        if k_mean is not None:  # it lowered all scores of a row by the same
            b_mean = tl.load(k_mean + kv_head * DPAD + offs_d)  # [DPAD]
            shift = tl.sum(b_q.to(tl.float32) * b_mean[None, :], 1) * softmax_scale  # [BLOCK_M]
        b_q, q_scale = _quantise_rows(b_q, softmax_scale)
        p_k_scale = k_scale + kv_head * tl.cdiv(k_len, MASK_K)
    if FP8:
        p_v_scale = v_scale + kv_head * tl.cdiv(k_len, MASK_K)
    p_indices, count = None, 0
    if blocks is not None:
        block = first_row // MASK_Q
        p_indices = blocks.indices + b * blocks.stride_b + h * blocks.stride_h
        p_indices += tl.cast(block, tl.int64) * blocks.stride_q
        count = tl.load(blocks.counts + b * blocks.counts_b + h * blocks.counts_h + block)
    if valid is not None:
        p_valid = valid.data + b * valid.stride_b
        p_tiles = tile_valid + b * tiles_n
    if pv_threshold is not None:
        threshold = tl.load(pv_threshold + h)
    bounds = runs(p_indices, count, first_row, q_len, k_len, window, BLOCK_M, MASK_K, CAUSAL, RAGGED)

    acc = tl.zeros([BLOCK_M, DPAD], tl.float32)  # weighted sum of values
    total = tl.zeros([BLOCK_M], tl.float32)  # sum of the weights
    # Largest so far of the exponents, in base 2: scores, in fp8 plus the logarithm of the scale of their values.
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    score_peak = peak  # the same of the scores alone, by which PV skip judges
    begin, full_begin, full_end, end = bounds[0] * PARTS, bounds[1] * PARTS, bounds[2] * PARTS, bounds[3] * PARTS
    for part in tl.range(begin, end):
        start = part * BLOCK_N
        if blocks is not None:
            start = tl.load(p_indices + part // PARTS) * MASK_K + (part % PARTS) * BLOCK_N
        b_k = load_k(k, k_desc, p_k, sequence, k_head, start, k_len, K_DIM, DPAD, BLOCK_N, EDGES)
        b_s, scale = _scores(b_q, b_k, q_scale, p_k_scale, start // MASK_K, INT8)
        if EDGES:
            if (part < full_begin) | (part >= full_end):
                b_s = hide(
                    b_s, first_key(p_indices, part, end, MASK_K, BLOCK_N) + offs_n, last_key, k_len, window, CAUSAL
                )
        if valid is not None:
            b_s = hide_padding(b_s, start + offs_n, k_len, p_valid, valid.stride_n, p_tiles + start // BLOCK_N)
        tile_peak = _largest(b_s, scale, SHIFT, INT8)
        adds = True
        if pv_threshold is not None:
            score_peak = tl.maximum(score_peak, tile_peak)
            adds = _comes_near(tile_peak, score_peak, inside, threshold)
        lift, unit = 0.0, 1.0
        if FP8:
            lift, unit = _log2_and_reciprocal(tl.load(p_v_scale + start // MASK_K))
        new_peak = tl.maximum(peak, tile_peak + lift)
        if adds:
            b_v = load_v(v, v_desc, p_v, sequence, k_head, start, k_len, V_DIM, DPAD, BLOCK_N, FP8, EDGES)
            anchor = new_peak
            if EDGES or valid is not None:
                # Nothing seen yet: any finite anchor makes exp2(-inf - anchor) zero instead of NaN.
                anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            decay = tl.exp2(peak - anchor)
            if FP8:
                # P up to 2^8 instead of 1: fp8 ends at 448, and below 2^-6 it loses digits. The factor cancels.
                anchor -= 8.0
            # The weights carry the scale of their values, which their sum must not.
            b_p = _weights(b_s, scale, anchor - lift, SHIFT, INT8)  # [BLOCK_M, BLOCK_N]
            total = total * decay + tl.sum(b_p, 1) * unit
            acc = _product(b_p, b_v, acc * decay[:, None], FP8)
            peak = new_peak

    if lse is not None:
        log2_total = tl.log2(total) + (-8.0 if FP8 else 0.0)
        row_lse = tl.where(total > 0, (peak + log2_total + shift) * 0.6931471805599453, float("-inf"))
        tl.store(lse + head * q_len + rows, row_lse, mask=inside)
    p_o = o.data + b * o.stride_b + h * o.stride_h + far * o.stride_n
    p_o += offs_m[:, None] * o.stride_n + offs_d[None, :] * o.stride_d
    b_o = _finish(acc, total, o.data.dtype.element_ty)
    tl.store(p_o, b_o, mask=inside[:, None] & (offs_d < D)[None, :])
