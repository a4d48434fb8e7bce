"""Partials: what each query block gets from each key block, so that one dense attention judges every selection.

For one query block, the softmax mass and the weighted values of every key block are computed once ("partials"). The
output of any selection of blocks is then a 0/1 combination of them: with M [candidates, key blocks] the kept blocks,

    output(M) = (M @ values) / (M @ mass + sink),

where the sink is that of models that have one (``Call.sinks``), else 0. So all heads and all thresholds come from one
dense attention and one small matrix product, instead of one attention per candidate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spas_attn.block_mask import cdiv
from spas_attn.call import Call

_LOG2E = 1.4426950408889634
_CANDIDATES = 16  # evaluated at a time: their outputs should stay in the cache of a CPU
_PARTIALS = 1 << 26  # float32 elements of partial values held at a time


@dataclass(frozen=True)
class Partials:
    """What one query block gets from each key block, for some heads.

    Attributes:
        mass: ``[B, H, nk, rows]``, Σ exp(score - row maximum) over the block's visible keys.
        value: ``[B, H, nk, rows, D]``, the same sum weighted with v.
        peak: ``[B, H, nk, rows]``, largest score of the row in the block, in log2 units (-inf: nothing visible).
        exact: ``[B, H, rows, D]``, the output over all blocks; 0 where nothing is visible.
        valid: bool ``[B, H, rows]``, rows that see something and are no padding themselves.
        sink: ``[B, H, rows]``, exp(sink - row maximum) of an attention sink, or None.
    """

    mass: Tensor
    value: Tensor
    peak: Tensor
    exact: Tensor
    valid: Tensor
    sink: Tensor | None = None

    def errors(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_d |output - exact| of every query under every candidate, and Σ_d |exact|.

        Args:
            kept: bool ``[B, H, candidates, nk]``.

        Returns:
            ``[B, H, candidates, rows]`` and ``[B, H, rows]``, 0 for rows that are not valid.
        """
        batch, heads, nk, rows, dim = self.value.shape
        values = self.value.view(batch, heads, nk, rows * dim)
        differences = []
        for weights in kept.float().split(_CANDIDATES, dim=2):
            # Where no mass is kept the values are 0 too, and so is the output.
            mass = weights @ self.mass
            if self.sink is not None:
                mass += self.sink[:, :, None]
            mass = mass.clamp_(min=1e-37)
            out = (weights @ values).unflatten(-1, (rows, dim))
            differences.append(out.div_(mass[..., None]).sub_(self.exact[:, :, None]).abs_().sum(-1))
        difference = torch.cat(differences, 2) * self.valid[:, :, None]
        return difference, self.exact.abs().sum(-1) * self.valid

    def pv_reach(self, kept: Tensor) -> Tensor:
        """How far below the running maximum the best row of each kept block stays, in log2 units, <= 0.

        PV skip (rule 6 of SpargeAttn, arXiv 2502.18137) leaves a block out where reach + pv_threshold <= 0.

        Args:
            kept: bool ``[B, H, nk]``.
        """
        peak = self.peak.masked_fill(~kept[..., None], -torch.inf)
        behind = (peak - peak.cummax(2).values).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        return behind.amax(-1)


def query_blocks(call: Call, block_q: int, block_k: int, blocks: list[int]) -> Iterator[tuple[int, slice, Partials]]:
    """Partials of the given query blocks, a few KV heads at a time.

    Yields:
        (query block, slice of query heads, partials).
    """
    batch, k_heads, k_len, dim = call.k.shape
    nk, group = cdiv(k_len, block_k), call.group
    step = max(1, _PARTIALS // (batch * group * nk * block_q * dim))
    for start in range(0, k_heads, step):
        chosen = slice(start, min(start + step, k_heads))
        heads = slice(chosen.start * group, chosen.stop * group)
        pad = (0, 0, 0, nk * block_k - k_len)
        keys = torch.nn.functional.pad(call.k[:, chosen].float(), pad).unflatten(2, (nk, block_k))
        values = torch.nn.functional.pad(call.v[:, chosen].float(), pad).unflatten(2, (nk, block_k))
        for i in blocks:
            rows = slice(i * block_q, min((i + 1) * block_q, call.q_len))
            yield i, heads, _partials(call, keys, values, heads, rows)


def _partials(call: Call, keys: Tensor, values: Tensor, heads: slice, rows: slice) -> Partials:
    batch, k_heads, nk, block_k, dim = keys.shape
    group, count = call.group, rows.stop - rows.start
    q = call.q[:, heads, rows].float().reshape(batch, k_heads, 1, group * count, dim)
    scores = (q @ keys.transpose(-1, -2)) * (call.scale * _LOG2E)  # [B, Hkv, nk, group * rows, block_k]
    scores = scores.unflatten(3, (group, count)).transpose(2, 3)  # [B, Hkv, group, nk, rows, block_k]
    seen = _seen(call, rows, nk, block_k)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    peak = scores.amax(-1)
    top = peak.amax(3, keepdim=True)
    weights = torch.exp2(scores - top.clamp(min=-3e38)[..., None])
    mass = weights.sum(-1)
    value = weights.transpose(2, 3).flatten(3, 4) @ values
    value = value.unflatten(3, (group, count)).transpose(2, 3).flatten(1, 2)  # [B, H, nk, rows, D]
    mass, peak = mass.flatten(1, 2), peak.flatten(1, 2)
    total = mass.sum(2)
    valid = total > 0
    sink = None
    if call.sinks is not None:
        logits = call.sinks.to(top.device)[heads, None] * _LOG2E
        sink = torch.exp2(logits - top.flatten(1, 2)[:, :, 0]).clamp(max=3e38).masked_fill(~valid, 0.0)
        total = total + sink
    exact = torch.where(valid[..., None], value.sum(2) / total.clamp(min=1e-37)[..., None], 0.0)
    queries = call.query_mask()
    if queries is not None:
        valid = valid & queries[:, None, rows]
    return Partials(mass, value, peak, exact, valid, sink)


def _seen(call: Call, rows: slice, nk: int, block_k: int) -> Tensor | None:
    """Visible (query, key) pairs, bool broadcastable to ``[B, Hkv, group, nk, rows, block_k]``."""
    mask = call.token_mask(rows.start, rows.stop)  # [B or 1, 1, rows, Lk]
    ragged = nk * block_k - call.k_len
    if mask is None:
        if not ragged:
            return None
        mask = torch.ones(1, 1, 1, call.k_len, dtype=torch.bool, device=call.q.device)
    mask = torch.nn.functional.pad(mask, (0, ragged)).unflatten(-1, (nk, block_k))
    return mask.transpose(2, 3)[:, :, None]
