"""The probability from which on blocks of a whole head are kept, in one ranking of all of its blocks, without sorting.

Eight launches, each of which finds four bits of the probability: it sums what lies above fifteen thresholds. Parts of a
head are summed apart and joined in a fixed order by the launch that follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .keep import near_blocks, visible_blocks
from .operands import PerHead, of_head
from .recorded import launch

_PASSES = 8  # of four bits
_PARTS = 32  # most parts of a head


@triton.jit
def _digit(sums, place, level, h, PARTS: tl.constexpr, parts):
    """How many of the thresholds of the last launch lie too low: as much stands above as is to be kept."""
    offs_t, offs_p = tl.arange(0, 16), tl.arange(0, PARTS)
    p_sums = sums + (place * parts + offs_p)[:, None] * 32 + offs_t[None, :]
    inside = (offs_p < parts)[:, None]
    above = tl.sum(tl.load(p_sums, mask=inside, other=0.0), 0)  # [16]
    forced = tl.sum(tl.sum(tl.load(p_sums + 16, mask=inside, other=0.0), 0), 0)
    all_others = tl.sum(tl.where(offs_t == 15, above, 0.0), 0)
    limit = of_head(level, h) * (forced + all_others)
    return tl.sum(((offs_t < 15) & (forced + above >= limit)).to(tl.int32), 0)


@triton.jit(do_not_specialize=["number"])
def cut_kernel(
    probs, block_filled, level, wanted, sums, found, heads, q_len, k_len, window, local, number, parts,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, NK: tl.constexpr, SINK: tl.constexpr, CAUSAL: tl.constexpr,
    PARTS: tl.constexpr, PASSES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One launch: bits of the cut from the sums of the launch before it, then sums above the next thresholds.

    Args:
        probs: int32 [B, Hq, nq, nk], the bits of probabilities.
        level: PerHead, share of the mass to keep; wanted: uint8 [B, Hq], 0 for heads to be left out.
        sums: float32 [PASSES, B, Hq, parts, 32]: masses above 15 thresholds, of all, and of forced blocks.
        found: int32 [PASSES + 1, B, Hq]: the bits found so far.
    """
    part = tl.program_id(1)
    head = tl.cast(tl.program_id(0), tl.int64)
    b, h = head // heads, head % heads
    size = tl.num_programs(0)
    least = 0
    if not FIRST:
        digit = _digit(sums, (number - 1) * size + head, level, h, PARTS, parts)
        digit = tl.where(number == 1, tl.minimum(digit, 3), digit)
        least = tl.load(found + (number - 1) * size + head) + (digit << (32 - 4 * number))
    if part == 0:
        tl.store(found + number * size + head, least)
    if number < PASSES:
        if tl.load(wanted + head) != 0:
            nq, nk = tl.cdiv(q_len, BLOCK_Q), tl.cdiv(k_len, BLOCK_K)
            block = tl.arange(0, NK)[None, :]
            offs_t = tl.arange(0, 16)
            # What lies above the last number that begins with these bits and digit t; 15: everything.
            threshold = least + ((offs_t + 1) << (28 - 4 * number)) - 1
            threshold = tl.where((offs_t == 15) | (threshold < 0), -1, threshold)
            above = tl.zeros([16, NK], tl.float32)
            mass = tl.zeros([1, NK], tl.float32)
            for number_q in range(part, nq, parts):
                i = number_q + tl.zeros([1, 1], tl.int32)
                visible, first = visible_blocks(
                    block, i, b, block_filled, None, q_len, k_len, nk, window, BLOCK_Q, BLOCK_K, NK, CAUSAL
                )
                forced = visible & near_blocks(block, i, first, q_len, k_len, local, SINK, CAUSAL, BLOCK_Q, BLOCK_K)
                bits = tl.load(probs + (head * nq + i) * nk + block, mask=visible, other=0)
                p = bits.to(tl.float32, bitcast=True)
                other = tl.where(forced, 0.0, p)
                above += tl.where(bits > threshold[:, None], other, 0.0)
                mass += tl.where(forced, p, 0.0)
            p_sums = sums + ((number * size + head) * parts + part) * 32 + offs_t
            tl.store(p_sums, tl.sum(above, 1))
            tl.store(p_sums + 16, tl.where(offs_t == 0, tl.sum(tl.sum(mass, 1), 0), 0.0))


def head_cuts(
    probs: Tensor,
    level: float | Tensor,
    wanted: Tensor,
    *,
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    is_causal: bool,
    window: int | None,
    sink: int,
    local: int,
    block_filled: Tensor | None,
) -> Tensor:
    """Bits of the least probability of a head that is kept, int32 ``[B, Hq]``, forced blocks ranked first.

    Args:
        probs: int32 ``[B, Hq, nq, nk]``, bits of float32.
        level: share of the mass before which blocks are kept, a float or ``[Hq]``.
        wanted: uint8 ``[B, Hq]``, 0 for heads whose cut is of no use.
    """
    batch, heads, nq, nk = probs.shape
    width = max(32, triton.next_power_of_2(nk))
    parts = min(_PARTS, nq)
    sums = torch.zeros(_PASSES, batch, heads, parts, 32, dtype=torch.float32, device=probs.device)
    found = torch.empty(_PASSES + 1, batch, heads, dtype=torch.int32, device=probs.device)
    per_head = PerHead.of(level, probs.device)
    for number in range(_PASSES + 1):
        launch(
            cut_kernel, (batch * heads, parts if number < _PASSES else 1),
            probs, block_filled, per_head, wanted, sums, found, heads, q_len, k_len, window if is_causal else None,
            local, number, parts,
            BLOCK_Q=block_q, BLOCK_K=block_k, NK=width, SINK=sink, CAUSAL=is_causal,
            PARTS=triton.next_power_of_2(parts), PASSES=_PASSES, FIRST=number == 0,
            num_warps=min(16, max(1, width // 128)),
        )  # fmt: skip
    return found[_PASSES]
