"""Tiny random LLaMA models and hand-set thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import autotune.module
from autotune import SparseAttention
from autotune.tuned import Tuned
from modify_model.cli import tiny
from spas_attn import AttentionStats, Call, fallback_counts
from spas_attn.selectors import MeanSimilarity, Selector


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a LLaMA with 2 layers, 4 query heads of 32 and 2 KV heads; the same weights every time."""

    def make(attention: str = "sdpa", **changes: Any) -> LlamaForCausalLM:
        return tiny.llama(attention, **({"vocab_size": 64, "max_position_embeddings": 1024} | changes))

    return make


@pytest.fixture
def tokens() -> Callable[[int, int], torch.Tensor]:
    """Makes random token ids ``[batch, length]``."""

    def make(batch: int, length: int) -> torch.Tensor:
        return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(1))

    return make


@pytest.fixture
def left_padded() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Turns ids ``[batch, length]`` into a left-padded batch: ids and mask."""

    def pad(ids: torch.Tensor, padding: tuple[int, ...] = (0, 150)) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.ones_like(ids)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        return ids * mask, mask

    return pad


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Asserts a relative error in the Euclidean norm; random weights give outputs of no fixed scale."""

    def check(got: torch.Tensor, expected: torch.Tensor, ratio: float = 1e-5) -> None:
        error = float((got - expected).float().norm() / expected.float().norm())
        assert error < ratio, f"relative error {error:.1e}"

    return check


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Runs a test without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def set_sparse() -> Callable[..., list[SparseAttention]]:
    """Gives every SparseAttention thresholds that drop blocks (or, with cdf=1, keep all) and returns them."""

    def make_sparse(model: nn.Module, cdf: float = 0.4) -> list[SparseAttention]:
        inner = [module for module in model.modules() if isinstance(module, SparseAttention)]
        for module in inner:
            heads = module.heads
            sparse, threshold = torch.ones(heads, dtype=torch.bool), torch.full((heads,), cdf)
            module.set_thresholds(Tuned(sparse, threshold, torch.full((heads,), -1.0), torch.full((heads,), 50.0)))
            # Whatever the default selector is: blocks of 128, and nothing forced beside the diagonal and the sink.
            module.selector = MeanSimilarity(block_q=128, block_k=128, pool=16, local=0)
            module.record_density, module.last_density = True, None
        return inner

    return make_sparse


@pytest.fixture
def sparse_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Call, AttentionStats]]:
    """Every sparse call of any layer from here on, with its statistics."""
    seen = []
    attend = autotune.module.attend_again

    def spy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selector: Selector, options: dict[str, Any], **more: Any
    ) -> tuple[torch.Tensor, AttentionStats]:
        out, stats = attend(q, k, v, selector, options, **(more | {"wants_stats": True}))
        assert stats is not None
        seen.append((Call.make(q, k, v, **options).replace(**more["trusted"]), stats))
        return out, stats

    monkeypatch.setattr(autotune.module, "attend_again", spy)
    return seen


@pytest.fixture
def fallbacks() -> Iterator[Callable[[], dict[str, int]]]:
    """Returns the fallbacks counted since the test began, by reason."""
    before = fallback_counts()

    def since() -> dict[str, int]:
        counts = {reason: n - before.get(reason, 0) for reason, n in fallback_counts().items()}
        return {reason: n for reason, n in counts.items() if n}

    return since
