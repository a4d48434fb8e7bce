"""Separation: how clearly learnt gates say which heads need everything, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
LEAST_GAP = 0.5  # between the mean gates of full and of streaming heads
MOST_UNDECIDED = 0.25  # of the heads may have a gate between 0.25 and 0.75


@dataclass(frozen=True)
class Separation:
    """How far apart the gates of full and of streaming heads are.

    DuoAttention's published table of Llama-3.1-8B, whose quantiles (10, 25, 50, 75%) are .57, .84, .95 and .996, does
    not separate at half of the heads.

    Attributes:
        sparsity: share of streaming heads at which the gates are judged.
        quantiles: of the gates z of all heads, by level.
        gap: mean z of the full heads minus that of the streaming ones; NaN when all heads are of one kind.
        undecided: share of the heads with z in (0.25, 0.75).
        warning: what is wrong, in words; None when the gates separate.
    """

    sparsity: float
    quantiles: dict[float, float]
    gap: float
    undecided: float
    warning: str | None

    @classmethod
    def of(cls, table: Tensor, full: Tensor, sparsity: float) -> Separation:
        """Of a table of z ``[layers, KV heads]`` and the heads that are full, bool of the same shape."""
        quantiles = torch.quantile(table.flatten(), torch.tensor(LEVELS)).tolist()
        gap = float(table[full].mean() - table[~full].mean())
        undecided = float(((table > 0.25) & (table < 0.75)).float().mean())
        warning = _warning(gap, undecided, sparsity)
        return cls(sparsity, dict(zip(LEVELS, quantiles, strict=True)), gap, undecided, warning)

    def __str__(self) -> str:
        levels = ", ".join(f"{level:.0%} {value:.2f}" for level, value in self.quantiles.items())
        text = f"gates at sparsity {self.sparsity:.0%}: quantiles {levels}"
        text += "" if math.isnan(self.gap) else f"; gap {self.gap:.2f}"
        return text if self.warning is None else f"{text}\nwarning: {self.warning}"


def _warning(gap: float, undecided: float, sparsity: float) -> str | None:
    if math.isnan(gap):
        kind = "streams" if sparsity < 0.5 else "is full"
        return f"no head {kind} at sparsity {sparsity:.0%}: the gates have chosen nothing yet"
    if gap < LEAST_GAP:
        return (
            f"the gates do not separate: full and streaming heads differ by {gap:.2f} on average (of 1), so which "
            "heads stream is nearly arbitrary; train longer or with a stronger penalty, and compare with random heads"
        )
    if undecided > MOST_UNDECIDED:
        return (
            f"{undecided:.0%} of the gates lie between 0.25 and 0.75: these heads worked as a mixture of both "
            "attentions in training and will be one or the other when served"
        )
    return None
