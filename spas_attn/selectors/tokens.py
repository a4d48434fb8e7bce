"""Tokens: keeps every block that touches given ranges of tokens (a text sink), for use with ``|``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call, Ranges
from ..checks import check_flag
from .base import Selector


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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("queries", self.queries)
        check_flag("keys", self.keys)
        self.ranges = tuple(tuple(pair) for pair in self.ranges)  # type: ignore[misc]
        for pair in self.ranges:
            if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int) for x in pair):
                raise ValueError(f"ranges must be pairs (start, stop) of whole numbers, got {pair}")

    def levels(self, call: Call) -> Tensor:
        keys = self.touched(call.k_len, self.block_k, call.q.device) & self.keys
        queries = self.touched(call.q_len, self.block_q, call.q.device) & self.queries
        return torch.where(keys | queries[:, None], -torch.inf, torch.inf)[None, None]

    def touched(self, length: int, block: int, device: torch.device) -> Tensor:
        """Blocks of ``length`` tokens that touch a range, bool ``[n]``; made on the device."""
        starts = torch.arange(0, length, block, device=device)
        touched = torch.zeros(len(starts), dtype=torch.bool, device=device)
        for start, stop in self.ranges:
            # As slices count; slice.indices itself breaks graphs in torch 2.11.
            first, end = (min(max(x + length if x < 0 else x, 0), length) for x in (start, stop))
            if first < end:
                touched |= (starts < end) & (starts + block > first)
        return touched
