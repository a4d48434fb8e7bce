"""A tiny stand-in for a patched model: layers that feed seeded activations to ``inner_attention``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotune import Calibration, Grid, SparseAttention, Tuned, calibrate
from autotune.tuned import FILE_KEYS
from spas_attn import backends
from spas_attn.call import Call
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


PROMPTS = [Prompt(seed, length) for seed, length in enumerate((512, 400, 450, 330, 512, 380))]
SETTINGS: dict[str, Any] = dict(grid=GRID, query_blocks=4, **BOUNDS)


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
    return backends.get("reference").compute(call)


class FakeAttention(nn.Module):
    """One layer; ``projection`` is there so that the state_dict is not empty."""

    def __init__(self, heads: int = HEADS, **settings: Any) -> None:
        super().__init__()
        self.projection = nn.Linear(2, 2)
        nn.init.eye_(self.projection.weight)  # every FakeModel is the same model to a checkpoint
        nn.init.zeros_(self.projection.bias)
        selector = MeanSimilarity(pool=16, block_q=64, block_k=64)
        self.inner_attention = SparseAttention(**({"selector": selector} | settings))
        self.inner_attention.set_heads(heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = Call.make(q, k, v, is_causal=True)
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


def tuned(heads: int = HEADS, threshold: float = 0.7, sim: float = -1.0, pv: float = 50.0, **more: Any) -> Tuned:
    """The same values for all heads, all of them sparse."""
    full = (torch.full((heads,), value) for value in (threshold, sim, pv))
    return Tuned(torch.ones(heads, dtype=torch.bool), *full, **more)


def tuned_model(**settings: Any) -> FakeModel:
    """A model with thresholds that differ from head to head and layer to layer."""
    model = FakeModel(**settings)
    steps = torch.arange(HEADS) / 64
    for i, module in enumerate(model.inner):
        on, full = torch.ones(HEADS, dtype=torch.bool), torch.ones(HEADS)
        more = dict(expected_density=0.5 + i / 8, lengths=(400, 700), bounds=(module.l1, module.pv_l1, module.tail))
        shift = steps + i / 16
        module.set_thresholds(Tuned(on, 0.7 + shift, -1.0 + shift, 50.0 * full - i, **more))
    return model


def same(a: Tuned | None, b: Tuned | None) -> bool:
    """Equal to the bit."""
    assert a is not None and b is not None
    pairs = [(getattr(a, name), getattr(b, name)) for name in FILE_KEYS.values()]
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def equal_results(a: FakeModel, b: FakeModel) -> bool:
    """Whether all layers have the same thresholds, to the bit."""
    return all(same(x.tuned, y.tuned) for x, y in zip(a.inner, b.inner, strict=True))


def tune(model: FakeModel, prompts: list[Any] = PROMPTS, errors: Any = (), **changes: Any) -> Calibration:
    """Calibrate with SETTINGS but for ``changes``; a prompt that fails with one of ``errors`` is passed over."""
    with calibrate(model, **(SETTINGS | changes)) as calibration:
        for prompt in calibration.prompts(prompts):
            with contextlib.suppress(errors):
                model(prompt)
    return calibration
