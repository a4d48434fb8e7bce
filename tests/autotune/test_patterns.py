"""MInference's offline search: heads with a known structure get the pattern that was made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import FakeModel, Prompt
from random_calls import random_call
from torch import Tensor

from autotune import SparseAttention
from autotune.patterns import CANDIDATES, PatternSearch, _block_mass
from modify_model import patch
from modify_model.cli import tiny
from spas_attn import Call
from spas_attn.published import minference_table
from spas_attn.selectors import MInference
from spas_attn.selectors.last_queries import last_queries
from spas_attn.selectors.minference import LAST_QUERIES

SIZES: dict[str, Any] = {"block_q": 64, "block_k": 64}


def structured(length: int = 2048, dim: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Four heads: two look at a few keys, one at what is near (but its last queries do not), one at its topic."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, dim, generator=generator), dim=-1)

    q, k = 0.1 * normal(4, length), normal(4, length)
    for head, keys in ((0, slice(300, 330)), (1, slice(500, 505))):
        column = normal(1)
        k[head, keys] = column
        q[head] += column
    for i in range(0, length, 64):
        k[2, i : i + 64] = normal(1)
        q[2, i : i + 64] = sum(0.5 * k[2, max(i - back, 0)] for back in range(0, 320, 64))
    q[2, -64:] = normal(64)
    topics, centres = torch.arange(length) // 128 % 4, normal(4)
    k[3], q[3] = centres[topics], centres[topics.flip(0)]
    return (30 * q)[None], k[None], normal(1, 4, length)


class Structured(torch.nn.Module):
    """One layer with those heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner_attention = SparseAttention(selector=MInference(**SIZES))

    def forward(self) -> Tensor:
        q, k, v = structured()
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        return self.inner_attention(q, k, v, dense=lambda: dense, is_causal=True, scale=1.0)


def test_heads_get_the_pattern_made_for_them(tmp_path: Path) -> None:
    model, options = Structured(), dict(density=0.4, query_blocks=None, **SIZES)
    with PatternSearch(model, candidates=CANDIDATES[:-1], **options) as lines:
        model()
    assert model.inner_attention.mode == "dense" and model.inner_attention.observer is None
    (layer,) = lines.table
    assert [layer[head][0] for head in ("0", "1", "2")] == ["vertical_and_slash"] * 2 + ["stream_llm"]
    assert layer["0"][1] > 30 and layer["2"][2] > 256, "what each needs"
    with PatternSearch(model, **options) as search:
        model()
    (layer,) = search.table
    assert layer["3"][0] == "block_sparse"
    assert all(0.5 < layer[head][3] <= 1 for head in layer)
    assert all(layer[head][3] >= lines.table[0][head][3] for head in layer), "more candidates, no less mass"
    file = search.save(tmp_path / "folder" / "table.json")
    assert json.loads(file.read_text()) == search.table
    (selector,) = search.selectors()
    (read,) = minference_table(file, layers=1, heads=len(layer), **SIZES)
    assert read.to_dict() == selector.to_dict()
    assert isinstance(selector.pattern, tuple) and selector.pattern[3] == "block_sparse"
    q, k, _ = structured()
    density = selector.select(q, k, is_causal=True, scale=1.0).density(is_causal=True)
    assert bool((density < 0.6).all()), density


def test_mass_and_cost_equal_loops() -> None:
    """The share of each block, the blocks at equal cost, and what they retain."""
    call = random_call(12, is_causal=True, padded=False).replace(window=None)
    search = PatternSearch(FakeModel(), density=0.4, **SIZES)
    blocks = [0, 2, 4]
    for i, (mass, queries) in zip(blocks, _block_mass(call, search.selector, blocks), strict=True):
        for head in range(4):
            expected = torch.zeros(mass.shape[-1])
            rows = range(i * 64, min(i * 64 + 64, call.q_len))
            for row in rows:
                scores = call.k[1, head // 2] @ call.q[1, head, row] * call.scale
                scores[row + call.offset + 1 :] = -torch.inf
                for j, p in enumerate(scores.softmax(0).split(64)):
                    expected[j] += p.sum()
            assert torch.allclose(mass[1, head], expected, atol=1e-4)
            assert int(queries[1, head]) == len(rows)
    visible = search.selector.visible(call).expand(2, 4, -1, -1)
    for level in search._levels(call):
        scale, share = search._at_equal_cost(call, level)
        assert not share[~visible].any()
        least = search.selector.forced(call).sum()
        cost = share.sum((-2, -1))
        assert torch.allclose(cost, (0.4 * visible.sum((-2, -1))).clamp(min=float(least)), atol=1.0)
        assert bool((share[level < scale[..., None, None]] == 1)[visible[level < scale[..., None, None]]].all())


@pytest.mark.parametrize("candidate", [c for c in CANDIDATES if c[0] != "block_sparse"], ids=str)
def test_levels_are_the_scale_from_which_a_selector_keeps_a_block(candidate: tuple[str, int, int]) -> None:
    call = random_call(12, is_causal=True, padded=False)
    search = PatternSearch(FakeModel(), candidates=(candidate,), **SIZES)
    (level,) = search._levels(call)
    name, vertical, slash = candidate
    for scale in (0.03, 0.1, 0.5):
        sizes = vertical * scale, slash * scale
        if sizes[0] < 30 or sizes[1] < 50:
            continue  # the selector keeps that many in any case
        kept = MInference(name, *sizes, sink=False, **SIZES).levels(call) == -torch.inf
        assert torch.equal(kept, level < scale)


def test_in_a_model() -> None:
    model = patch(tiny.llama(), selector=MInference(**SIZES))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (1, 400), generator=generator)
    plain = model(ids, use_cache=False).logits
    with PatternSearch(model, query_blocks=3, **SIZES) as search:
        assert torch.equal(model(ids, use_cache=False).logits, plain)
        model(ids[:, :300], use_cache=False)
    assert len(search.table) == len(search.selectors()) > 1
    assert all(len(layer) == selector_heads(search) for layer in search.table)
    assert search.table == search.table


def selector_heads(search: PatternSearch) -> int:
    return len(search.selectors()[0].pattern)


def test_refusals() -> None:
    model = FakeModel()
    for field, bad in (("density", 0.0), ("density", 1.5), ("density", True), ("query_blocks", 0), ("candidates", ())):
        with pytest.raises(ValueError, match=f"{field} must"):
            PatternSearch(model, **{field: bad})
    with pytest.raises(ValueError, match="pattern must be one of"):
        PatternSearch(model, candidates=(("diagonal", 1, 1),))
    with pytest.raises(ValueError, match="sizes above 0"):
        PatternSearch(model, candidates=(("a_shape", 0, 0),))
    with pytest.raises(ValueError, match="patch it first"):
        PatternSearch(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="saw no call to search on"), PatternSearch(model):
        pass
    with PatternSearch(model, **SIZES):
        with pytest.raises(RuntimeError, match="being calibrated already"), PatternSearch(model):
            pass
        model(Prompt(0))


def test_estimates_are_those_of_the_selector() -> None:
    """The search ranks lines as the selector does: same last queries."""
    call = Call.make(*structured()[:2], structured()[1], is_causal=True, scale=1.0)
    columns, _ = MInference.line_places(call, ("vertical_slash",) * 4, last_queries(call, LAST_QUERIES))
    best = columns[0, 0].argsort()[:60].tolist()
    assert set(range(30)) <= set(best) and set(range(300, 330)) <= set(best)
