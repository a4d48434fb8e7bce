"""Pooled scores: how much softmax mass each query block is expected to put on each key block.

Shared by the selectors that score sub-blocks: by their means, or by anything else that one vector each describes
(:func:`fine_rows`; XAttention has strided ones). With sub-blocks of the block's own length the means are those of
SpargeAttn (arXiv 2502.18137); shorter ones see more of the structure inside a block, at (1/length)² of the cost of QKᵀ.
Everything is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_mask import blockwise, cdiv
from ..call import Call
from .base import Selector

_FINE_SCORES = 1 << 26  # fine scores held at a time; bounds the memory of long sequences


def check_pool(selector: Selector, length: int, name: str = "pool") -> None:
    """Reject a length of sub-blocks that does not divide both block sizes."""
    sizes = (selector.block_q, selector.block_k)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1 or any(size % length for size in sizes):
        raise ValueError(f"{name} must be a divisor of both block sizes {sizes}, got {length!r}")


def pooled_rows(selector: Selector, call: Call, length: int, *, second_order: bool = False) -> Tensor:
    """Scores of the means of sub-blocks of ``length`` tokens, summed per key block.

    With ``second_order`` a sub-block's score is log E exp(q·k) to second order, q·mean(k) + ½ Var(q·k), with the
    variance of the keys taken per channel: a mean alone underrates sub-blocks in which one key stands out.

    Returns:
        float32 ``[B, Hq, nq, rows, nk]``: per row of sub-block scores, the log of the exponentials summed in each key
        block (-inf where nothing is visible). Logs, because a filter may leave out the blocks that hold a row's
        maximum; sums relative to it would be rounded to nothing.
    """
    key_mask, scale = call.key_mask, call.scale
    k = smoothed_keys(call)
    fine_q, _ = block_means(call.q, length, None if call.document_start is None else call.key_mask)
    fine_k, filled = block_means(k, length, key_mask)
    if second_order:
        squares, _ = block_means(k.float().square(), length, key_mask)
        spread = (squares - fine_k.square()).clamp(min=0)
        fine_k = torch.cat([fine_k, 0.5 * scale * spread], -1)
        fine_q = torch.cat([fine_q, fine_q.square()], -1)
    return fine_rows(selector, call, fine_q, fine_k, filled, length, scale)


def fine_rows(
    selector: Selector, call: Call, fine_q: Tensor, fine_k: Tensor, filled: Tensor | None, length: int, scale: float
) -> Tensor:
    """Scores of sub-blocks of ``length`` tokens that one vector each describes, summed per key block.

    Under causality a query sub-block sees the key sub-blocks that begin at or before its last query and end within its
    query block.

    Args:
        selector: whose block sizes are meant.
        call: whose causality, window and lengths are meant.
        fine_q: ``[B, Hq, fine nq, E]``.
        fine_k: ``[B, Hkv, fine nk, E]``.
        filled: key sub-blocks that hold a visible key, bool ``[B, fine nk]``, or None for all.
        length: of a sub-block, in tokens.
        scale: factor on the product of the vectors.

    Returns:
        see :func:`pooled_rows`.
    """
    batch, heads = call.q.shape[:2]
    nq, nk = cdiv(call.q_len, selector.block_q), cdiv(call.k_len, selector.block_k)
    per_block = selector.block_q // length
    rows = call.q.new_full((batch, heads, nq * per_block, nk), -torch.inf, dtype=torch.float32)
    keys = fine_k.float().transpose(-1, -2)
    chunk = max(1, _FINE_SCORES // (batch * heads * fine_k.shape[2]))
    for start in range(0, fine_q.shape[2], chunk):
        part = fine_q[:, :, start : start + chunk]
        count = part.shape[2]
        with torch.autocast(call.q.device.type, enabled=False):
            scores = part.float().reshape(batch, -1, call.group * count, part.shape[-1]) @ keys
        scores = scores.view(batch, heads, count, -1) * scale
        seen = _fine_visible(selector, call, length, start, count)
        if filled is not None:
            seen = seen & filled[:, None, None]
        scores = scores.masked_fill_(~seen, -torch.inf)
        scores = blockwise(scores, selector.block_k // length, value=-torch.inf)
        rows[:, :, start : start + count] = scores.logsumexp(-1)
    return rows.unflatten(2, (nq, per_block))


def probabilities(rows: Tensor) -> Tensor:
    """Row softmax of :func:`pooled_rows`, 0 in rows that see nothing; the same shape. Overwrites ``rows``."""
    empty = (rows == -torch.inf).all(-1, keepdim=True)
    return rows.masked_fill_(empty, 0.0).softmax(-1).masked_fill_(empty, 0.0)


def mean_row(probs: Tensor) -> Tensor:
    """Mean over the rows of a query block that see something, ``[B, Hq, nq, nk]``."""
    return probs.sum(-2) / (probs.sum(-1) > 0).sum(-1, keepdim=True).clamp(min=1)


def smoothed_keys(call: Call) -> Tensor:
    """K without its mean, which leaves the softmax as it is and makes similarities tell more.

    Under causality K itself: the mean would carry later tokens into earlier blocks.
    """
    return call.k if call.is_causal else call.k - _masked_mean(call.k, call.key_mask)


def _fine_visible(selector: Selector, call: Call, length: int, start: int, count: int) -> Tensor:
    """Which key sub-blocks the query sub-blocks ``start`` … see, bool ``[count, fine nk]``."""
    q_len, k_len, offset = call.q_len, call.k_len, call.offset
    device = call.q.device
    starts_k = torch.arange(cdiv(k_len, length), device=device) * length
    if not call.is_causal:
        return torch.ones(count, len(starts_k), dtype=torch.bool, device=device)
    starts_q = (torch.arange(count, device=device) + start)[:, None] * length
    last_q = (starts_q + length).clamp(max=q_len) - 1
    block_end = ((starts_q // selector.block_q + 1) * selector.block_q).clamp(max=q_len) + offset
    ends_k = (starts_k + length).clamp(max=k_len)
    # A mean that reaches past the end of the query block would leak later tokens into its selection.
    seen = (starts_k <= last_q + offset) & (ends_k <= block_end)
    if call.window is not None:
        seen = seen & (ends_k > starts_q + offset - call.window + 1)
    if call.document_start is not None and call.key_mask is not None:
        # Sub-blocks of padding alone do not count among the rows of their query block.
        seen = seen & call.key_mask[0, starts_q] & (starts_k >= call.document_starts(1)[starts_q])
    return seen


def _masked_mean(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Mean over the valid tokens, float32 ``[B, H, 1, D]``."""
    if key_mask is None:
        return x.mean(2, keepdim=True, dtype=torch.float32)
    weight = key_mask[:, None, :, None].float()
    return (x.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)


def block_means(x: Tensor, block: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mean of the valid rows of every (sub-)block, float32 ``[B, H, n, D]``, and which blocks have a valid row.

    A ragged last block averages over its own rows only.
    """
    sums, counts, filled = block_sums(x, block, key_mask)
    return sums / counts.clamp(min=1), filled


def block_sums(x: Tensor, block: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over the valid rows of every block, float32 ``[B, H, n, D]``, their numbers, and which have any."""
    length = x.shape[2]
    if key_mask is None:
        counts = (length - torch.arange(0, length, block, device=x.device)).clamp(max=block)
        return _row_sums(x.float(), block), counts[:, None].float(), None
    weight = key_mask[:, None, :, None]
    counts = blockwise(key_mask.float(), block).sum(-1)
    return _row_sums(x.float().masked_fill(~weight, 0.0), block), counts[:, None, :, None], counts > 0


def _row_sums(x: Tensor, block: int) -> Tensor:
    batch, heads, length, dim = x.shape
    whole = length // block * block
    sums = x[:, :, :whole].unflatten(2, (-1, block)).sum(3) if whole else x.new_empty(batch, heads, 0, dim)
    return sums if whole == length else torch.cat([sums, x[:, :, whole:].sum(2, keepdim=True)], dim=2)
