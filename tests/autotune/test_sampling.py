"""What is looked at: the reservoir of calls without a loop, and query blocks as calls of their own."""

from __future__ import annotations

import math

import pytest
import torch
from every_selector import every
from fake_model import GRID, HEADS, activations, tuned

from autotune import SparseAttention
from autotune.accumulate import PromptTally, add_pv_curves
from autotune.sampling import Reservoir, parts
from spas_attn.call import Call
from spas_attn.selectors import MeanSimilarity, Selector


def test_the_reservoir_is_a_uniform_sample_within_its_budget() -> None:
    selector = MeanSimilarity(pool=16, block_q=64, block_k=64)
    counts, x = torch.zeros(12), torch.zeros(1, 1, 64, 16)
    for seed in range(150):
        reservoir = Reservoir(4 * (3 * 64 * 16 * 4), seed)
        for number in range(12):
            reservoir.offer(number, Call.make(x, x, x), selector, [0])
            assert sum(reservoir.used) <= reservoir.budget
        assert len(reservoir.calls) == 4 and len({n for n, _ in reservoir.calls}) == 4
        for number, _ in reservoir.calls:
            counts[number] += 1
    expected = 150 * 4 / 12
    assert (counts - expected).abs().max() < 4.5 * math.sqrt(expected * 2 / 3)
    x = torch.zeros(1, 1, 640, 16)
    one = Reservoir(1000, 0)
    one.offer(0, Call.make(x, x, x), selector, [0, 3])
    assert len(one.calls) == 1, "a single call is always held"


@pytest.mark.parametrize(
    ("q_len", "k_len", "is_causal", "padded", "block_q", "block_k"),
    [
        (512, 512, True, False, 64, 64),
        (333, 333, True, False, 128, 64),
        (256, 384, True, True, 64, 128),
        (200, 460, True, False, 64, 64),
        (256, 384, True, True, 64, 64),
        (512, 512, False, False, 64, 128),
        (333, 333, False, True, 64, 64),
        (200, 460, False, True, 128, 64),
    ],
)
def test_parts_of_a_call_are_treated_as_the_whole(
    q_len: int, k_len: int, is_causal: bool, padded: bool, block_q: int, block_k: int
) -> None:
    mask = torch.arange(k_len)[None] >= 70 if padded else None
    call = Call.make(*activations(3, q_len, k_len), is_causal=is_causal, attn_mask=mask)
    module = SparseAttention(selector=MeanSimilarity(pool=16, block_q=block_q, block_k=block_k))
    module.set_thresholds(tuned(threshold=0.8, sim=0.3))
    blocks = [0, 1, -(-q_len // block_q) - 1]
    whole, split = (PromptTally(HEADS, len(GRID.pv)) for _ in range(2))
    add_pv_curves(whole, module, call, GRID, blocks)
    for part, inside in parts(call, module.selector, blocks):
        add_pv_curves(split, module, part, GRID, inside)
    assert torch.equal(whole.kept, split.kept) and torch.equal(whole.possible, split.possible)
    torch.testing.assert_close(whole.sums, split.sums, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.histogram.sum(-1), split.histogram.sum(-1))


@every
@pytest.mark.parametrize("is_causal", [True, False])
def test_parts_are_selected_for_as_in_the_whole(selector: Selector, is_causal: bool) -> None:
    """A rule that looks at the end of the sequence, or at all of it, gets the whole call."""
    call = Call.make(*activations(5, 512, 512), is_causal=is_causal)
    levels = selector.final_levels(call)
    blocks = [1, 3]
    for number, (part, inside) in enumerate(parts(call, selector, blocks)):
        for i in inside:
            row = selector.final_levels(part)[:, :, i]
            expected = levels[:, :, blocks[number] if inside == [0] else i, : row.shape[-1]]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
