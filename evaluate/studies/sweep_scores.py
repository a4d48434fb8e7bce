#!/usr/bin/env python
"""Sweep ways of scoring blocks on the demo LLaMA: sparsity against perplexity for every variant.

    python evaluate/studies/sweep_scores.py --out out/scores --samples 6 --unseen 24
    python evaluate/studies/sweep_scores.py --out out/scores --selectors 16:mean:128 8:kvar+max+window1:64

The study behind the choice of the default selector. A variant is pool:kind:block. Meant for a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import sweep
import torch
import torch.nn.functional as F
from sweep import Setting
from sweep_llama import LlamaSweep
from torch import Tensor

from spas_attn.block_mask import blockwise
from spas_attn.call import Call
from spas_attn.selectors import MeanSimilarity, Selector
from spas_attn.selectors.pooled import _fine_visible, block_means
from spas_attn.selectors.ranking import mass_before

BOUNDS = (*((l1, None) for l1 in (0.01, 0.03, 0.06, 0.1)), *((1.0, tail) for tail in (0.3, 0.6, 0.8, 1.0)))
VARIANTS = (
    "{block}:mean", "16:mean", "8:mean", "8:anti", "16:kvar", "8:kvar", "16:kvar+qvar", "8:max", "8:union", "16:union",
    "8:kvar+union", "16:kvar+union", "8:kvar+max", "8:union+mix", "16:quest0.3", "16:quest0.3+union", "8:power2",
    "8:power4", "8:kvar+power4", "8:union+window1", "1:mean", "1:max", "1:union", "{block}:mean+window1",
    "8:mean+window1", "16:mean+window1", "8:kvar+window1", "16:kvar+window1", "8:max+window1", "16:max+window1",
    "8:kvar+max+window1", "16:kvar+max+window1", "16:kvar+union+window1", "8:anti+window1",
    "16:quest0.3+max+window1", "16:mean+window2", "8:kvar+max+window2", "1:mean+window1", "1:max+window1",
)  # fmt: skip


@dataclass
class Variant(Selector):
    """A way of scoring blocks.

    Attributes:
        cdf_threshold: share of the mass to keep.
        pool: length of the sub-blocks that are scored; 1 looks at the true scores.
        kind: words joined by "+": how sub-blocks are scored (mean, kvar, qvar, quest<weight>, anti), and how the rows
            of a query block are joined (their mean unless max, union, union+mix or power<p> is said).
    """

    cdf_threshold: float | Tensor = 0.95
    pool: int = 8
    kind: str = "mean"
    tuned: ClassVar[str] = "cdf_threshold"
    candidates: ClassVar[tuple[float, ...]] = MeanSimilarity.candidates

    def levels(self, call: Call) -> Tensor:
        probs = torch.softmax(self.scores(call), -1)
        rows = blockwise(probs, self.block_k // self.pool).sum(-1).unflatten(2, (-1, self.block_q // self.pool))
        forced, visible = self.forced(call), self.visible(call)
        if "max" in self.kind:  # the best row of the block, as a threshold on a probability
            return 1 - rows.amax(3)
        if "union" in self.kind:  # every row keeps its own mass: the block's level is the least over its rows
            key, order = rows.sort(-1, descending=True)
            level = torch.empty_like(key).scatter_(-1, order, key.cumsum(-1) - key).amin(3)
            return 0.5 * (level + mass_before(rows.mean(3), forced, visible)) if "mix" in self.kind else level
        if "power" in self.kind:  # sharpened towards the rows that need a block most
            power = self.number("power")
            sharp = rows.pow(power).sum(3).pow(1 / power)
            return mass_before(sharp / sharp.sum(-1, keepdim=True), forced, visible)
        return mass_before(rows.mean(3), forced, visible)

    def scores(self, call: Call) -> Tensor:
        """Log-mass of every key sub-block for every query sub-block, float32 ``[B, Hq, fine nq, fine nk]``."""
        q, k = call.q.float(), call.k.float().repeat_interleave(call.group, 1)
        (fine_q, _), (fine_k, _) = (block_means(x, self.pool, None) for x in (q, k))
        scores = fine_q @ fine_k.mT * call.scale
        if "kvar" in self.kind:  # second cumulant over the keys: log E exp(q·k) = q·mean + ½ Var(q·k)
            scores = scores + 0.5 * call.scale**2 * fine_q.square() @ self.variance(k, fine_k).mT
        if "qvar" in self.kind:
            scores = scores + 0.5 * call.scale**2 * self.variance(q, fine_q) @ fine_k.square().mT
        if "quest" in self.kind:  # upper bound over the box of the keys
            low, high = (sign * F.max_pool2d(sign * k, (self.pool, 1)) for sign in (-1, 1))
            box = fine_q.clamp(min=0) @ high.mT + fine_q.clamp(max=0) @ low.mT
            scores = torch.lerp(scores, box * call.scale, self.number("quest"))
        if "anti" in self.kind:  # antidiagonals of stride `pool` (XAttention, arXiv 2503.16428)
            strided_q = q.unflatten(2, (-1, self.pool)).flip(3).flatten(3)
            scores = strided_q @ k.unflatten(2, (-1, self.pool)).flatten(3).mT * call.scale / self.pool
        return scores.masked_fill(~_fine_visible(self, call, self.pool, 0, scores.shape[2]), -torch.inf)

    def variance(self, x: Tensor, mean: Tensor) -> Tensor:
        """Variance inside each sub-block, per channel."""
        return (block_means(x * x, self.pool, None)[0] - mean.square()).clamp(min=0)

    def number(self, word: str) -> float:
        """The number behind a word of the kind."""
        return float(self.kind.split(word)[1].split("+")[0])


def setting(variant: str) -> Setting:
    """The setting of a variant; "window<n>" in its kind keeps n key blocks before the diagonal."""
    pool, kind, block = variant.split(":")
    kind, _, window = kind.partition("+window")
    size = {"block_q": int(block), "block_k": int(block), "local": int(window or 0) * int(block)}
    return Setting(Variant(pool=int(pool), kind=kind, **size), BOUNDS)


class ScoreSweep(LlamaSweep):
    """Ways of scoring blocks."""

    settings: ClassVar = {
        name: setting(name) for block in (128, 64) for name in (f"{v.format(block=block)}:{block}" for v in VARIANTS)
    }
    out: ClassVar = "out/scores"


if __name__ == "__main__":
    sys.exit(sweep.main(ScoreSweep, __doc__))
