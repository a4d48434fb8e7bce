"""What every selector must hold: the table in every_selector.py through random calls."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
import torch
from every_selector import LOOKS_AT_THE_END, SIZES, every
from random_calls import HEADS, by_pairs, drawn, random_call
from torch import Tensor

from spas_attn import Call, sparse_attention
from spas_attn.selectors import (
    ByHead,
    Dense,
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    PeakMass,
    Selector,
    Streaming,
    Tokens,
    TopK,
    Union,
    XAttention,
)
from spas_attn.selectors.by_head import for_heads


def all_dense(selector: Selector) -> Selector:
    return selector.tuned_to(torch.full((HEADS,), 0.5), torch.zeros(HEADS, dtype=torch.bool))


@every
@pytest.mark.parametrize("seed", range(12))
def test_selection(selector: Selector, seed: int) -> None:
    call = random_call(seed)
    before = [x.clone() for x in (call.q, call.k)]
    levels, kept = selector.final_levels(call), selector.kept(call)
    visible, must = (x[:, None].expand_as(kept) for x in by_pairs(call, selector))
    assert levels.dtype == torch.float32
    assert not levels.isnan().any()
    assert not (kept & ~visible).any(), "an invisible block was kept"
    assert (kept | ~must).all(), "a forced block is missing"
    assert (kept.any(-1) | ~visible.any(-1)).all(), "a query block keeps nothing"
    threshold = torch.as_tensor(selector.threshold, dtype=torch.float32)
    assert torch.equal(kept, levels < threshold)
    options = {"is_causal": call.is_causal, "scale": call.scale, "attn_mask": call.attn_mask, "window": call.window}
    mask = selector.select(call.q, call.k, **options)  # type: ignore[arg-type]
    assert torch.equal(mask.to_dense(), kept)
    assert torch.equal(kept, selector.kept(call)), "it is not deterministic"
    assert all(torch.equal(x, y) for x, y in zip(before, (call.q, call.k), strict=True)), "inputs were changed"


@every
@pytest.mark.parametrize("seed", range(8))
def test_later_tokens_do_not_move_earlier_query_blocks(selector: Selector, seed: int) -> None:
    """Under causality; a selector may look to the end of its query block, never further (two do, by design)."""
    if isinstance(selector, LOOKS_AT_THE_END):
        return
    call = random_call(seed, is_causal=True)
    chance = random.Random(seed)
    blocks = selector.kept(call).shape[2]
    changed = chance.randrange(blocks)  # the first query block that sees something new
    first = changed * selector.block_q
    value = chance.choice([3.0, -100.0, 60000.0])
    q, k = call.q.clone(), call.k.clone()
    q[:, :, first:] *= value
    k[:, :, first + call.offset :] *= -value
    later = call.replace(q=q, k=k, v=k)
    levels = [selector.final_levels(x)[:, :, :changed] for x in (call, later)]
    assert torch.equal(*levels), "at any threshold"


@every
def test_part_of_the_heads(selector: Selector) -> None:
    """Two ranks that hold half of the heads each select as one device does."""
    call = random_call(5, padded=False)
    selector = selector.tuned_to(torch.tensor([0.1, 0.6, 0.9, 0.1]), torch.tensor([True, True, True, False]))
    kept = selector.kept(call)
    for rank in (0, 1):
        k = call.k[:, rank : rank + 1]
        half = call.replace(q=call.q[:, 2 * rank : 2 * rank + 2], k=k, v=k)
        own = for_heads(selector, (2 * rank, 2 * rank + 1), HEADS)
        assert torch.equal(own.kept(half), kept[:, 2 * rank : 2 * rank + 2])


@every
def test_thresholds_per_head(selector: Selector) -> None:
    """A head's selection depends on its own queries, keys and threshold; more threshold keeps more, 1 keeps all."""
    call = random_call(5, padded=False)
    visible = by_pairs(call, selector)[0][:, None]
    sparse = torch.tensor([True, True, True, False])
    thresholds = torch.tensor([0.1, 0.6, 1.0, 0.1])
    kept = selector.tuned_to(thresholds, sparse).kept(call)
    assert torch.equal(kept[:, 3:], visible.expand_as(kept)[:, 3:]), "a head that is not sparse keeps everything"
    for h in range(3):
        group = call.k[:, h // 2 : h // 2 + 1]
        alone = call.replace(q=call.q[:, h : h + 1], k=group, v=group)
        one = of_head(selector, h).tuned_to(thresholds[h : h + 1], sparse[h : h + 1])
        assert torch.equal(one.kept(alone), kept[:, h : h + 1]), h
    if selector.tuned:
        assert torch.equal(kept[:, 2:3], visible.expand_as(kept)[:, 2:3]), "1 is 1, whatever rounding the sums had"
        less = torch.zeros_like(kept)
        for threshold in (0.05, 0.3, 0.6, 0.9, 0.999, 1.0):
            more = selector.tuned_to(torch.full((HEADS,), threshold), torch.ones(HEADS, dtype=torch.bool)).kept(call)
            assert not (less & ~more).any()
            less = more
    else:
        assert torch.equal(kept[:, :3], selector.kept(call)[:, :3]), "a rule has no threshold"
    assert torch.equal(all_dense(selector).kept(call), visible.expand_as(kept))


def of_head(selector: Selector, head: int) -> Selector:
    """The selector as one head has it."""
    if isinstance(selector, ByHead):
        return dataclasses.replace(selector, streams=(selector.streams[head],))
    if not isinstance(selector, MInference) or isinstance(selector.pattern, str):
        return selector
    return dataclasses.replace(selector, pattern=selector.pattern[head])


@every
def test_as_plain_values(selector: Selector) -> None:
    call = random_call(7)
    sparse = torch.tensor([True, False, True, True])
    tokens = Tokens(((3, 9),), block_q=selector.block_q, block_k=selector.block_k)
    tuned = selector.tuned_to(torch.tensor([0.3, 0.5, 0.7, 0.123456789]), sparse)
    for made in (selector, tuned, selector | tokens, tokens | tuned):
        content = made.to_dict()
        assert content.keys() == {"class", *(field.name for field in dataclasses.fields(made))}
        again = Selector.from_dict(json.loads(json.dumps(content)))
        assert type(again) is type(made)
        assert again.to_dict() == content
        assert torch.equal(again.kept(call), made.kept(call))
    content = selector.to_dict()
    with pytest.raises(ValueError, match=rf"selector {type(selector).__name__} has no fields \['alpha_beta'\]"):
        Selector.from_dict(content | {"alpha_beta": 1})
    for name in ("Unheard", None, 3, ["TopK"]):
        with pytest.raises(ValueError, match="selector must be one of .*'TopK'"):
            Selector.from_dict(content | {"class": name})
    with pytest.raises(ValueError, match="local"):
        Selector.from_dict(content | {"local": "many"})


@every
@pytest.mark.parametrize("seed", range(4))
def test_union_with_tokens_keeps_what_either_keeps(selector: Selector, seed: int) -> None:
    call = random_call(seed)
    tokens = Tokens(((30, 40), (-20, -10)), block_q=selector.block_q, block_k=selector.block_k)
    thresholds, sparse = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([True, True, False, True])
    tuned = selector.tuned_to(thresholds, sparse)
    for union, part in (
        (selector | tokens, selector),
        (tokens | selector, selector),
        ((selector | tokens).tuned_to(thresholds, sparse), tuned),
    ):
        kept = union.kept(call)
        assert not (kept & ~(part.kept(call) | tokens.kept(call))).any()
        assert not ((wanted(part, call) | wanted(tokens, call)) & ~kept).any()
        assert (union.tuned, union.candidates) == (selector.tuned, selector.candidates)


def wanted(selector: Selector, call: Call) -> Tensor:
    """What a selector keeps before the rule that no row stays empty, which a union applies to the whole."""
    levels = selector.final_levels(call)
    lone = selector.kept(call).sum(-1, keepdim=True) == 1  # may be there for that rule alone
    return selector.kept(call) & (~lone | selector.forced(call)) & (levels < torch.inf)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_selects_in_float32(selector: Selector, dtype: torch.dtype) -> None:
    call = random_call(11)
    half = call.replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    full = call.replace(q=half.q.float(), k=half.k.float(), v=half.v.float())
    assert torch.equal(selector.kept(half), selector.kept(full))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selector.kept(full), selector.kept(half))
    assert torch.equal(selector.kept(half), selector.kept(full))


@every
def test_packed_sequences_are_selected_one_by_one(selector: Selector) -> None:
    calls = [random_call(seed, is_causal=True, padded=False) for seed in (1, 2, 3)]
    q, k = (torch.cat([getattr(call, name)[:1] for call in calls], dim=2) for name in "qk")
    ends_q, ends_k = ([0, *torch.tensor([getattr(c, n) for c in calls]).cumsum(0).tolist()] for n in ("q_len", "k_len"))
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k))
    packed = selector.select(q, k, is_causal=True, scale=0.25, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    for part, call in zip(packed.split(), calls, strict=True):
        alone = selector.select(call.q[:1], call.k[:1], is_causal=True, scale=0.25)
        assert torch.equal(part.to_dense(), alone.to_dense())


@every
def test_a_later_token_moves_its_own_query_block_at_most(selector: Selector) -> None:
    """The range of the claim "exactly causal": outputs before the query block of a changed token stay to the bit."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (drawn(500, heads, generator, batch=1) for heads in (HEADS, 2, 2))
    out = sparse_attention(q, k, v, selector, is_causal=True)
    moved = 0
    if isinstance(selector, LOOKS_AT_THE_END):
        return
    for token in (140, 300, 450):
        later = [x.clone() for x in (q, k, v)]
        for x in later:
            x[:, :, token:] = 30 * drawn(500 - token, x.shape[1], generator, batch=1)
        after = sparse_attention(*later, selector, is_causal=True)
        start = token // selector.block_q * selector.block_q
        assert torch.equal(out[:, :, :start], after[:, :, :start])
        moved += not torch.equal(out[:, :, start:token], after[:, :, start:token])
    if isinstance(selector, (TopK, MeanSimilarity)):
        assert moved, "earlier positions of the token's own block may move, and here some do"
    if isinstance(selector, (Dense, Streaming, Tokens)):
        assert not moved, "rules that look at no content are causal to the bit"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "field", "bad"),
    [
        (MeanSimilarity, "cdf_threshold", [NAN, -0.1, 1.1, INF]),
        (MeanSimilarity, "sim_threshold", [NAN]),
        (PeakMass, "cdf_threshold", [NAN, -0.1, 1.1, INF]),
        (TopK, "keep", [NAN, 0.0, -0.1, 1.1]),
        (XAttention, "threshold", [NAN, -0.1, 1.1]),
        (FlashPrefill, "alpha", [NAN, -0.1, 1.1]),
        (FlexPrefill, "gamma", [NAN, -0.1, 1.1]),
        (FlexPrefill, "tau", [NAN, -0.1]),
        (MInference, "vertical_size", [NAN, -1]),
        (MInference, "slash_size", [NAN, -1]),
        (Streaming, "sink_tokens", [NAN, -1]),
        (Streaming, "local_tokens", [NAN, -1]),
    ],
)
def test_thresholds_that_cannot_be_meant(kind: Any, field: str, bad: list[float]) -> None:
    """As numbers and anywhere in a tensor; also of a wrong shape or type."""
    call = random_call(0, padded=False)
    for value in bad:
        for given in (value, torch.tensor([0.5, 0.5, value, 0.5]), torch.tensor(value)):
            with pytest.raises(ValueError, match=rf"{field} must be in .*got"):
                kind(**{field: given})
    for wrong in ("0.5", None, True, [0.5], torch.ones(HEADS, dtype=torch.bool), torch.ones(HEADS) * 1j):
        with pytest.raises(TypeError, match=f"{field} must be a"):
            kind(**{field: wrong})
    with pytest.raises(ValueError, match=rf"{field} must be a float or a tensor \[Hq\], got shape \(1, 4\)"):
        kind(**{field: torch.full((1, HEADS), 0.5)})
    with pytest.raises(ValueError, match=rf"{field} must be a float or a tensor \[4\], got shape \(3,\)"):
        kind(**{field: torch.full((3,), 0.5)}).kept(call)
    assert kind(**{field: torch.full((HEADS,), 0.5)}).kept(call).any()
    assert torch.equal(kind(**{field: torch.full((1,), 0.5)}).kept(call), kind(**{field: 0.5}).kept(call))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dense(block_q=32), ValueError, "block_q must be one of .*64, 128.*got 32"),
        (lambda: Dense(block_k=128.0), ValueError, "block_k must be one of .*64, 128.*got 128.0"),  # type: ignore
        (lambda: Dense(sink=1), TypeError, "sink must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: Dense(local=-1), ValueError, "local must be a number of tokens, 0 or more, got -1"),
        (lambda: Dense(local=True), ValueError, "local must be a number of tokens, 0 or more, got True"),
        (lambda: Dense(local=1.5), ValueError, "local must be .*got 1.5"),  # type: ignore[arg-type]
        (lambda: Dense(dense_heads=torch.ones(4)), TypeError, "dense_heads must be a boolean tensor"),
        (lambda: Dense(dense_heads=[True]), TypeError, "dense_heads must be a boolean tensor"),  # type: ignore
        (lambda: MeanSimilarity(pool=48), ValueError, r"pool must be a divisor of both .*\(128, 128\), got 48"),
        (lambda: MeanSimilarity(pool=128, block_q=64), ValueError, r"pool must be .*\(64, 128\), got 128"),
        (lambda: TopK(pool=0), ValueError, "pool must be .*got 0"),
        (lambda: Tokens(((1, 2, 3),)), ValueError, r"ranges must be pairs .*got \(1, 2, 3\)"),  # type: ignore
        (lambda: Tokens(((0.5, 2),)), ValueError, r"ranges must be pairs .*got \(0.5, 2\)"),  # type: ignore
        (lambda: Tokens((), queries=1), TypeError, "queries must be True or False, got 1"),  # type: ignore
        (lambda: TopK(0.5, block_q=64) | Streaming(), ValueError, "one block_q, got 64 and 128"),
        (lambda: TopK(0.5) | 0.5, TypeError, "joins selectors, got float"),  # type: ignore[operator]
        (lambda: Union(TopK(), Tokens(), local=64), ValueError, "belong to the parts of a union"),
        (lambda: Selector.from_dict({"class": "Union"}), ValueError, "selector Union: .*first"),
    ],
)
def test_other_fields_that_cannot_be_meant(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_heads_that_stay_dense_are_counted() -> None:
    call = random_call(0, padded=False)
    with pytest.raises(ValueError, match=r"dense_heads must be a boolean tensor \[4\], got shape \(3,\)"):
        Streaming(dense_heads=torch.ones(3, dtype=torch.bool), **SIZES).kept(call)


def test_full_masks_are_not_for_selectors() -> None:
    q = torch.randn(1, 2, 100, 16)
    with pytest.raises(ValueError, match=r"attn_mask must be a key-padding mask .*got \(1, 1, 100, 100\)"):
        Dense().select(q, q, is_causal=False, attn_mask=torch.ones(1, 1, 100, 100).bool())
