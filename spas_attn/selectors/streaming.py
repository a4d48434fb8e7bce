"""Streaming: an attention sink and a local window (StreamingLLM; DuoAttention, arXiv 2410.10819)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Inputs, PerHead, Selector, per_head


@dataclass
class Streaming(Selector):
    """Keeps every block that holds one of the first ``sink_tokens`` visible keys or a key at most ``local_tokens``
    from some query of the block.

    Without causality the local window reaches to both sides.

    Attributes:
        sink_tokens: length of the sink in tokens, a number or a tensor ``[Hq]``.
        local_tokens: length of the local window in tokens, a number or a tensor ``[Hq]``.
    """

    sink_tokens: PerHead = 128
    local_tokens: PerHead = 1024

    def kept_blocks(self, inputs: Inputs) -> Tensor:
        q, device = inputs.q, inputs.q.device
        heads = q.shape[1]
        sink = per_head(self.sink_tokens, heads, "sink_tokens", device)[:, None, None]
        local = per_head(self.local_tokens, heads, "local_tokens", device)[:, None, None]
        visible = self.visible(inputs)
        nq, nk = visible.shape[-2:]
        start_k = torch.arange(nk, device=device) * self.block_k
        last_k = (start_k + self.block_k).clamp(max=inputs.k.shape[2]) - 1
        first_q = torch.arange(nq, device=device)[:, None] * self.block_q + inputs.offset
        last_q = (first_q + self.block_q).clamp(max=inputs.k.shape[2]) - 1
        near = (last_k > first_q - local) & (local > 0)
        if not inputs.is_causal:
            near = near & (start_k < last_q + local)
        first = torch.zeros(1, dtype=torch.long, device=device)
        if inputs.key_mask is not None:
            first = inputs.key_mask.to(torch.int8).argmax(-1)
        first = first[:, None, None, None]
        in_sink = (start_k < first + sink) & (last_k >= first) & (sink > 0)
        return ((near[None] | in_sink) & visible) | self.forced(inputs, visible)
