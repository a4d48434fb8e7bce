"""Variations on exact keys that are tried, not shipped: which queries speak, who judges, and what is kept anyhow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spas_attn.call import Call
from spas_attn.selectors import ExactKeys
from spas_attn.selectors.pooled import mean_row, probabilities
from spas_attn.selectors.ranking import mass_before, places

# Which query of a stretch [..., pool, D] speaks for it.
PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "longest": lambda queries: queries.norm(dim=-1).argmax(-1),
    "farthest": lambda queries: (queries - queries.mean(-2, keepdim=True)).norm(dim=-1).argmax(-1),
}


@dataclass
class Probe(ExactKeys):
    """ExactKeys, varied.

    Attributes:
        pick: which real query of a stretch speaks for it, a name of PICKS; "" for what ``queries`` says.
        means: tokens of further stretches whose means are rows too; 0 for none.
        power: a block counts by the power mean of what the rows give it: 1 for their mean, inf for the largest.
        order: what a threshold is for: "mass", kept until the mass reaches it; "share", every block of at least so much
            of a row's mass; "root", of the root of that share times the mass that is not kept before it, which is
            where the sum of squared errors falls least for its block.
        beside: weight of what the query blocks before and after see; along: the same, moved on by as many key blocks.
        others: weight of the mean over the heads of a KV head.
        alive: share of the visible blocks that the rows judge: those of most mass by a coarser look, the means of
            ``coarse`` queries. The others have the mass that those give them.
        near: the rows judge the blocks of so many last keys only, in the same way; 0 for all.
        coarse: tokens of the stretches of the coarser look; 0 for the whole block.
        floor: share of the visible blocks that is kept at least.
    """

    pick: str = ""
    means: int = 0
    power: float = 1.0
    order: str = "mass"
    beside: float = 0.0
    along: float = 0.0
    others: float = 0.0
    alive: float = 1.0
    near: int = 0
    coarse: int = 0
    floor: float = 0.0
    packs: ClassVar[bool] = False

    def levels(self, call: Call) -> Tensor:
        forced, visible = self.forced(call), self.visible(call)
        rows = self.rows(call)
        if self.means:
            rows = torch.cat([rows, self._plain(self.means).rows(call)], 3)
        if self.alive < 1 or self.near:
            levels = self._coarse_to_fine(rows, call, forced, visible)
        else:
            levels = self._ranked(self._shares(rows, call, visible), forced, visible)
        if self.floor:
            first = places(1.0 - levels, forced, visible) < self.floor * visible.sum(-1, keepdim=True)
            levels = levels.masked_fill(first, -torch.inf)
        return levels

    def _shares(self, rows: Tensor, call: Call, visible: Tensor) -> Tensor:
        """What the rows give every block ``[B, Hq, nq, nk]``, with what is seen elsewhere."""
        probs = probabilities(rows)
        if self.power == torch.inf:
            shares = probs.amax(-2)
        elif self.power == 1:
            shares = mean_row(probs)
        else:
            shares = probs.pow(self.power).mean(-2).pow(1 / self.power)
        for weight, step in ((self.beside, 0), (self.along, 1)):
            if weight:
                around = F.pad(shares, (1, 1, 1, 1))
                nq, nk = shares.shape[-2:]
                moved = [around[..., 1 + i : 1 + i + nq, 1 + i * step : 1 + i * step + nk] for i in (-1, 1)]
                shares = shares + weight * (moved[0] + moved[1]).masked_fill(~visible, 0.0)
        if self.others:
            mean = shares.unflatten(1, (-1, call.group)).mean(2).repeat_interleave(call.group, 1)
            shares = (1 - self.others) * shares + self.others * mean
        return shares

    def _ranked(self, shares: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        if self.order == "share":
            return (1.0 - shares).clamp(min=0.0)
        before = mass_before(shares / shares.sum(-1, keepdim=True).clamp(min=1e-30), forced, visible)
        if self.order == "root":
            return (1.0 - (shares * (1.0 - before).clamp(min=0.0)).sqrt()).clamp(min=0.0)
        return before

    def vectors(self, call: Call) -> tuple[Tensor, Tensor | None]:
        if not self.pick:
            return super().vectors(call)
        if call.key_mask is not None:
            raise ValueError(f"pick={self.pick!r} is not made for padding")
        missing = -call.q_len % self.pool
        q = torch.cat([call.q, call.q[:, :, -1:].expand(-1, -1, missing, -1)], 2).float().unflatten(2, (-1, self.pool))
        chosen = PICKS[self.pick](q)[..., None, None].expand(*q.shape[:3], 1, q.shape[-1])
        return q.gather(3, chosen)[..., 0, :], None

    def _plain(self, pool: int) -> ExactKeys:
        return ExactKeys(pool=pool, block_q=self.block_q, block_k=self.block_k, local=self.local)

    def _coarse_to_fine(self, rows: Tensor, call: Call, forced: Tensor, visible: Tensor) -> Tensor:
        coarse = mean_row(probabilities(self._plain(self.coarse or self.block_q).rows(call)))
        hopeless = places(coarse, forced, visible) >= self.alive * visible.sum(-1, keepdim=True)
        if self.near:
            ends = (torch.arange(visible.shape[-1], device=coarse.device) + 1) * self.block_k
            starts = torch.arange(visible.shape[-2], device=coarse.device)[:, None] * self.block_q + call.offset
            hopeless = hopeless | (ends <= starts - self.near)
        fine = mean_row(probabilities(rows.masked_fill_(hopeless[:, :, :, None], -torch.inf)))
        left = (coarse * hopeless).sum(-1, keepdim=True)
        return mass_before(torch.where(hopeless, coarse, (1 - left) * fine), forced, visible)
