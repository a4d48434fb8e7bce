"""Packed sequences in one call: an aligned layout, in which every sequence starts at a whole block.

Nothing here reads a length on the host: the aligned length is the most that n sequences of that total can need, and
what is left over behind the last one is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STRETCH = 128  # every sequence starts at a multiple of this; the largest block of a mask


@dataclass(frozen=True)
class Layout:
    """Where the tokens of packed sequences stand when each sequence starts at a multiple of 128.

    Attributes:
        source: int64 ``[A]``, the token that stands in each row; gaps repeat the last token of their own sequence, so
            that nothing of another one gets near it.
        valid: bool ``[A]``, False in gaps.
        place: int64 ``[total]``, the row of each token.
        document_start: int32 ``[A / 128]``, the first row of the sequence that each stretch of 128 rows belongs to;
            stretches behind the last sequence are sequences of their own, without a token.
    """

    source: Tensor
    valid: Tensor
    place: Tensor
    document_start: Tensor


def aligned_length(total: int, sequences: int) -> int:
    """Rows of the aligned layout: the most that so many sequences can need."""
    return (total + (STRETCH - 1) * sequences) // STRETCH * STRETCH


def layout(cu_seqlens: Tensor, total: int) -> Layout:
    """The aligned layout of packed sequences.

    Args:
        cu_seqlens: ``[n + 1]``, on the device that is to hold the layout; rises from 0 to ``total``. Other values make
            a layout of the wrong tokens, never one outside the tensors.
        total: tokens in all.
    """
    ends = cu_seqlens.long()
    lengths = ends.diff()
    starts = _starts(lengths, STRETCH)  # [n + 1]; the last is where the padding behind begins
    rows = torch.arange(aligned_length(total, len(lengths)), device=ends.device)
    document = torch.searchsorted(starts, rows, right=True) - 1  # n behind the last sequence
    within = document < len(lengths)
    document = document.clamp(0, len(lengths) - 1)
    at = rows - starts[document]
    valid = within & (at < lengths[document])
    source = (ends[document] + torch.minimum(at, lengths[document] - 1)).clamp(0, total - 1)
    tokens = torch.arange(total, device=ends.device)
    owner = (torch.searchsorted(ends, tokens, right=True) - 1).clamp(0, len(lengths) - 1)
    place = (starts[owner] + tokens - ends[owner]).clamp(0, len(rows) - 1)
    first = torch.where(within, starts[document], rows)[::STRETCH]
    return Layout(source, valid, place, first.int())


class _Spread(torch.autograd.Function):
    """Tokens to rows of the layout; nothing depends on the gaps, which hold copies, so they have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(2, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(2, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Rows of the layout to tokens, each row at most once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = x.shape[2]
        return x.index_select(2, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        whole = grad.new_zeros(*grad.shape[:2], ctx.rows, grad.shape[3])
        return whole.index_copy_(2, place, grad), None


def spread(x: Tensor, layout: Layout) -> Tensor:
    """Tokens ``[1, H, total, D]`` as rows ``[1, H, A, D]`` of the layout.

    Gradients come back without the sums of ``index_select``'s own, which on a GPU are slow and in no fixed order.
    """
    rows: Tensor = (
        _Spread.apply(x, layout.source, layout.place) if x.requires_grad else x.index_select(2, layout.source)
    )
    return rows


def collect(x: Tensor, place: Tensor) -> Tensor:
    """Rows ``[1, H, A, D]`` as tokens ``[1, H, total, D]``; ``place`` as in :class:`Layout`."""
    tokens: Tensor = _Collect.apply(x, place) if x.requires_grad else x.index_select(2, place)
    return tokens


@dataclass(frozen=True)
class PackedRows:
    """The rows of a packed BlockMask of self-attention: query blocks of all sequences one after the other.

    Attributes:
        document: int64 ``[rows]``, the sequence of each row.
        block: int64 ``[rows]``, which query block of its sequence it is.
        length: int64 ``[rows]``, tokens of its sequence; 0 in spare rows behind the last sequence.
        aligned: int64 ``[rows]``, first token of its sequence in the aligned layout.
    """

    document: Tensor
    block: Tensor
    length: Tensor
    aligned: Tensor


def packed_rows(cu_seqlens: Tensor, rows: int, block_q: int) -> PackedRows:
    """What each of ``rows`` rows of a packed mask is, without reading ``cu_seqlens`` on the host."""
    lengths = cu_seqlens.long().diff()
    starts = _starts(lengths, block_q) // block_q
    row = torch.arange(rows, device=cu_seqlens.device)
    document = torch.searchsorted(starts, row, right=True) - 1
    within = document < len(lengths)
    document = document.clamp(0, len(lengths) - 1)
    aligned = _starts(lengths, STRETCH)[document]
    return PackedRows(document, row - starts[document], torch.where(within, lengths[document], 0), aligned)


def from_aligned(
    counts: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, blocks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Lists of an aligned mask as those of a packed one: rows one after the other, indices from each sequence's own
    first block.

    Args:
        counts, indices: ``[1, H, nq]`` and ``[1, H, nq, nk]`` of the aligned layout.
        cu_seqlens: ``[n + 1]`` on their device.
        total: tokens in all.
        blocks: (block_q, block_k).

    Returns:
        counts ``[1, H, rows]``, 0 in spare rows at the end, and indices ``[1, H, rows, nk]``.
    """
    block_q, block_k = blocks
    rows = packed_rows(cu_seqlens, (total + (block_q - 1) * (len(cu_seqlens) - 1)) // block_q, block_q)
    at = (rows.aligned // block_q + rows.block).clamp(0, counts.shape[2] - 1)
    kept = counts[:, :, at] * (rows.length > 0)
    return kept.int(), (indices[:, :, at] - (rows.aligned // block_k)[:, None].int()).clamp(min=0)


def to_aligned(
    counts: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, blocks: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The other way: lists of a packed mask of self-attention as those of the aligned layout."""
    block_q, block_k = blocks
    lengths = cu_seqlens.long().diff()
    length = aligned_length(total, len(lengths))
    starts, packed = _starts(lengths, STRETCH), _starts(lengths, block_q) // block_q
    first = torch.arange(0, length, block_q, device=cu_seqlens.device)  # first token of each aligned row
    document = torch.searchsorted(starts, first, right=True) - 1
    within = document < len(lengths)
    document = document.clamp(0, len(lengths) - 1)
    block = (first - starts[document]) // block_q
    within = within & (block * block_q < lengths[document])
    at = (packed[document] + block).clamp(0, counts.shape[2] - 1)
    nk, last = length // block_k, (length - 1) // block_k
    width = min(nk, indices.shape[-1])
    moved = (indices[:, :, at, :width] + (starts[document] // block_k)[:, None].int()).clamp(0, last)
    return (counts[:, :, at] * within).int(), torch.nn.functional.pad(moved, (0, nk - width)).contiguous()


def _starts(lengths: Tensor, size: int) -> Tensor:
    """Where sequences begin whose lengths are rounded up to ``size``, and where the last one ends; ``[n + 1]``."""
    whole = (lengths + size - 1) // size * size
    return torch.nn.functional.pad(whole.cumsum(0), (1, 0))
