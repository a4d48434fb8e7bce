"""Backend `cpu`: gathers the kept keys of each query block and computes them with two batched matrix products.

Query blocks of all heads and batches that keep the same number of blocks are computed together, so ragged counts
waste nothing: no padding to the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_mask import BlockMask, cdiv
from ..call import Call
from . import sdpa
from .base import Backend, register

# Scores held at a time: 2 MiB in float32. Larger chunks fall out of the second-level cache and halve the speed
# (measured on 2 cores of an AMD EPYC with 1 MiB each, torch 2.13).
_SCORES = 1 << 19


def declines(call: Call) -> str | None:
    """The reason why this backend does not serve the call, or None."""
    if call.q.device.type != "cpu":
        return f"q is on {call.q.device}, this backend runs on a CPU"
    if call.attn_mask is not None and call.attn_mask.dim() == 4:
        return "attn_mask is a full 4-D mask"
    if call.precision != "native":
        return f"precision {call.precision!r} is not available on a CPU"
    return None


def run(call: Call) -> Tensor:
    """Block-sparse attention on a CPU; PV skip is carried out, though it saves no time here."""
    return sdpa.run(call) if call.mask is None else _run(call, call.mask, False)[0]


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the natural log of the sum of the exponentials, float32 ``[B, Hq, Lq]``."""
    return sdpa.run_with_lse(call) if call.mask is None else _run(call, call.mask, True)


def _run(call: Call, mask: BlockMask, with_lse: bool) -> tuple[Tensor, Tensor]:
    return _attend(
        call.q, call.k, call.v, mask.counts, mask.indices, mask.block_q, mask.block_k, call.is_causal, call.scale,
        call.attn_mask, call.window, call.pv_threshold, with_lse,
    )  # fmt: skip


# An operator of its own, because the loop over counts reads them on the host, which torch.compile cannot trace.
@torch.library.custom_op("spas_attn::cpu_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, block_q: int, block_k: int, is_causal: bool,
    scale: float, attn_mask: Tensor | None, window: int | None, pv_threshold: Tensor | None, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and with ``with_lse`` the log-sum-exp (else an empty tensor)."""
    mask = BlockMask(counts, indices, block_q, block_k, q.shape[2], k.shape[2], trusted=True)
    call = Call(q, k, v, is_causal, scale, attn_mask, window, mask=mask, pv_threshold=pv_threshold)
    lse = torch.full(q.shape[:3] if with_lse else (0,), float("-inf"))
    return _gather_and_attend(call, mask, lse if with_lse else None), lse


@_attend.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3] if args[-1] else (0,), dtype=torch.float32)
    return torch.empty_like(q), lse


def _gather_and_attend(call: Call, mask: BlockMask, lse: Tensor | None) -> Tensor:
    batch, heads, q_len, dim = call.q.shape
    nq, block_q = cdiv(q_len, mask.block_q), mask.block_q
    q, k, v = _in_blocks(call, mask)
    out = q.new_zeros(q.shape)  # rows that keep no block stay 0
    logs = q.new_full(q.shape[:2] if lse is not None else (0,), float("-inf"))
    for rows, _, _, values, scores, probs, empty in _gathered(call, mask, q, k, v):
        if call.pv_threshold is not None:
            valid = (rows % nq * block_q)[:, None] + torch.arange(block_q) < q_len
            _skip_pv(scores, call.pv_threshold[rows // nq % heads], valid, mask.block_k)
            empty = scores.amax(-1, keepdim=True) == float("-inf")  # a threshold of 0 or less skips everything
        torch.softmax(scores, -1, out=probs)
        if lse is not None:
            logs[rows] = scores.logsumexp(-1)
        result = torch.bmm(probs, values)
        out[rows] = result if empty is None else result.masked_fill_(empty, 0.0)
    if lse is not None:
        lse.copy_(logs.view(batch, heads, nq * block_q)[:, :, :q_len])
    return torch.empty_like(call.q).copy_(out.view(batch, heads, nq * block_q, dim)[:, :, :q_len])


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, over the kept blocks; probabilities are computed again from the log-sum-exp."""
    mask = call.mask
    assert mask is not None
    q, k, v = _in_blocks(call, mask)
    grad_q, grad_k, grad_v = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad = _to_blocks(grad_out.float(), mask.block_q)
    delta = (grad_out.float() * out.float()).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    delta = _to_blocks(delta, mask.block_q)
    # Rows that see nothing have no probabilities; behind the last query all gradients are 0.
    lse = _to_blocks(lse.masked_fill(lse == float("-inf"), float("inf"))[..., None], mask.block_q)
    for rows, blocks, keys, values, scores, probs, _ in _gathered(call, mask, q, k, v):
        torch.exp(scores.sub_(lse[rows]), out=probs)
        torch.bmm(grad[rows], values.transpose(1, 2), out=scores)
        scores.sub_(delta[rows]).mul_(probs)  # gradients of the scores
        grad_q[rows] = torch.bmm(scores, keys)
        grad_k.index_add_(0, blocks, torch.bmm(scores.transpose(1, 2), q[rows]).view(-1, *k.shape[1:]))
        grad_v.index_add_(0, blocks, torch.bmm(probs.transpose(1, 2), grad[rows]).view(-1, *v.shape[1:]))
    grad_q *= call.scale  # that of k has it from q
    pairs = ((grad_q, call.q), (grad_k, call.k), (grad_v, call.v))
    grads = [
        torch.empty_like(like).copy_(x.view(*like.shape[:2], -1, like.shape[3])[:, :, : like.shape[2]])
        for x, like in pairs
    ]
    return grads[0], grads[1], grads[2]


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """``[B, H, L, D]`` as ``[B · H · blocks, block, D]``, filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).reshape(-1, block, x.shape[3])


def _in_blocks(call: Call, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor]:
    """Q times the scale, K and V in float32, in the blocks of the mask."""
    q = _to_blocks(call.q.float() * call.scale, mask.block_q)
    return q, _to_blocks(call.k.float(), mask.block_k), _to_blocks(call.v.float(), mask.block_k)


class _Gathered(NamedTuple):
    """Query blocks that keep equally many key blocks, and these.

    Attributes:
        rows: int64 ``[n]``, the query blocks, (b, h, i) flattened.
        blocks: int64 ``[n · count]``, their key blocks, (b, kv head, j) flattened.
        keys, values: ``[n, tokens, D]``, valid until the next ones are gathered, as the next two are.
        scores: ``[n, block_q, tokens]``, -inf where a token must not be seen.
        spare: memory of the same shape.
        empty: which queries see nothing at all, bool ``[n, 1 or block_q, 1]``; None when every one sees something.
    """

    rows: Tensor
    blocks: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor
    spare: Tensor
    empty: Tensor | None


def _gathered(call: Call, mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Gathered]:
    """The scores of all query blocks that keep something, a chunk at a time; q, k and v as ``_in_blocks`` has them."""
    batch, heads, q_len, dim = call.q.shape
    block_q, block_k = mask.block_q, mask.block_k
    nq, nk = cdiv(q_len, block_q), cdiv(call.k_len, block_k)
    # Fresh buffers of this size would be mapped and faulted in at every chunk.
    size = max(_SCORES, nk * block_q * block_k)
    buffers = [q.new_empty(size), q.new_empty(size)]
    gathered = [q.new_empty(size // block_q * dim), q.new_empty(size // block_q * dim)]
    # Row r is (b, h, i) flattened; its keys start at block (b, h // group) · nk.
    head = torch.arange(batch * heads)
    base = (head // heads * call.k.shape[1] + head % heads // call.group) * nk
    counts = mask.counts.flatten()
    indices = mask.indices.reshape(-1, nk)
    for count in counts.unique().tolist():
        if count == 0:
            continue
        chosen = (counts == count).nonzero()[:, 0]
        for rows in chosen.split(max(1, _SCORES // (count * block_q * block_k))):
            kept = indices[rows, :count].long()
            blocks = (base[rows // nq][:, None] + kept).flatten()
            shape = (len(rows), count * block_k)
            keys, values = (
                torch.index_select(
                    x, 0, blocks, out=buffer[: blocks.numel() * block_k * dim].view(-1, block_k, dim)
                ).view(*shape, dim)
                for x, buffer in zip((k, v), gathered, strict=True)
            )
            scores, spare = (x[: shape[0] * block_q * shape[1]].view(shape[0], block_q, shape[1]) for x in buffers)
            torch.bmm(q[rows], keys.transpose(1, 2), out=scores)
            yield _Gathered(rows, blocks, keys, values, scores, spare, _hide(call, mask, scores, rows, kept))


def _hide(call: Call, mask: BlockMask, scores: Tensor, rows: Tensor, kept: Tensor) -> Tensor | None:
    """Set the scores of tokens that the gathered rows may not see to -inf.

    Only the columns from the first block that has something to hide are touched.

    Returns:
        Which query rows see nothing at all, bool ``[rows, 1 or block_q, 1]``, or None when every one sees something.
    """
    q_len, k_len = call.q.shape[2], call.k.shape[2]
    block_q, block_k = mask.block_q, mask.block_k
    nq = cdiv(q_len, block_q)
    row_start = (rows % nq * block_q)[:, None]
    ends = kept * block_k + block_k
    partial = ends > k_len
    if call.is_causal:
        partial = partial | (ends > row_start + k_len - q_len + 1)
    if call.window is not None or call.attn_mask is not None:
        partial = torch.ones_like(partial)
    columns = partial.any(0).nonzero()
    if not len(columns):
        return None
    first = int(columns[0, 0])
    token = (kept[:, first:, None] * block_k + torch.arange(block_k)).flatten(1)[:, None]  # [rows, 1, tokens]
    seen = token < k_len
    if call.is_causal:
        last = row_start[..., None] + torch.arange(block_q)[:, None] + (k_len - q_len)
        seen = seen & (token <= last)
        if call.window is not None:
            seen = seen & (token > last - call.window)
    if call.attn_mask is not None:
        batch = rows // (nq * call.q.shape[1])
        seen = seen & call.attn_mask[batch[:, None], token[:, 0].clamp(max=k_len - 1)][:, None]
    scores[..., first * block_k :].masked_fill_(~seen, float("-inf"))
    return None if first > 0 else ~seen.any(-1, keepdim=True)


def _skip_pv(scores: Tensor, threshold: Tensor, valid: Tensor, block_k: int) -> None:
    """Leave out the blocks that PV skip drops, in place; the rule is that of ``reference``.

    Args:
        scores: ``[n, block_q, tokens]``.
        threshold: ``[n]``.
        valid: bool ``[n, block_q]``, rows that are queries (a ragged last block is padded).
    """
    blocks = scores.unflatten(-1, (-1, block_k))
    peak = blocks.amax(-1)
    behind = (peak - peak.cummax(-1).values).nan_to_num_(nan=float("-inf"), neginf=float("-inf"))
    reach = behind.masked_fill_(~valid[..., None], float("-inf")).amax(1)
    skipped = reach * 1.4426950408889634 + threshold[:, None] <= 0  # [n, blocks]
    if bool(skipped.any()):
        blocks.masked_fill_(skipped[:, None, :, None], float("-inf"))


register(
    Backend(
        "cpu",
        lambda: None,
        declines,
        run,
        skips_pv=True,
        run_with_lse=run_with_lse,
        differentiable=True,  # dense calls, which sdpa does
        backward=backward,
    )
)
