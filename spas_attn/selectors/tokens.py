"""Tokens: keeps every block that touches given ranges of tokens (a text sink), for use with ``|``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Inputs, Selector

Ranges = tuple[tuple[int, int], ...] | list[tuple[int, int]]


@dataclass
class Tokens(Selector):
    """Keeps every block that touches one of the ranges, among the keys (for all queries) or the queries (all keys).

    Attributes:
        ranges: pairs (start, stop) in tokens, stop excluded; negative values count from the end.
        queries: also keep every key block for the query blocks that touch the ranges.
        keys: keep the key blocks that touch the ranges.
    """

    ranges: Ranges = ()
    queries: bool = True
    keys: bool = True

    def kept_blocks(self, inputs: Inputs) -> Tensor:
        visible = self.visible(inputs)
        kept = torch.zeros_like(visible)
        if self.keys:
            kept = kept | self._touched(inputs.k.shape[2], self.block_k, visible.device)
        if self.queries:
            kept = kept | self._touched(inputs.q.shape[2], self.block_q, visible.device)[:, None]
        return (kept & visible) | self.forced(inputs, visible)

    def _touched(self, length: int, block: int, device: torch.device) -> Tensor:
        starts = torch.arange(0, length, block, device=device)
        touched = torch.zeros(len(starts), dtype=torch.bool, device=device)
        for start, stop in self.ranges:
            first, end, _ = slice(start, stop).indices(length)
            if first < end:
                touched |= (starts < end) & (starts + block > first)
        return touched
