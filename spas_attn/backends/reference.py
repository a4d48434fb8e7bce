"""Backend `reference`: float32 dense scores under the mask; the truth that every test compares with."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call
from .base import Backend, declines_8_bits, register

_ROWS = 1024  # query rows at a time, so that the scores of long sequences fit into memory


def run(call: Call) -> Tensor:
    """Exact attention in float32, PV skip included when ``pv_threshold`` is given and there is a block mask."""
    return run_with_lse(call)[0]


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the natural log of the sum of the exponentials, float32 ``[B, Hq, Lq]``."""
    q, k, v = call.q.float(), call.k.float(), call.v.float()
    batch, heads, q_len, dim = q.shape
    k_heads = k.shape[1]
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, q_len, dim, dtype=call.q.dtype, device=q.device)
    for start in range(0, q_len, _ROWS):
        stop = min(start + _ROWS, q_len)
        rows = q[:, :, start:stop].reshape(batch, k_heads, -1, dim)
        scores = (rows @ k.transpose(-1, -2) * call.scale).view(batch, heads, stop - start, -1)
        mask = call.token_mask(start, stop)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if call.pv_threshold is not None and call.mask is not None:
            scores = scores.masked_fill(_skipped(call, scores, start), float("-inf"))
        lse[:, :, start:stop] = scores.logsumexp(-1)
        empty = (scores == float("-inf")).all(-1, keepdim=True)  # rows without a visible key give 0
        probs = torch.softmax(scores.masked_fill(empty, 0.0), -1).view(batch, k_heads, -1, k.shape[2])
        result = (probs @ v).view(batch, heads, stop - start, dim).masked_fill(empty, 0.0)
        out[:, :, start:stop] = result.to(out.dtype)
    return out, lse


def _skipped(call: Call, scores: Tensor, start: int) -> Tensor:
    """Tokens whose key block PV skip leaves out, bool ``[B, Hq, rows, Lk]`` (arXiv 2502.18137, in log2 units).

    A key block is left out for a whole query block when no row's block maximum comes within the threshold of the
    running maximum, keys taken in ascending order.
    """
    assert call.mask is not None
    assert call.pv_threshold is not None
    block_q, block_k = call.mask.block_q, call.mask.block_k
    rows, k_len = scores.shape[-2:]
    pad_q, pad_k = -rows % block_q, -k_len % block_k
    log2 = torch.nn.functional.pad(scores * 1.4426950408889634, (0, pad_k, 0, pad_q), value=float("-inf"))
    block_max = log2.unflatten(-1, (-1, block_k)).amax(-1)  # [B, H, rows, nk]
    # -inf - -inf (nothing seen yet) is NaN: such a row asks for nothing.
    behind = (block_max - block_max.cummax(-1).values).nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    reach = behind.unflatten(-2, (-1, block_q)).amax(-2)  # [B, H, nq, nk]
    skipped = reach + call.pv_threshold.to(scores.device)[:, None, None] <= 0
    per_row = skipped.repeat_interleave(block_q, -2)[..., :rows, :]
    return per_row.repeat_interleave(block_k, -1)[..., :k_len]


register(
    Backend(
        "reference",
        lambda: None,
        declines_8_bits,
        run,
        skips_pv=True,
        skips_blocks=False,
        run_with_lse=run_with_lse,
        differentiable=True,
    )
)
