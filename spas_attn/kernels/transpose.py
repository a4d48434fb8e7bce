"""A block mask seen from the keys: which query blocks keep each key block, and how long lists are shared out.

A key block of a KV head is walked by one program over the query blocks of all heads of the group, listed in one row. In
some masks a few key blocks are kept by far more query blocks than the others (an attention sink by all of them); their
rows are cut into chunks, whose partial sums are added up in a fixed order, so that the result is deterministic and no
program is much longer than the rest. All of it happens on the device: nothing is read on the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import BlockMask
from .operands import Blocks
from .recorded import launch

# An entry is a query block, and from bit 20 on the number of the head within its group.
HEAD_SHIFT, QUERY_BLOCK = tl.constexpr(20), tl.constexpr((1 << 20) - 1)
FULL, PARTIAL = tl.constexpr(1), tl.constexpr(2)  # every query of the block sees all of its keys, or not
_SHORT = 16  # entries below which no row is cut


class QueryLists(NamedTuple):
    """Who keeps each key block.

    Attributes:
        counts: int32 ``[B, Hkv or 1, nk]``, entries of each row.
        partial: int32, likewise, how many of them, the first ones, need a token mask.
        entries: int32 ``[B, Hkv or 1, nk, group · nq]``.
        heads: Hkv, or 1 where all heads share their lists.
    """

    counts: Tensor
    partial: Tensor
    entries: Tensor
    heads: int


class Chunks(NamedTuple):
    """Which rows are cut. A tile is a key block of a KV head, ``[B, Hkv, nk]``.

    Attributes:
        number: int32 ``[tiles]``, chunks of each row, 1 where it is not cut.
        first: int32 ``[tiles]``, the slot of the first chunk of a row that is cut.
        owner: int32 ``[slots]``, the tile of each chunk, -1 for unused slots.
        slots: how many chunks there can be.
    """

    number: Tensor
    first: Tensor
    owner: Tensor
    slots: int


@triton.jit
def scatter_kernel(
    kept, blocks, list_heads, group, nq, nk, q_len, k_len, window,
    MASK_Q: tl.constexpr, MASK_K: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of one row of a block mask, write FULL or PARTIAL for the visible blocks to ``kept`` [B, Hl, nk, group, nq]."""
    i = tl.program_id(0) % nq
    head = tl.program_id(0) // nq  # of those whose lists differ
    b, h = tl.cast(head // (list_heads * group), tl.int64), tl.cast(head % (list_heads * group), tl.int64)
    p_indices = blocks.indices + b * blocks.stride_b + h * blocks.stride_h + tl.cast(i, tl.int64) * blocks.stride_q
    count = tl.load(blocks.counts + b * blocks.counts_b + h * blocks.counts_h + i)
    first_row = i * MASK_Q + (k_len - q_len)  # in positions of keys
    last_row = tl.minimum(i * MASK_Q + MASK_Q, q_len) - 1 + (k_len - q_len)
    p_row = kept + ((b * list_heads + h // group) * nk * group + h % group) * nq + i
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)  # [CHUNK]
        seen = at < count
        j = tl.load(p_indices + at, mask=seen, other=0)
        full = seen
        if CAUSAL:
            seen &= j * MASK_K <= last_row
            full = (j + 1) * MASK_K - 1 <= first_row
            if window is not None:
                seen &= (j + 1) * MASK_K - 1 > first_row - window
                full &= j * MASK_K > last_row - window
        tl.store(p_row + tl.cast(j, tl.int64) * group * nq, tl.where(full, FULL, PARTIAL).to(tl.uint8), mask=seen)


@triton.jit
def list_kernel(kept, counts, partial, entries, nq, width, CHUNK: tl.constexpr):
    """The entries of one key block, partial ones first, both by head and query block."""
    row = tl.cast(tl.program_id(0), tl.int64)
    found = 0
    for kind in tl.static_range(PARTIAL, 0, -1):
        for start in range(0, width, CHUNK):
            at = start + tl.arange(0, CHUNK)  # [CHUNK]
            hit = tl.load(kept + row * width + at, mask=at < width, other=0) == kind
            place = found + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(entries + row * width + place, ((at // nq) << HEAD_SHIFT) | (at % nq), mask=hit)
            found += tl.sum(hit.to(tl.int32), 0)
        if kind == PARTIAL:
            tl.store(partial + row, found)
    tl.store(counts + row, found)


@triton.jit
def chunk_kernel(
    counts, number, first, owner, tiles, per_sequence, nk, list_heads, slots, SHORT: tl.constexpr, CHUNK: tl.constexpr
):
    """Cut rows that are longer than twice the mean into equal chunks, while there are slots; one program."""
    total = tl.zeros([CHUNK], tl.int64)
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)  # [CHUNK]
        total += _count(counts, tile, tiles, per_sequence, nk, list_heads)
    longest = tl.maximum(tl.cdiv(2 * tl.sum(total, 0), tiles), SHORT).to(tl.int32)
    before, used = 0, 0
    for start in range(0, tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        count = _count(counts, tile, tiles, per_sequence, nk, list_heads)
        wanted = tl.where(count > longest, tl.cdiv(count, longest), 0)
        end = before + tl.cumsum(wanted, 0)
        given = tl.where(end <= slots, wanted, 0)
        tl.store(number + tile, tl.maximum(given, 1), mask=tile < tiles)
        tl.store(first + tile, end - wanted, mask=tile < tiles)
        for chunk in range(tl.max(given, 0)):
            tl.store(owner + end - wanted + chunk, tile, mask=chunk < given)
        before += tl.sum(wanted, 0)
        used = tl.maximum(used, tl.max(tl.where(given > 0, end, 0), 0))
    for start in range(0, slots, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        tl.store(owner + slot, -1, mask=(slot >= used) & (slot < slots))


@triton.jit
def _count(counts, tile, tiles, per_sequence, nk, list_heads):
    """Entries of tiles [..], 0 beyond the last one."""
    row = tile // per_sequence * nk + tile % nk
    if list_heads > 1:  # then there are as many as KV heads
        row = tile
    return tl.load(counts + row, mask=tile < tiles, other=0)


def query_lists(mask: BlockMask, blocks: Blocks, k_heads: int, is_causal: bool, window: int | None) -> QueryLists:
    """The lists of a mask from the keys' side; blocks that no query sees are left out.

    Args:
        mask: of ``[B, Hq]``; where its lists are one list expanded over the heads, so are the result's.
        blocks: its lists as kernels take them.
        k_heads: Hkv, a divisor of Hq.
        is_causal: lower-right aligned.
        window: with causality, a query sees its last ``window`` keys.
    """
    (batch, heads, nq, nk), device = mask.indices.shape, mask.indices.device
    shared = mask.indices.stride(1) == 0 and mask.counts.stride(1) == 0
    list_heads, group = 1 if shared else k_heads, heads // k_heads
    kept = torch.zeros(batch, list_heads, nk, group * nq, dtype=torch.uint8, device=device)
    counts = torch.empty(batch, list_heads, nk, dtype=torch.int32, device=device)
    partial = torch.empty_like(counts)
    entries = torch.empty(batch, list_heads, nk, group * nq, dtype=torch.int32, device=device)
    launch(
        scatter_kernel, (batch * list_heads * group * nq,), kept, blocks, list_heads, group, nq, nk,
        mask.q_len, mask.k_len, window, MASK_Q=mask.block_q, MASK_K=mask.block_k, CAUSAL=is_causal, CHUNK=128,
        num_warps=1,
    )  # fmt: skip
    width = min(1024, max(16, triton.next_power_of_2(group * nq)))
    launch(
        list_kernel, (batch * list_heads * nk,), kept, counts, partial, entries, nq, group * nq, CHUNK=width,
        num_warps=4,
    )  # fmt: skip
    return QueryLists(counts, partial, entries, list_heads)


def chunks(lists: QueryLists, k_heads: int, slots: int) -> Chunks:
    """Share out the rows of ``lists`` for Hkv heads; at most ``slots`` chunks."""
    batch, _, nk = lists.counts.shape
    tiles, device = batch * k_heads * nk, lists.counts.device
    number, first = (torch.empty(tiles, dtype=torch.int32, device=device) for _ in range(2))
    owner = torch.empty(slots, dtype=torch.int32, device=device)
    launch(
        chunk_kernel, (1,), lists.counts, number, first, owner, tiles, k_heads * nk, nk, lists.heads, slots,
        SHORT=_SHORT, CHUNK=min(1024, max(16, triton.next_power_of_2(tiles))), num_warps=4,
    )  # fmt: skip
    return Chunks(number, first, owner, slots)
