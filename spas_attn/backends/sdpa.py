"""Backend `sdpa`: PyTorch's dense scaled_dot_product_attention; exact, differentiable, runs every call.

A block mask is honoured as a token mask: it gives the same numbers and saves no time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from .base import Backend, declines_8_bits, register

_SCORES = 1 << 27  # scores held at a time where the log-sum-exp is wanted
_ROWS = 1024  # query rows at a time when a token mask has to be written out


def run(call: Call) -> Tensor:
    """Dense attention; PV skip does not apply."""
    q, k, v = call.q, call.k, call.v
    gqa = call.group > 1
    square = q.shape[2] == k.shape[2] and call.window is None
    if call.mask is None and call.attn_mask is None and (square or not call.is_causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=call.is_causal, scale=call.scale, enable_gqa=gqa)
    parts = []
    for start in range(0, q.shape[2], _ROWS):
        stop = min(start + _ROWS, q.shape[2])
        mask = call.token_mask(start, stop)
        out = F.scaled_dot_product_attention(
            q[:, :, start:stop], k, v, attn_mask=mask, scale=call.scale, enable_gqa=gqa
        )
        # What SDPA gives for a row without a visible key differs from kernel to kernel; here it is 0.
        parts.append(out if mask is None else torch.where(mask.any(-1, keepdim=True), out, out.new_zeros(())))
    return torch.cat(parts, dim=2)


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the natural log of the sum of the exponentials, float32 ``[B, Hq, Lq]``; differentiable.

    PyTorch's kernels do not tell it: scores are written out in float32, some rows at a time.
    """
    q, k, v = call.q.float(), call.k.float(), call.v.float()
    batch, heads, q_len, dim = q.shape
    k_heads, k_len = k.shape[1:3]
    outs, logs = [], []
    step = max(1, _SCORES // (batch * heads * k_len))
    for start in range(0, q_len, step):
        stop = min(start + step, q_len)
        rows = q[:, :, start:stop].reshape(batch, k_heads, -1, dim)
        scores = (rows @ k.transpose(-1, -2) * call.scale).view(batch, heads, stop - start, k_len)
        mask = call.token_mask(start, stop)
        empty = scores.new_zeros((), dtype=torch.bool)
        if mask is not None:
            empty = ~mask.any(-1, keepdim=True)
            scores = scores.masked_fill(~(mask | empty), float("-inf"))
        # Rows that see nothing are given all keys, so that no gradient is NaN, and then nothing.
        lse = scores.logsumexp(-1, keepdim=True)
        out = ((scores - lse).exp().view(batch, k_heads, -1, k_len) @ v).view(batch, heads, stop - start, dim)
        outs.append(out.masked_fill(empty, 0.0).to(call.q.dtype))
        logs.append(lse.masked_fill(empty, float("-inf"))[..., 0])
    return torch.cat(outs, dim=2), torch.cat(logs, dim=2)


register(
    Backend(
        "sdpa", lambda: None, declines_8_bits, run, skips_blocks=False, run_with_lse=run_with_lse, differentiable=True
    )
)
