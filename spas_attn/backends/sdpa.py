"""Backend `sdpa`: PyTorch's dense scaled_dot_product_attention; exact, differentiable, runs every call.

A block mask is honoured as a token mask: it gives the same numbers and saves no time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from .base import Backend, declines_8_bits, register

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


register(Backend("sdpa", lambda: None, declines_8_bits, run, skips_blocks=False))
