"""Models whose layers feed each other, so that what a layer loses reaches the output: logits, or a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fake_model import DIM, HEADS, FakeAttention, Prompt, activations
from torch import Tensor, nn

from autotune import Calibration, SparseAttention, calibrate
from spas_attn.selectors import MeanSimilarity


@dataclass
class Logits:
    """What a language model returns."""

    logits: Tensor


class Chain(nn.Module):
    """Layers one after the other; what each adds to the output is weighted with ``weights``.

    Args:
        weights: of the layers' outputs; the model is as sensitive to a layer as its weight is large.
        logits: return logits over 11 words, otherwise the output itself.
    """

    def __init__(self, weights: tuple[float, ...] = (1.0, 1.0), *, logits: bool = True, **settings: Any) -> None:
        super().__init__()
        self.weights, self.gives_logits = weights, logits
        settings = {"selector": MeanSimilarity(pool=16, block_q=64, block_k=64, local=0)} | settings
        self.layers = nn.ModuleList(FakeAttention(**settings) for _ in weights)
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Parameter(torch.randn(HEADS * DIM, 11, generator=generator), requires_grad=False)
        self.ran: list[Any] = []

    @property
    def inner(self) -> list[SparseAttention]:
        return [layer.inner_attention for layer in self.layers]

    def forward(self, prompt: Prompt) -> Logits | Tensor:
        self.ran.append(prompt)
        total: Any = 0.0
        for i, (layer, weight) in enumerate(zip(self.layers, self.weights, strict=True)):
            out = layer(*activations(prompt.seed * 10 + i, prompt.length, prompt.length, prompt.noise))
            total = total + weight * out.transpose(1, 2).flatten(2)
        return Logits(total @ self.head) if self.gives_logits else total


def run(model: Chain, prompts: list[Prompt], **options: Any) -> Calibration:
    """Calibrate."""
    with calibrate(model, **options) as calibration:
        for prompt in calibration.prompts(prompts):
            model(prompt)
    return calibration
