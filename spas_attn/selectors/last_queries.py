"""What the last queries of a prompt attend to, by key and by distance: the estimate of FlexPrefill and MInference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import blockwise, cdiv
from ..call import Call
from . import pooled
from .base import Selector

_HIDDEN = 3e38  # level of a distance that does not occur


@dataclass(frozen=True)
class LastQueries:
    """The attention of the last queries.

    Attributes:
        columns: float32 ``[B, Hq, Lk]``, the mean mass that they put on each key.
        diagonals: float32 ``[B, Hq, distances]``, the mean mass at each distance from the query back to the key,
            ascending from :func:`first_distance`.
        mean: float32 ``[B, Hq, D]``, the mean of these queries.
        position: int64 ``[B or 1]``, position of the last of them among the keys.
    """

    columns: Tensor
    diagonals: Tensor
    mean: Tensor
    position: Tensor


def last_query(call: Call) -> Tensor:
    """Index of the last query that is no padding, int64 ``[B or 1]``; the last of all where every query is."""
    valid = call.query_mask()
    if valid is None:
        return torch.full((1,), call.q_len - 1, device=call.q.device)
    behind = valid.flip(-1).to(torch.int8).argmax(-1)
    return call.q_len - 1 - behind


def first_distance(call: Call) -> int:
    """The smallest distance from a query back to a key: 0 under causality, else that of query 0 and the last key."""
    return 0 if call.is_causal else call.offset - (call.k_len - 1)


def last_queries(call: Call, count: int) -> LastQueries:
    """The exact attention of the last ``count`` queries that are no padding (all of them where there are fewer).

    Chunks of queries bound the memory; sums run in a fixed order.
    """
    batch, heads, q_len, dim = call.q.shape
    device, key_mask = call.q.device, call.key_mask
    index, weight, queries = last_rows(call, count)
    count = queries.shape[2]
    keys = call.k.float().transpose(-1, -2)
    key = torch.arange(call.k_len, device=device)
    first = first_distance(call)
    distance = torch.arange(first, q_len + call.offset, device=device)
    columns = queries.new_zeros(batch, heads, call.k_len)
    diagonals = queries.new_zeros(batch, heads, len(distance))
    chunk = max(1, pooled._FINE_SCORES // (batch * heads * call.k_len))
    for start in range(0, count, chunk):
        part, position = queries[:, :, start : start + chunk], index[:, start : start + chunk, None] + call.offset
        size = part.shape[2]
        with torch.autocast(device.type, enabled=False):
            scores = part.reshape(batch, -1, call.group * size, dim) @ keys
        scores = scores.view(batch, heads, size, -1) * call.scale
        seen = _seen(call, key, position)[:, None]
        if key_mask is not None:
            seen = seen & key_mask[:, None, None]
        seen_any = seen.any(-1, keepdim=True)
        probs = scores.masked_fill_(~seen, -torch.inf).masked_fill_(~seen_any, 0.0).softmax(-1)
        probs = probs.masked_fill_(~seen, 0.0).mul_(weight[:, None, start : start + chunk, None])
        columns += probs.sum(2)
        source = position - distance  # the key at that distance
        inside = ((source >= 0) & (source < call.k_len))[:, None]
        source = source.clamp(0, call.k_len - 1)[:, None].expand(-1, heads, -1, -1)
        diagonals += probs.gather(-1, source).masked_fill_(~inside, 0.0).sum(2)
    mean = (queries * weight[:, None, :, None]).sum(2)
    return LastQueries(columns, diagonals, mean, last_query(call) + call.offset)


def last_rows(call: Call, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last ``count`` queries that are no padding, or all where there are fewer.

    Returns:
        Indices int64 ``[B, count]``, weights float32 ``[B or 1, count]`` that make a mean of those that count, and the
        queries, float32 ``[B, Hq, count, D]``.
    """
    batch, heads, q_len, dim = call.q.shape
    query_mask = call.query_mask()
    count = min(count, q_len)
    index = last_query(call)[:, None] - count + 1 + torch.arange(count, device=call.q.device)  # [B or 1, count]
    counted = index >= 0
    index = index.clamp(min=0).expand(batch, -1)
    if query_mask is not None:
        counted = counted & query_mask.gather(1, index)
    weight = counted.float() / counted.sum(-1, keepdim=True).clamp(min=1)
    return index, weight, call.q.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim)).float()


def over_columns(selector: Selector, columns: Tensor) -> Tensor:
    """The lowest of the values ``[B, Hq, Lk]`` of the keys in each key block, ``[B, Hq, 1, nk]``."""
    return blockwise(columns, selector.block_k, value=torch.inf).amin(-1)[:, :, None]


def over_diagonals(selector: Selector, call: Call, diagonals: Tensor) -> Tensor:
    """The lowest of the values ``[B, Hq, distances]`` of the diagonals that cross each block, ``[B, Hq, nq, nk]``."""
    block_q, block_k = selector.block_q, selector.block_k
    nq, nk = cdiv(call.q_len, block_q), cdiv(call.k_len, block_k)
    rows = torch.arange(nq, device=diagonals.device)[:, None] * block_q
    start = rows + (nk - 1 - torch.arange(nk, device=diagonals.device)) * block_k
    return lowest_across(selector, call, diagonals)[..., start // min(block_q, block_k)]


def lowest_across(selector: Selector, call: Call, diagonals: Tensor) -> Tensor:
    """The lowest of the values ``[B, Hq, distances]`` of the diagonals across blocks, by the place of a block.

    Ragged last blocks count as whole ones; a block that no diagonal crosses has a value above all others.

    Returns:
        ``[B, Hq, places]``; block (i, j) has the place (i·block_q + (nk - 1 - j)·block_k) / min(block_q, block_k).
    """
    block_q, block_k = selector.block_q, selector.block_k
    nq, nk = cdiv(call.q_len, block_q), cdiv(call.k_len, block_k)
    # Block (i, j) is crossed by the distances from i·block_q + offset - (j + 1)·block_k + 1 on, block_q + block_k - 1
    # of them; `lowest` is the first one of block (0, nk - 1).
    lowest = call.offset - nk * block_k + 1
    before = first_distance(call) - lowest
    length = nq * block_q + nk * block_k - 1
    values = torch.nn.functional.pad(diagonals, (before, length - before - diagonals.shape[-1]), value=_HIDDEN)
    return -torch.nn.functional.max_pool1d(-values, block_q + block_k - 1, min(block_q, block_k))


def _seen(call: Call, key: Tensor, position: Tensor) -> Tensor:
    """Keys that queries at ``position`` ``[B, rows, 1]`` see by causality and window, bool ``[B, rows, Lk]``."""
    if not call.is_causal:
        return (key >= 0).expand(*position.shape[:2], -1)
    seen = key <= position
    return seen if call.window is None else seen & (key > position - call.window)
