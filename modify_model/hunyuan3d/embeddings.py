"""What the shape models make of numbers: sinusoidal embeddings of the time and of points in space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def angles(t: Tensor, half: int, max_period: float) -> Tensor:
    """``t[:, None] * max_period ** (-i / half)`` for i = 0 … half - 1, in float32 or wider: ``[B, half]``."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    return t[:, None] * torch.exp(-math.log(max_period) * steps / half)


class TimeMLP(nn.Module):
    """Embeds a number between 0 and 1 for Hunyuan3DDiT: 256 waves ``[cos | sin]``, then two layers.

    The number is multiplied by ``factor`` (1000), and the same value is the longest period, where most models have
    10000: the published weights were trained with it.
    """

    def __init__(self, hidden_size: int, factor: float = 1000, waves: int = 256) -> None:
        super().__init__()
        self.factor, self.waves = factor, waves
        self.in_layer = nn.Linear(waves, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        """``[B]`` to ``[B, hidden_size]``, in the dtype of the weights."""
        turns = angles(self.factor * t, self.waves // 2, max_period=self.factor)
        waves = torch.cat([turns.cos(), turns.sin()], dim=-1).to(self.in_layer.weight.dtype)
        return self.out_layer(torch.nn.functional.silu(self.in_layer(waves)))


class TimeToken(nn.Module):
    """Embeds the time for HunYuanDiTPlain: ``hidden_size`` waves ``[sin | cos]`` of longest period 10000, the time in
    [0, 1] as it is, then two layers with an exact GELU between.
    """

    def __init__(self, hidden_size: int, max_period: float = 10000) -> None:
        super().__init__()
        self.hidden_size, self.max_period = hidden_size, max_period
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """``[B]`` to ``[B, 1, hidden_size]``, in the dtype of the weights."""
        turns = angles(t, self.hidden_size // 2, self.max_period)
        first: Any = self.mlp[0]
        waves = torch.cat([turns.sin(), turns.cos()], dim=-1).to(first.weight.dtype)
        return self.mlp(waves)[:, None]


def fourier(points: Tensor, frequencies: int) -> Tensor:
    """Points ``[..., 3]`` with sines and cosines of their coordinates times 1, 2, 4, …: ``[..., 3 + 6 * frequencies]``.

    The point itself comes first, then all sines (the frequencies of x, of y, of z), then all cosines.
    """
    powers = 2.0 ** torch.arange(frequencies, dtype=points.dtype, device=points.device)
    turns = (points[..., None] * powers).flatten(-2)
    return torch.cat([points, turns.sin(), turns.cos()], dim=-1)
