"""Small random calls for selectors, and what of them is visible and forced, pair by pair."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from spas_attn import Call
from spas_attn.selectors import Selector, Union

HEADS = 4


def drawn(length: int, heads: int, generator: torch.Generator, batch: int = 2, dim: int = 16) -> Tensor:
    """Rows with some structure: a slowly wandering mean, so that blocks differ, and loud, mixed stretches."""
    x = torch.randn(batch, heads, length, dim, generator=generator)
    drift = torch.randn(batch, heads, length, dim, generator=generator).cumsum(2) / 6
    loud = torch.rand(batch, heads, length, 1, generator=generator).cumsum(2) % 70 > 50
    return torch.where(loud, 2 * x, drift + 0.3 * x)


def random_call(seed: int, *, is_causal: bool | None = None, padded: bool = True) -> Call:
    """A small call of two sequences, four query and two KV heads, with a random window or padding."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    is_causal = chance.random() < 0.6 if is_causal is None else is_causal
    k_len = chance.choice([1, 64, 129, chance.randint(100, 500), chance.randint(300, 600)])
    q_len = chance.randint(1, k_len if is_causal else 400)
    window = chance.randint(1, 400) if is_causal and chance.random() < 0.4 else None
    mask = torch.ones(2, k_len, dtype=torch.bool)
    padding = chance.choice([None, None, "left", "right", "holes", "nothing left"]) if padded else None
    if padding == "left":
        mask[0, : k_len // 2] = False
    elif padding == "right":
        mask[0, k_len - k_len // 2 :] = False
    elif padding == "holes":
        mask = torch.rand(2, k_len, generator=generator) < 0.02
    elif padding == "nothing left":
        mask[0] = False
    return Call.make(
        drawn(q_len, HEADS, generator),
        *[drawn(k_len, 2, generator)] * 2,
        is_causal=is_causal,
        window=window,
        attn_mask=mask if padding else None,
        scale=chance.choice([0.05, 0.25, 1.0]),
    )


def by_pairs(call: Call, selector: Selector) -> tuple[Tensor, Tensor]:
    """Blocks that hold a visible pair of tokens, and those that hold one that must be kept, bool ``[B, nq, nk]``."""
    i, j = torch.arange(call.q_len)[:, None] + call.offset, torch.arange(call.k_len)
    seen = (j <= i) if call.is_causal else torch.ones(call.q_len, call.k_len, dtype=torch.bool)
    if call.window is not None:
        seen = seen & (j > i - call.window)
    valid = torch.ones(2, call.k_len, dtype=torch.bool) if call.key_mask is None else call.key_mask
    visible = to_blocks(seen, selector) & torch.stack([x.any(1) for x in valid.split(selector.block_k, 1)], 1)[:, None]
    must = torch.zeros(2, call.q_len, call.k_len, dtype=torch.bool)
    first = valid.int().argmax(1)
    if selector.sink and not isinstance(selector, Union):
        must |= (j == first[:, None])[:, None]
    if call.is_causal:
        start = (i - call.offset) // selector.block_q * selector.block_q + call.offset
        must |= (j <= i) & (j >= start - selector.local + (selector.local > 0)) & (j >= start - selector.local)
    return visible, torch.stack([to_blocks(x, selector) for x in must]) & visible


def to_blocks(pairs: Tensor, selector: Selector) -> Tensor:
    """Blocks with at least one True pair."""
    strips = pairs.split(selector.block_q, 0)
    return torch.stack([torch.stack([part.any() for part in s.split(selector.block_k, 1)]) for s in strips])
