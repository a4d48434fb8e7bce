"""Streaming: an attention sink and a local window (StreamingLLM; DuoAttention, arXiv 2410.10819)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_mask import cdiv
from ..call import Call
from ..checks import PerHead, check_range, per_head
from .base import Selector, first_keys


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
    packs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("sink_tokens", self.sink_tokens, 0, float("inf"))
        check_range("local_tokens", self.local_tokens, 0, float("inf"))

    def sink_end(self, first: int = 0) -> int:
        """Where the sink's blocks end in a row whose first visible key is at ``first``, in tokens.

        Without a sink, where the block of ``first`` begins; a ValueError on sizes per head.
        """
        tokens = max(math.ceil(self._number("sink_tokens")), int(self.sink))
        return cdiv(first + tokens, self.block_k) * self.block_k if tokens else first // self.block_k * self.block_k

    def window_start(self, query: int) -> int:
        """First key of the window's blocks under causality, for the query block that begins at ``query``, in tokens."""
        near = math.floor((query - self._number("local_tokens") + 1) / self.block_k)
        forced = (query - self.local) // self.block_k
        kept = min(near, forced) if self._number("local_tokens") > 0 else forced
        return max(0, kept) * self.block_k

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if isinstance(value, Tensor):
            raise ValueError(f"{name} must be one number for all heads here, got a tensor {tuple(value.shape)}")
        return float(value)

    def levels(self, call: Call) -> Tensor:
        heads, device, k_len = call.q.shape[1], call.q.device, call.k_len
        sink = per_head(self.sink_tokens, heads, "sink_tokens", device)[:, None, None]
        local = per_head(self.local_tokens, heads, "local_tokens", device)[:, None, None]
        start_k = torch.arange(cdiv(k_len, self.block_k), device=device) * self.block_k
        last_k = (start_k + self.block_k).clamp(max=k_len) - 1
        first_q = torch.arange(cdiv(call.q_len, self.block_q), device=device)[:, None] * self.block_q + call.offset
        last_q = (first_q + self.block_q).clamp(max=k_len) - 1
        near = (last_k > first_q - local) & (local > 0)
        if not call.is_causal:
            near = near & (start_k < last_q + local)
        first = first_keys(call, self.block_q)[:, None, :, None]
        in_sink = (start_k < first + sink) & (last_k >= first) & (sink > 0)
        return torch.where(near[None] | in_sink, -torch.inf, torch.inf)
