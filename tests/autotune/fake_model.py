"""A tiny stand-in for a patched model: layers that feed seeded activations to ``inner_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotune import SparseAttention
from autotune.module import Thresholds
from autotune.observe import Grid
from spas_attn import backends
from spas_attn.backends import Call
from spas_attn.selectors import MeanSimilarity

HEADS, K_HEADS, DIM = 4, 2, 16
GRID = Grid(cdf=(0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995), sim=(-1.0, 0.3), pv=(50.0, 16.0, 12.0, 8.0, 5.0))
BOUNDS = dict(l1=0.1, pv_l1=0.15, tail=1.5)


@dataclass(frozen=True)
class Prompt:
    """Activations to be made: topics of 64 tokens; ``noise`` spreads attention over all of them."""

    seed: int
    length: int = 512
    noise: float = 0.5


def activations(
    seed: int, q_len: int, k_len: int, noise: float = 0.5, heads: int = HEADS, k_heads: int = K_HEADS, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in which a query looks at the keys of its own topic; every head has more noise than the last."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centres = normal(6, DIM)
    topics = torch.randint(6, (k_len // 64 + 1,), generator=generator).repeat_interleave(64)[:k_len]
    spread = noise * (1 + torch.arange(heads)[:, None, None] / heads)
    k = 1.5 * centres[topics] + 0.3 * normal(batch, k_heads, k_len, DIM)
    q = 2.0 * centres[topics[k_len - q_len :]] + 3 * spread * normal(batch, heads, q_len, DIM)
    v = normal(batch, k_heads, k_len, DIM) + centres[topics]
    return q, k, v


def exact(call: Call) -> Tensor:
    """Dense attention in float32."""
    return backends.get("reference").run(call)


class FakeAttention(nn.Module):
    """One layer; ``projection`` is there so that the state_dict is not empty."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.projection = nn.Linear(2, 2)
        nn.init.eye_(self.projection.weight)  # every FakeModel is the same model to a checkpoint
        nn.init.zeros_(self.projection.bias)
        self.inner_attention = SparseAttention(selector=MeanSimilarity(pool=16, block_q=64, block_k=64), **settings)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = Call(q, k, v, is_causal=True, scale=DIM**-0.5)
        return self.inner_attention(q, k, v, dense=lambda: exact(call), is_causal=True, scale=DIM**-0.5)


class FakeModel(nn.Module):
    """Layers that run one after the other on activations of their own; fails at prompts whose seed is ``fail_at``."""

    def __init__(self, layers: int = 2, **settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FakeAttention(**settings) for _ in range(layers))
        self.fail_at: int | None = None
        self.ran: list[Prompt] = []

    @property
    def inner(self) -> list[SparseAttention]:
        return [layer.inner_attention for layer in self.layers]

    def forward(self, prompt: Prompt) -> list[Tensor]:
        self.ran.append(prompt)
        outputs = []
        for i, layer in enumerate(self.layers):
            if i == 1 and prompt.seed == self.fail_at:
                raise MemoryError("out of memory, as it happens")
            outputs.append(layer(*activations(prompt.seed * 10 + i, prompt.length, prompt.length, prompt.noise)))
        return outputs


def thresholds(heads: int = HEADS, cdf: float = 0.7, sim: float = -1.0, pv: float = 50.0) -> Thresholds:
    """The same values for all heads."""
    return Thresholds(
        torch.ones(heads, dtype=torch.bool),
        torch.full((heads,), cdf),
        torch.full((heads,), sim),
        torch.full((heads,), pv),
    )


def tuned_model(**settings: Any) -> FakeModel:
    """A model with thresholds that differ from head to head and layer to layer."""
    model = FakeModel(**settings)
    for i, module in enumerate(model.inner):
        values = thresholds()
        steps = torch.arange(HEADS) / 64 + i / 16
        module.set_thresholds(
            Thresholds(values.is_sparse, values.cdfthreshd + steps, values.simthreshd1 + steps, values.pvthreshd - i),
            expected_density=0.5 + i / 8,
            lengths=(400, 700),
        )
    return model


def same(a: Thresholds, b: Thresholds) -> bool:
    """Equal to the bit."""
    return all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )
