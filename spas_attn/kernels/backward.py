"""Block-sparse attention, backward: gradients of q by query tiles, those of k and v by key tiles (FlashAttention-2).

Scores are computed again from q and k, and the log-sum-exp of the forward pass makes them probabilities P. With D the
row sums of dO · O (arXiv 2205.14135, less the gradient of the log-sum-exp where there is one):

    dS = P · (dO Vᵀ − D),    dQ = scale · dS K,    dK = scale · dSᵀ Q,    dV = Pᵀ dO.

One kernel walks the kept key blocks of a query tile, as the forward kernel does, another the query blocks that keep a
key block (transpose.py). Nothing is added up by atomics: the same call gives the same bits. Names are those of
forward.py; a ``t`` at the end of a name says that keys are the rows of the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import dot, narrow
from .forward import first_key, runs
from .tiles import hide, hide_padding, load_k, load_v
from .transpose import HEAD_SHIFT, QUERY_BLOCK


@triton.jit
def delta_kernel(
    o, do, lse, dlse, delta, log2_sum, heads, q_len, padded,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row sums of dO · O less ``dlse``, and the log-sum-exp in base 2, float32 [B, Hq, padded].

    Of rows that see nothing, and of those behind the last query, the log-sum-exp is +inf: their P is 0 everywhere.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.cast(tl.program_id(1), tl.int64)
    b, h = head // heads, head % heads
    inside, offs_d = rows < q_len, tl.arange(0, DPAD)
    at, within = tl.cast(rows, tl.int64)[:, None], inside[:, None] & (offs_d < D)[None, :]
    p_o = o.data + b * o.stride_b + h * o.stride_h + at * o.stride_n + offs_d[None, :] * o.stride_d
    p_do = do.data + b * do.stride_b + h * do.stride_h + at * do.stride_n + offs_d[None, :] * do.stride_d
    b_o = tl.load(p_o, mask=within, other=0).to(tl.float32)  # [BLOCK, DPAD]
    b_do = tl.load(p_do, mask=within, other=0).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + head * q_len + rows, mask=inside, other=0)
    b_lse = tl.load(lse + head * q_len + rows, mask=inside, other=float("-inf"))
    seen, stored = b_lse > float("-inf"), rows < padded
    tl.store(delta + head * padded + rows, tl.where(seen, b_delta, 0.0), mask=stored)
    tl.store(log2_sum + head * padded + rows, tl.where(seen, b_lse * 1.4426950408889634, float("inf")), mask=stored)


@triton.jit
def dq_kernel(
    q, k, v, do, dq, k_desc, v_desc, log2_sum, delta, blocks, valid, tile_valid,
    heads, group, together, q_len, padded, k_len, window, softmax_scale, scale,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M queries of one head; arguments as of the forward kernel, and one function for its reason.

    Args:
        do, dq: Rows [B, Hq, Lq, D], gradients of the output and of q.
        log2_sum, delta: float32 [B, Hq, padded], as delta_kernel makes them.
        scale: factor on q·k; softmax_scale has log2(e) in it.
    """
    PARTS: tl.constexpr = MASK_K // BLOCK_N
    EDGES: tl.constexpr = CAUSAL or RAGGED
    group_size = tl.cdiv(q_len, BLOCK_M) * together
    place = tl.program_id(0) % group_size
    tile, head = place // together, tl.program_id(0) // group_size * together + place % together
    if CAUSAL:
        tile = tl.cdiv(q_len, BLOCK_M) - 1 - tile  # the longest rows first
    sequence = head // heads
    k_head = (head - sequence * heads) // group
    head, b, kh = tl.cast(head, tl.int64), tl.cast(sequence, tl.int64), tl.cast(k_head, tl.int64)
    h, first_row = head - b * heads, tile * BLOCK_M
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DPAD)
    rows, far = first_row + offs_m, tl.cast(first_row, tl.int64)
    last_key = rows + (k_len - q_len)  # [BLOCK_M]

    within = (rows < q_len)[:, None] & (offs_d < D)[None, :]
    p_q = q.data + b * q.stride_b + h * q.stride_h + far * q.stride_n
    b_q = tl.load(p_q + offs_m[:, None] * q.stride_n + offs_d[None, :] * q.stride_d, mask=within, other=0)
    p_do = do.data + b * do.stride_b + h * do.stride_h + far * do.stride_n
    b_do = tl.load(p_do + offs_m[:, None] * do.stride_n + offs_d[None, :] * do.stride_d, mask=within, other=0)
    b_sum = tl.load(log2_sum + head * padded + rows)  # [BLOCK_M]
    b_delta = tl.load(delta + head * padded + rows)
    p_k, p_v = None, None
    if k_desc is None:  # both transposed, [DPAD, BLOCK_N]
        p_k = k.data + b * k.stride_b + kh * k.stride_h + offs_n[None, :] * k.stride_n + offs_d[:, None] * k.stride_d
        p_v = v.data + b * v.stride_b + kh * v.stride_h + offs_n[None, :] * v.stride_n + offs_d[:, None] * v.stride_d
    block = first_row // MASK_Q
    p_indices = blocks.indices + b * blocks.stride_b + h * blocks.stride_h
    p_indices += tl.cast(block, tl.int64) * blocks.stride_q
    count = tl.load(blocks.counts + b * blocks.counts_b + h * blocks.counts_h + block)
    if valid is not None:
        p_valid = valid.data + b * valid.stride_b
        p_tiles = tile_valid + b * tl.cdiv(k_len, BLOCK_N)
    bounds = runs(p_indices, count, first_row, q_len, k_len, window, BLOCK_M, MASK_K, CAUSAL, RAGGED)

    acc = tl.zeros([BLOCK_M, DPAD], tl.float32)
    begin, full_begin, full_end, end = bounds[0] * PARTS, bounds[1] * PARTS, bounds[2] * PARTS, bounds[3] * PARTS
    for part in tl.range(begin, end):
        start = tl.load(p_indices + part // PARTS) * MASK_K + (part % PARTS) * BLOCK_N
        b_k = load_k(k, k_desc, p_k, sequence, k_head, start, k_len, D, DPAD, BLOCK_N, EDGES)  # [DPAD, BLOCK_N]
        b_s = dot(b_q, b_k, None) * softmax_scale
        if EDGES:
            if (part < full_begin) | (part >= full_end):
                cols = first_key(p_indices, part, end, MASK_K, BLOCK_N) + offs_n
                b_s = hide(b_s, cols, last_key, k_len, window, CAUSAL)
        if valid is not None:
            b_s = hide_padding(b_s, start + offs_n, k_len, p_valid, valid.stride_n, p_tiles + start // BLOCK_N)
        b_p = tl.exp2(b_s - b_sum[:, None])  # [BLOCK_M, BLOCK_N]
        b_v = load_k(v, v_desc, p_v, sequence, k_head, start, k_len, D, DPAD, BLOCK_N, EDGES)  # [DPAD, BLOCK_N]
        b_ds = b_p * (dot(b_do, b_v, None) - b_delta[:, None])
        acc = dot(narrow(b_ds, b_k.dtype), tl.trans(b_k), acc)

    p_dq = dq.data + b * dq.stride_b + h * dq.stride_h + far * dq.stride_n
    p_dq += offs_m[:, None] * dq.stride_n + offs_d[None, :] * dq.stride_d
    tl.store(p_dq, narrow(acc * scale, dq.data.dtype.element_ty), mask=within)


@triton.jit
def dkv_kernel(
    q, k, v, do, dk, dv, sums, q_desc, do_desc, log2_sum, delta, lists, chunks, valid,
    heads, group, list_heads, slots, nq, q_len, padded, k_len, window, softmax_scale, scale,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one KV head, or one chunk's share of them; one function, as dq_kernel.

    The first programs compute chunks, if they are in use, the others the tiles that are not cut. With keys as the rows
    of its tiles, P and dS are the first operands of their products and never leave the registers.

    Args:
        q, do: Rows [B, Hq, Lq, D], given even where descriptors stand for them.
        k, v, dk, dv: Rows [B, Hkv, Lk, D].
        sums: float32 [slots, MASK_K // BLOCK_N, 2, BLOCK_N, DPAD], what chunks give.
        q_desc, do_desc: descriptors of tiles [1, 1, BLOCK_M, DPAD], or None.
        lists, chunks: QueryLists and Chunks.
        list_heads: heads of ``lists``.
    """
    SPLIT: tl.constexpr = MASK_K // BLOCK_N
    PARTS: tl.constexpr = MASK_Q // BLOCK_M
    item, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    chunk, tile = 0, item - slots
    if item < slots:
        tile = tl.load(chunks.owner + item)
        if tile < 0:
            return
        chunk = item - tl.load(chunks.first + tile)
    number = tl.load(chunks.number + tile)
    if (item >= slots) & (number > 1):
        return
    nk = tl.cdiv(k_len, MASK_K)
    k_heads = heads // group
    j, k_head, sequence = tile % nk, tile // nk % k_heads, tile // (nk * k_heads)
    b, kh = tl.cast(sequence, tl.int64), tl.cast(k_head, tl.int64)
    start = j * MASK_K + split * BLOCK_N
    offs_m, offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, DPAD)
    keys, far = start + offs_n, tl.cast(start, tl.int64)

    within = (keys < k_len)[:, None] & (offs_d < D)[None, :]
    p_k = k.data + b * k.stride_b + kh * k.stride_h + far * k.stride_n
    b_k = tl.load(p_k + offs_n[:, None] * k.stride_n + offs_d[None, :] * k.stride_d, mask=within, other=0)
    p_v = v.data + b * v.stride_b + kh * v.stride_h + far * v.stride_n
    b_v = tl.load(p_v + offs_n[:, None] * v.stride_n + offs_d[None, :] * v.stride_d, mask=within, other=0)
    p_q, p_do = None, None
    if q_desc is None:
        p_q = q.data + b * q.stride_b + offs_m[:, None] * q.stride_n + offs_d[None, :] * q.stride_d
        p_do = do.data + b * do.stride_b + offs_m[:, None] * do.stride_n + offs_d[None, :] * do.stride_d
    row = b * nk * list_heads + j
    if list_heads > 1:
        row += kh * nk
    p_entries, count = lists.entries + row * group * nq, tl.load(lists.counts + row)
    masked = tl.load(lists.partial + row) * PARTS

    b_dk = tl.zeros([BLOCK_N, DPAD], tl.float32)
    b_dv = tl.zeros([BLOCK_N, DPAD], tl.float32)
    end = (chunk + 1) * count // number * PARTS
    for part in tl.range(chunk * count // number * PARTS, end):
        entry = tl.load(p_entries + part // PARTS)
        h = k_head * group + (entry >> HEAD_SHIFT)
        first_row = (entry & QUERY_BLOCK) * MASK_Q + (part % PARTS) * BLOCK_M
        p_head = None if p_q is None else p_q + tl.cast(h, tl.int64) * q.stride_h
        b_q = load_v(q, q_desc, p_head, sequence, h, first_row, q_len, D, DPAD, BLOCK_M, False, True)
        at = (b * heads + h) * padded + first_row + offs_m  # [BLOCK_M]
        b_sum, b_delta = tl.load(log2_sum + at), tl.load(delta + at)
        b_st = dot(b_k, tl.trans(b_q), None) * softmax_scale  # [BLOCK_N, BLOCK_M]
        if CAUSAL:
            if part < masked:
                again = tl.load(p_entries + part // PARTS, mask=part < end, other=0)  # as first_key does
                rows = (again & QUERY_BLOCK) * MASK_Q + (part % PARTS) * BLOCK_M + offs_m
                last_key = rows + (k_len - q_len)
                seen = keys[:, None] <= last_key[None, :]
                if window is not None:
                    seen &= keys[:, None] > last_key[None, :] - window
                b_st = tl.where(seen, b_st, float("-inf"))
        b_pt = tl.exp2(b_st - b_sum[None, :])  # [BLOCK_N, BLOCK_M]
        p_head = None if p_do is None else p_do + tl.cast(h, tl.int64) * do.stride_h
        b_do = load_v(do, do_desc, p_head, sequence, h, first_row, q_len, D, DPAD, BLOCK_M, False, True)
        b_dv = dot(narrow(b_pt, b_do.dtype), b_do, b_dv)
        b_dst = b_pt * (dot(b_v, tl.trans(b_do), None) - b_delta[None, :])
        b_dk = dot(narrow(b_dst, b_q.dtype), b_q, b_dk)

    if valid is not None:  # a key's gradients are its own: padded keys had none to give
        taken = tl.load(valid.data + b * valid.stride_b + keys * valid.stride_n, mask=keys < k_len, other=0) != 0
        b_dk, b_dv = tl.where(taken[:, None], b_dk, 0.0), tl.where(taken[:, None], b_dv, 0.0)
    if number > 1:
        p_sums = sums + (tl.cast(item, tl.int64) * SPLIT + split) * (2 * BLOCK_N * DPAD)
        p_sums += offs_n[:, None] * DPAD + offs_d[None, :]
        tl.store(p_sums, b_dk)
        tl.store(p_sums + BLOCK_N * DPAD, b_dv)
    else:
        _store(dk, dv, b_dk * scale, b_dv, b, kh, far, within)


@triton.jit
def _store(dk, dv, b_dk, b_dv, b, kh, far, within):
    """Write the gradients of keys and values from row ``far`` on, [BLOCK_N, DPAD]."""
    offs_n, offs_d = tl.arange(0, b_dk.shape[0])[:, None], tl.arange(0, b_dk.shape[1])[None, :]
    p_dk = dk.data + b * dk.stride_b + kh * dk.stride_h + far * dk.stride_n
    p_dv = dv.data + b * dv.stride_b + kh * dv.stride_h + far * dv.stride_n
    dtype: tl.constexpr = dk.data.dtype.element_ty
    tl.store(p_dk + offs_n * dk.stride_n + offs_d * dk.stride_d, narrow(b_dk, dtype), mask=within)
    tl.store(p_dv + offs_n * dv.stride_n + offs_d * dv.stride_d, narrow(b_dv, dtype), mask=within)


@triton.jit
def sum_kernel(
    dk, dv, sums, chunks, k_heads, k_len, scale,
    D: tl.constexpr, DPAD: tl.constexpr, BLOCK_N: tl.constexpr, MASK_K: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of a tile that was cut, one after the other."""
    SPLIT: tl.constexpr = MASK_K // BLOCK_N
    tile, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    number = tl.load(chunks.number + tile)
    if number == 1:
        return
    nk = tl.cdiv(k_len, MASK_K)
    start = tile % nk * MASK_K + split * BLOCK_N
    offs_n, offs_d = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, DPAD)[None, :]
    p_sums = sums + (tl.cast(tl.load(chunks.first + tile), tl.int64) * SPLIT + split) * (2 * BLOCK_N * DPAD)
    p_sums += offs_n * DPAD + offs_d
    b_dk = tl.zeros([BLOCK_N, DPAD], tl.float32)
    b_dv = tl.zeros([BLOCK_N, DPAD], tl.float32)
    for _ in range(number):
        b_dk += tl.load(p_sums)
        b_dv += tl.load(p_sums + BLOCK_N * DPAD)
        p_sums += SPLIT * 2 * BLOCK_N * DPAD
    b, kh = tl.cast(tile // (nk * k_heads), tl.int64), tl.cast(tile // nk % k_heads, tl.int64)
    within = (start + offs_n < k_len) & (offs_d < D)
    _store(dk, dv, b_dk * scale, b_dv, b, kh, tl.cast(start, tl.int64), within)
