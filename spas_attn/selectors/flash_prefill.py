"""FlashPrefill: keeps the blocks whose score comes near the largest of their row (arXiv 2603.06199)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_mask import cdiv
from ..call import Call
from ..checks import PerHead, check_range
from . import pooled
from .base import Selector, first_key
from .last_queries import last_query


@dataclass
class FlashPrefill(Selector):
    """Keeps a key block whose score exceeds ``alpha`` times the largest of its query block; nothing is sorted.

    Every query is scored against the mean key of each block that lies wholly at or before it (under causality); a
    block's score is the sum of the exponentials over the queries of the query block.

    Attributes:
        alpha: share of the largest score, in [0, 1], a float or a tensor ``[Hq]``; 0 keeps everything. The paper's
            Llama configuration has 0.18.
        sink_blocks: with ``sink``, how many blocks from the first visible key on are always kept.
        last_blocks: how many query blocks at the end of the sequence keep everything.
        local: always keep the blocks of the ``local`` keys before each query block, under causality; with the
            diagonal, 384 make the paper's window of 4 blocks.
    """

    alpha: PerHead = 0.18
    sink_blocks: int = 2
    last_blocks: int = 2
    local: int = dataclasses.field(default=384, kw_only=True)
    tuned: ClassVar[str] = "alpha"
    candidates: ClassVar[tuple[float, ...]] = tuple(1 - 2 ** (-step / 2) for step in range(1, 25))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, 0, 1)
        for name in ("sink_blocks", "last_blocks"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} must be a number of blocks, 0 or more, got {count!r}")

    def levels(self, call: Call) -> Tensor:
        scores = self.scores(call)
        largest = scores.amax(-1, keepdim=True)
        share = (scores - largest.masked_fill(largest == -torch.inf, 0.0)).exp()
        return (1.0 - share).masked_fill(self.always(call), -torch.inf)

    def scores(self, call: Call) -> Tensor:
        """Logs of the block scores, float32 ``[B, Hq, nq, nk]``; -inf for blocks that no query sees whole."""
        batch, heads = call.q.shape[:2]
        nq, nk = cdiv(call.q_len, self.block_q), cdiv(call.k_len, self.block_k)
        means, filled = pooled.block_means(call.k, self.block_k, call.key_mask)
        scores = call.q.new_empty((batch, heads, nq, nk), dtype=torch.float32)
        chunk = max(1, pooled._FINE_SCORES // (batch * heads * self.block_q * nk))
        for start in range(0, nq, chunk):
            part = call.q[:, :, start * self.block_q : (start + chunk) * self.block_q].float()
            count = part.shape[2]
            with torch.autocast(call.q.device.type, enabled=False):
                rows = part.reshape(batch, -1, call.group * count, part.shape[-1]) @ means.transpose(-1, -2)
            rows = rows.view(batch, heads, count, nk) * call.scale
            seen = self._seen_whole(call, start * self.block_q, count)
            if filled is not None:
                seen = seen & filled[:, None, None]
            rows = rows.masked_fill_(~seen, -torch.inf)
            missing = cdiv(count, self.block_q) * self.block_q - count
            rows = torch.nn.functional.pad(rows, (0, 0, 0, missing), value=-torch.inf)
            scores[:, :, start : start + chunk] = rows.unflatten(2, (-1, self.block_q)).logsumexp(3)
        return scores

    def always(self, call: Call) -> Tensor:
        """The first key blocks and the last query blocks, bool ``[B or 1, 1, nq, nk]``."""
        device = call.q.device
        key = torch.arange(cdiv(call.k_len, self.block_k), device=device)
        query = torch.arange(cdiv(call.q_len, self.block_q), device=device)
        first = (first_key(call) // self.block_k)[:, None, None]
        last = (last_query(call) // self.block_q)[:, None, None]
        sink = (key >= first) & (key < first + self.sink_blocks * self.sink)
        return (sink | (query[:, None] > last - self.last_blocks))[:, None]

    def _seen_whole(self, call: Call, start: int, count: int) -> Tensor:
        """Key blocks that lie wholly at or before the queries from ``start`` on, bool ``[count, nk]``."""
        device = call.q.device
        last_k = (torch.arange(0, call.k_len, self.block_k, device=device) + self.block_k).clamp(max=call.k_len) - 1
        if not call.is_causal:
            return torch.ones(count, len(last_k), dtype=torch.bool, device=device)
        position = torch.arange(start, start + count, device=device)[:, None] + call.offset
        seen = last_k <= position
        return seen if call.window is None else seen & (last_k > position - call.window)

    @property
    def threshold(self) -> PerHead:
        return 1.0 - self.alpha

    def tuned_to(self, threshold: Tensor, sparse: Tensor) -> Selector:
        return dataclasses.replace(self, alpha=torch.where(sparse, 1.0 - threshold, 0.0))
