"""Partials: what each query block gets from each key block, so that one dense attention judges every selection.

For one query block, the softmax mass and the weighted values of every key block are computed once ("partials"). The
output of any selection of blocks is then a 0/1 combination of them: with M [candidates, key blocks] the kept blocks,

    output(M) = (M @ values) / (M @ mass + sink),

where the sink is that of models that have one (``Call.sinks``), else 0. So all heads and all thresholds come from one
dense attention and one small matrix product, instead of one attention per candidate. On a GPU many query blocks are
computed at a time, because a block alone is a hundred launches of small kernels.
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
    """What one query block of B samples, or several of each, get from each key block, for some heads.

    Several query blocks (``rows`` each) stand one after the other where samples do: B is their number times the batch.

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


@dataclass(frozen=True)
class Group:
    """Some query blocks, for some heads; key blocks after the last one that any of them sees are left out.

    Attributes:
        blocks: their numbers.
        heads: slice of the query heads.
        partials: B is blocks · batch.
    """

    blocks: list[int]
    heads: slice
    partials: Partials

    def rows_of(self, grid: Tensor) -> Tensor:
        """The rows of these blocks and heads in a grid ``[B, Hq, nq, nk]``, as the partials stand: ``[B, H, nk]``."""
        return grid[:, self.heads, self.blocks, : self.partials.mass.shape[2]].transpose(1, 2).flatten(0, 1)


def query_groups(call: Call, block_q: int, block_k: int, blocks: list[int]) -> Iterator[Group]:
    """Partials of the given query blocks (ascending), as many at a time as memory allows, on a CPU one."""
    together = len(blocks) if call.q.device.type != "cpu" else 1
    yield from _groups(call, block_q, block_k, blocks, together, whole=False)


def query_blocks(call: Call, block_q: int, block_k: int, blocks: list[int]) -> Iterator[tuple[int, slice, Partials]]:
    """Partials of the given query blocks one by one, over all key blocks, a few KV heads at a time.

    Yields:
        (query block, slice of query heads, partials).
    """
    for group in _groups(call, block_q, block_k, blocks, 1, whole=True):
        yield group.blocks[0], group.heads, group.partials


def _groups(
    call: Call, block_q: int, block_k: int, blocks: list[int], together: int, *, whole: bool
) -> Iterator[Group]:
    batch, k_heads, k_len, dim = call.k.shape
    nk = cdiv(k_len, block_k)

    def key_blocks(block: int) -> int:
        """How many key blocks a query block may see."""
        last = min((block + 1) * block_q, call.q_len) + call.offset
        return nk if whole or not call.is_causal else min(nk, cdiv(last, block_k))

    def size(count: int, last: int) -> int:
        """Elements of partial values of one KV head."""
        return count * batch * call.group * key_blocks(last) * block_q * dim

    step = max(1, _PARTIALS // size(1, blocks[-1])) if blocks else 1
    pad = (0, 0, 0, nk * block_k - k_len)
    for start in range(0, k_heads, step):
        chosen = slice(start, min(start + step, k_heads))
        heads, count = slice(chosen.start * call.group, chosen.stop * call.group), chosen.stop - chosen.start
        keys, values = (torch.nn.functional.pad(x[:, chosen].float(), pad) for x in (call.k, call.v))
        first = 0
        while first < len(blocks):
            stop = first + 1
            while stop - first < together and stop < len(blocks):
                if count * size(stop + 1 - first, blocks[stop]) > _PARTIALS:
                    break
                stop += 1
            some = blocks[first:stop]
            seen = key_blocks(some[-1]) * block_k
            yield Group(
                some, heads, _partials(call, keys[:, :, :seen], values[:, :, :seen], heads, some, block_q, block_k)
            )
            first = stop


def _partials(
    call: Call, keys: Tensor, values: Tensor, heads: slice, blocks: list[int], block_q: int, block_k: int
) -> Partials:
    """Of whole query blocks: rows beyond the last query are there and not valid."""
    batch, k_heads, length, dim = keys.shape
    n, group, nk, device = len(blocks), call.group, length // block_k, keys.device
    rows = torch.tensor(blocks, device=device)[:, None] * block_q + torch.arange(
        min(block_q, call.q_len), device=device
    )
    ragged = blocks[-1] * block_q + rows.shape[1] > call.q_len
    q = call.q[:, heads, rows.flatten().clamp(max=call.q_len - 1)].float()  # [B, H, n · rows, D]
    # Rows of one KV head stand together: [B, Hkv, group · n · rows, keys].
    scores = q.reshape(batch, k_heads, -1, dim) @ keys.transpose(-1, -2)
    scores = scores.mul_(call.scale * _LOG2E).view(batch, k_heads, group, n, -1, nk, block_k)
    hidden = _hidden(call, rows, length, ragged)
    if hidden is not None:  # [B or 1, 1, 1, n, rows, nk, block_k]
        scores.masked_fill_(hidden.unflatten(-1, (nk, block_k))[:, None, None], -torch.inf)
    peak = scores.amax(-1)
    top = peak.amax(-1)
    weights = scores.sub_(top.clamp(min=-3e38)[..., None, None]).exp2_()
    mass = weights.sum(-1)
    # Key blocks before rows, for one matrix product per block: [B, Hkv, nk, group · n · rows, D].
    weights = weights.flatten(2, 4).transpose(2, 3)
    value = weights @ values.unflatten(2, (nk, block_k))

    def stand(x: Tensor, *last: int) -> Tensor:
        """From ``[B, Hkv, group, n, ...]`` to ``[B · n, H, ...]`` with the other dimensions in another order."""
        return x.permute(0, 3, 1, 2, *last).flatten(2, 3).flatten(0, 1)

    value = stand(value.unflatten(3, (group, n, -1)).permute(0, 1, 3, 4, 2, 5, 6), 4, 5, 6)  # [B · n, H, nk, rows, D]
    mass, peak, top = stand(mass, 5, 4), stand(peak, 5, 4), stand(top, 4)
    total = mass.sum(2)
    valid = total > 0
    sink = None
    if call.sinks is not None:
        logits = call.sinks.to(device)[heads, None] * _LOG2E
        sink = torch.exp2(logits - top).clamp(max=3e38).masked_fill(~valid, 0.0)
        total = total + sink
    exact = torch.where(valid[..., None], value.sum(2) / total.clamp(min=1e-37)[..., None], 0.0)
    queries = call.query_mask()
    if queries is not None:
        valid = valid & queries[:, rows.clamp(max=call.q_len - 1)].flatten(0, 1)[:, None]
    return Partials(mass, value, peak, exact, valid, sink)


def _hidden(call: Call, rows: Tensor, length: int, ragged: bool) -> Tensor | None:
    """(Query, key) pairs that are not visible, bool ``[B or 1, n, rows, length]``; None where all are.

    Args:
        rows: positions of queries ``[n, rows]``, some beyond the last one if ``ragged``.
    """
    if (
        call.mask is not None
        or call.document_start is not None
        or (call.attn_mask is not None and call.key_mask is None)
    ):
        masks = [call.token_mask(int(part[0]), min(int(part[-1]) + 1, call.q_len)) for part in rows]
        parts = [torch.nn.functional.pad(m[:, 0], (0, max(0, length - call.k_len), 0, rows.shape[1] - m.shape[2]))
                 for m in masks if m is not None]  # fmt: skip
        return ~torch.stack(parts, 1)[..., :length]
    columns = torch.arange(length, device=rows.device)
    parts = []
    if call.is_causal:
        positions = (rows + call.offset)[..., None]
        parts.append((columns > positions)[None])
        if call.window is not None:
            parts.append((columns <= positions - call.window)[None])
    if length > call.k_len:
        parts.append((columns >= call.k_len)[None, None, None])
    if call.key_mask is not None:
        padded = torch.nn.functional.pad(call.key_mask, (0, max(0, length - call.k_len)))[:, :length]
        parts.append(~padded[:, None, None])
    if ragged:
        parts.append((rows >= call.q_len)[None, ..., None])
    hidden = None
    for part in parts:
        hidden = part if hidden is None else hidden | part
    return hidden
