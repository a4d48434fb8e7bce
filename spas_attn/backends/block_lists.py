"""Kept blocks apart: those that every query of the block sees whole, and those that need a mask of single tokens.

This is the form in which FlashAttention 4 and FlexAttention take a block mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import BlockMask, cdiv


@dataclass(frozen=True)
class BlockLists:
    """Kept, visible key blocks of every query block, full and partial ones apart, both ascending.

    Attributes:
        full_counts: int32 ``[B, Hq, nq]``.
        full_indices: int32 ``[B, Hq, nq, nk]``, full blocks first; the rest of a row is filler.
        partial_counts: int32 ``[B, Hq, nq]``.
        partial_indices: int32 ``[B, Hq, nq, w]``, filler (valid numbers) behind; w is the most there can be in a row.
    """

    full_counts: Tensor
    full_indices: Tensor
    partial_counts: Tensor
    partial_indices: Tensor


def split_blocks(mask: BlockMask, is_causal: bool) -> BlockLists:
    """Split every row of a mask; kept blocks that lie wholly above the causal diagonal are left out.

    A block is partial when the causal diagonal or the ragged end of the keys runs through it. Rows of the mask are
    ascending, so the full blocks are the front of a row and the partial ones follow: the full lists are the mask's own
    tensor with other counts. Nothing is read on the host.
    """
    counts, indices = mask.counts, mask.indices
    nq, nk = indices.shape[2:]
    listed = torch.arange(nk, device=counts.device) < counts[..., None]
    full_end: int | Tensor
    if is_causal:
        starts = torch.arange(nq, device=counts.device, dtype=torch.int32) * mask.block_q
        seen_by_all = (starts + (mask.k_len - mask.q_len + 1)).clamp(max=mask.k_len)  # keys that the first query sees
        seen_by_any = (starts + mask.block_q).clamp(max=mask.q_len) + (mask.k_len - mask.q_len)
        full_end = (seen_by_all // mask.block_k)[:, None]
        end = (seen_by_any + (mask.block_k - 1)) // mask.block_k
        visible = (listed & (indices < end[:, None])).sum(-1, dtype=torch.int32)
        width = cdiv(mask.block_q + mask.block_k - 2, mask.block_k)
    else:
        full_end, visible, width = mask.k_len // mask.block_k, counts, 1
    full = (listed & (indices < full_end)).sum(-1, dtype=torch.int32)
    width = max(1, min(width, nk))
    at = (full[..., None] + torch.arange(width, device=counts.device)).clamp(max=nk - 1)
    return BlockLists(full, indices, visible - full, indices.gather(-1, at))
