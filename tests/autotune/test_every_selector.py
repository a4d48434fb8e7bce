"""What every selector must do: select, be calibrated in a model, saved, loaded and joined with others.

A new selector is one line in SELECTORS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from autotune import calibrate, load_sparse_attention_state_dict
from autotune.module import sparse_modules
from modify_model import patch
from modify_model.cli import tiny
from spas_attn.call import Call
from spas_attn.selectors import Dense, MaxShare, MeanSimilarity, PeakMass, Selector, Streaming, Tokens, TopK
from spas_attn.selectors.base import keeps


@dataclass
class Nearest(Selector):
    """A selector of a user's own: keeps the key blocks within a share ``reach`` of the sequence."""

    reach: float | Tensor = 0.5
    tuned: ClassVar[str] = "reach"
    candidates: ClassVar[tuple[float, ...]] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def levels(self, call: Call) -> Tensor:
        starts_q = torch.arange(0, call.q_len, self.block_q) + call.offset
        starts_k = torch.arange(0, call.k_len, self.block_k)
        return ((starts_q[:, None] - starts_k).abs() / call.k_len)[None, None]


SIZES: dict[str, Any] = dict(block_q=64, block_k=64)
TEXT = Tokens(((100, 110),), sink=False, **SIZES)
SELECTORS: dict[str, Selector] = {
    "MeanSimilarity": MeanSimilarity(pool=8, local=64, **SIZES),
    "TopK": TopK(pool=16, local=0, **SIZES),
    "PeakMass": PeakMass(pool=16),
    "MaxShare": MaxShare(0.5, local=0, **SIZES),
    "Streaming": Streaming(64, 100, **SIZES),
    "Dense": Dense(**SIZES),
    "Tokens": Tokens(((0, 70), (250, 300)), **SIZES),
    "MeanSimilarity | Tokens": MeanSimilarity(pool=8, **SIZES) | TEXT,
    "a user's own": Nearest(**SIZES),
}
every = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS.keys())


def call_of(is_causal: bool, length: int = 400) -> Call:
    """Two sequences, four query heads, two KV heads; of the first sequence the first 80 keys are padding."""
    generator = torch.Generator().manual_seed(length)
    q, k = (2 * torch.randn(2, heads, length, 32, generator=generator) for heads in (4, 2))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :80] = False
    return Call.make(q, k, k, is_causal=is_causal, attn_mask=mask)


@every
@pytest.mark.parametrize("is_causal", [True, False])
def test_selects(selector: Selector, is_causal: bool) -> None:
    call = call_of(is_causal)
    levels, kept = selector.final_levels(call), selector.kept(call)
    visible, forced = (x.expand_as(kept) for x in (selector.visible(call), selector.forced(call)))
    assert levels.dtype == torch.float32 and levels.shape == kept.shape == (2, 4, 7, 7)
    assert kept[forced].all(), "forced blocks are kept"
    assert not kept[~visible].any(), "invisible ones are not"
    assert kept.any(-1)[visible.any(-1)].all(), "no row stays empty"
    assert torch.equal(kept, keeps(levels, torch.as_tensor(selector.threshold)))
    mask = selector.select(call.q, call.k, is_causal=is_causal, attn_mask=call.attn_mask)
    assert torch.equal(mask.to_dense(), kept)
    everything = selector.tuned_to(torch.full((4,), 0.5), torch.tensor([True, False, True, False])).kept(call)
    assert torch.equal(everything[:, 1::2], visible[:, 1::2]), "dense heads keep everything"
    assert Selector.from_dict(selector.to_dict()) == selector


@every
def test_later_tokens_do_not_change_earlier_selections(selector: Selector) -> None:
    call = call_of(is_causal=True)
    before = selector.kept(call)
    q, k = call.q.clone(), call.k.clone()
    q[:, :, 256:], k[:, :, 256:] = 9.0, -9.0
    after = selector.kept(call.replace(q=q, k=k, v=k))
    assert torch.equal(before[:, :, :4], after[:, :, :4])


@every
def test_a_union_with_tokens_keeps_what_either_keeps(selector: Selector) -> None:
    call = call_of(is_causal=False)
    both = (selector | TEXT).kept(call)
    text = keeps(TEXT.levels(call), torch.zeros(())) & TEXT.visible(call)  # without the rule against empty rows
    assert torch.equal(both, selector.kept(call) | text)


def ids(seed: int, length: int = 400) -> Tensor:
    return torch.randint(3, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def fields(selector: Selector) -> dict[str, Any]:
    """Everything but the thresholds, which the layers of a model have."""
    return {name: value for name, value in selector.to_dict().items() if name != selector.tuned}


@every
@torch.no_grad()
def test_is_calibrated_saved_and_loaded_in_a_model(selector: Selector, tmp_path: Path) -> None:
    model = patch(tiny.llama(), l1=0.9, pv_l1=0.95, tail=None, selector=selector)
    with calibrate(model, query_blocks=3, rounds=1) as calibration:
        for seed in calibration.prompts(range(3)):
            model(ids(seed), use_cache=False)
    modules = list(sparse_modules(model).values())
    on = torch.cat([module.is_sparse for module in modules])
    assert bool(on.any()) is not isinstance(selector, Dense)
    tried = {round(1.0, 6), *(round(value, 6) for value in selector.candidates)}
    assert {round(float(x), 6) for module in modules for x in module.cdfthreshd} <= tried
    statistics = calibration.save(tmp_path / "tuned.pt")
    assert statistics.is_file()
    out = model(ids(9), use_cache=False).logits
    if selector.tuned and bool(on.any()):
        assert not torch.equal(out, tiny.llama()(ids(9), use_cache=False).logits)

    fresh = patch(tiny.llama())  # with another selector
    load_sparse_attention_state_dict(fresh, tmp_path / "tuned.pt")
    assert torch.equal(fresh(ids(9), use_cache=False).logits, out)
    loaded = next(iter(sparse_modules(fresh).values())).selector
    assert fields(loaded) == fields(selector)
