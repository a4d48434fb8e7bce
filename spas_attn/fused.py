"""Selection by fused kernels: what each selector that they serve makes of Q and K before its blocks are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .block_mask import BlockMask, cdiv
from .call import Call
from .checks import PerHead, per_head
from .kernels import prepare as kernels
from .kernels.head_cut import head_cuts
from .kernels.key_scores import key_scores, row_sums
from .kernels.last_queries import last_masses
from .kernels.padding import filled_tiles
from .kernels.prepare import Prepared
from .kernels.probabilities import pooled_probabilities
from .kernels.row_scores import row_scores
from .kernels.select import Facts, Rule, keep_blocks
from .kernels.strided import strided_probabilities
from .selectors import ExactKeys, FlashPrefill, FlexPrefill, MeanSimilarity, MInference, Selector, TopK, XAttention
from .selectors.last_queries import LastQueries, first_distance, last_query, last_rows, lowest_across
from .selectors.minference import LAST_QUERIES


@dataclass(frozen=True)
class Parts:
    """A selector as the kernels take it: one that ranks blocks, and what is kept beside.

    Attributes:
        ranking: the selector that scores blocks.
        dense: uint8 ``[Hq]``, 1 for heads that keep everything; None for none.
        tokens: the selector is joined with Tokens, which keep their own sink and local keys, and every block of
            ``touched_q``, ``touched_k`` (uint8 ``[nq]``, ``[nk]`` or None).
        tokens_sink, tokens_local: of the Tokens.
    """

    ranking: Selector
    dense: Tensor | None = None
    tokens: bool = False
    tokens_sink: bool = False
    tokens_local: int = 0
    touched_q: Tensor | None = None
    touched_k: Tensor | None = None


def run_fused(parts: Parts, call: Call, quantise: bool) -> tuple[BlockMask, Prepared]:
    """The blocks, and with ``quantise`` K (and V, as ``call.precision`` says) in 8 bits, made by the same launch."""
    with torch.cuda.device(call.q.device) if call.q.is_cuda else contextlib.nullcontext():
        return _SELECT[type(parts.ranking)](parts, call, quantise)


def _by_means(parts: Parts, call: Call, quantise: bool) -> tuple[BlockMask, Prepared]:
    """MeanSimilarity, TopK. K is read twice only if a similarity filter needs its exact mean (not under causality)."""
    ranking, causal = parts.ranking, call.is_causal
    assert isinstance(ranking, (MeanSimilarity, TopK))
    sim = None
    if isinstance(ranking, MeanSimilarity) and ranking.filters:
        sim = _checked(ranking.sim_threshold, call, "sim_threshold")
    filters = sim is not None
    # Under causality means and similarities stay unsmoothed: the smoothing vector would carry later tokens into them.
    made = _prepare(
        parts, call, quantise, pool_q=ranking.pool, pool_k=ranking.pool, similarity=filters, smooth=not causal
    )
    scores = _scores(parts, call)
    facts = Facts(made.k.block_filled, made.q.similarity, made.k.similarity, documents=call.document_start)
    rule = _rule(parts, call, "rank" if isinstance(ranking, TopK) else "mass", sim_threshold=sim)
    _pooled(call, made, scores, ranking.pool, rule)
    return _kept(call, scores, rule, facts), made


def _by_keys(parts: Parts, call: Call, quantise: bool) -> tuple[BlockMask, Prepared]:
    """ExactKeys; of a long call some query blocks at a time, so that scores take no more memory than the lists."""
    ranking, group = parts.ranking, call.group
    assert isinstance(ranking, ExactKeys)
    queries = kernels.as_bytes(call.query_mask()) if call.is_causal else None
    vectors, filled, step = call.q, None, ranking.pool
    made = Prepared()
    if ranking.queries == "mean":
        pairs = call.q.dtype != torch.bfloat16  # which rounds means as finely as the keys
        made = _prepare(parts, call, quantise, pool_q=ranking.pool, pairs=pairs, valid_q=queries)
        assert made.q.means is not None
        vectors, filled, step = made.q.means, made.q.filled, 1
    elif quantise:
        made = _prepare(parts, call, quantise)
    if ranking.queries == "sample" and queries is not None:
        vectors, filled = ranking.vectors(call)
        vectors, filled, step = vectors.to(call.k.dtype), kernels.as_bytes(filled), 1
    block_filled = filled_tiles(kernels.as_bytes(call.key_mask), ranking.block_k)
    facts = Facts(block_filled, documents=call.document_start)
    lists, per_q = _scores(parts, call), ranking.block_q // ranking.pool
    mask, rule = None, _rule(parts, call, ranking.rank)
    for sums in row_sums(lists, per_q, group):
        key_scores(
            vectors, call.k, sums, call.q_len, step=step, pool=ranking.pool, block_q=ranking.block_q,
            block_k=ranking.block_k, is_causal=call.is_causal, scale=call.scale, window=call.window,
            valid=kernels.as_bytes(call.key_mask), filled=filled, documents=call.document_start,
        )  # fmt: skip
        counts = None if mask is None else mask.counts
        mask = _kept(call, lists, rule, facts, sums=sums, per_q=per_q, counts=counts)
    assert mask is not None
    return mask, made


def _by_strides(parts: Parts, call: Call, quantise: bool) -> tuple[BlockMask, Prepared]:
    """XAttention."""
    ranking = parts.ranking
    assert isinstance(ranking, XAttention)
    made = _prepare(parts, call, quantise)
    scores = _scores(parts, call)
    filled = filled_tiles(kernels.as_bytes(call.key_mask), ranking.stride)
    block_filled = filled_tiles(kernels.as_bytes(call.key_mask), ranking.block_k)
    strided_probabilities(
        call.q, call.k, scores, stride=ranking.stride, block_q=ranking.block_q, block_k=ranking.block_k,
        is_causal=call.is_causal, scale=call.scale, window=call.window, valid=kernels.as_bytes(call.key_mask),
        filled=filled,
    )  # fmt: skip
    return _kept(call, scores, _rule(parts, call, "mass"), Facts(block_filled)), made


def _by_rows(parts: Parts, call: Call, quantise: bool) -> tuple[BlockMask, Prepared]:
    """FlashPrefill. Its means stay unsmoothed: sums of exponentials over queries know no common factor."""
    ranking = parts.ranking
    assert isinstance(ranking, FlashPrefill)
    made = _prepare(parts, call, quantise, pool_k=ranking.block_k)
    assert made.k.means is not None
    scores = _scores(parts, call)
    row_scores(
        call.q, made.k.means, scores, block_q=ranking.block_q, block_k=ranking.block_k, k_len=call.k_len,
        is_causal=call.is_causal, scale=call.scale, window=call.window, block_filled=made.k.block_filled,
    )  # fmt: skip
    last_row = None if call.query_mask() is None else last_query(call).to(torch.int32)
    facts = Facts(made.k.block_filled, last_row=last_row)
    sink = max(1, ranking.sink_blocks) if ranking.sink else 0
    rule = _rule(parts, call, "share", sink=sink, last_blocks=ranking.last_blocks)
    return _kept(call, scores, rule, facts), made


def _by_heads(parts: Parts, call: Call, quantise: bool) -> tuple[BlockMask, Prepared]:
    """FlexPrefill."""
    ranking = parts.ranking
    assert isinstance(ranking, FlexPrefill)
    pool = min(ranking.block_q, ranking.block_k)
    made = _prepare(parts, call, quantise, pool_q=pool, pool_k=pool, smooth=not call.is_causal)
    scores = _scores(parts, call)
    least, most = ranking.budgets
    rule = _rule(parts, call, "lines", least=least or None, most=most)
    _pooled(call, made, scores, pool, rule)
    blocks = made.k
    if pool != ranking.block_k:
        blocks = _prepare(parts, call, False, pool_k=ranking.block_k).k
    assert blocks.means is not None
    means = blocks.means.float().sum(3)[..., : call.q.shape[-1]]
    filled = None if blocks.block_filled is None else blocks.block_filled.view(torch.bool)
    last = fused_last_queries(call, ranking.block_q)
    tau = per_head(ranking.tau, call.q.shape[1], "tau", call.q.device)
    aware = (ranking.distances(call, last, means, filled) < tau).view(torch.uint8)
    columns, by_distance = ranking.lines(call, last)
    cuts = head_cuts(
        scores, _checked(ranking.gamma, call, "gamma"), aware, q_len=call.q_len, k_len=call.k_len,
        block_q=ranking.block_q, block_k=ranking.block_k, is_causal=call.is_causal, window=call.window,
        sink=int(ranking.sink), local=ranking.local, block_filled=blocks.block_filled,
    )  # fmt: skip
    diagonals = lowest_across(ranking, call, by_distance).contiguous()
    facts = Facts(blocks.block_filled, columns=columns.contiguous(), diagonals=diagonals, aware=aware, cuts=cuts)
    return _kept(call, scores, rule, facts), made


def _by_lines(parts: Parts, call: Call, quantise: bool) -> tuple[BlockMask, Prepared]:
    """MInference without block-sparse heads."""
    ranking, heads = parts.ranking, call.q.shape[1]
    assert isinstance(ranking, MInference)
    made = _prepare(parts, call, quantise)
    patterns = ranking.patterns(heads)
    last = None if set(patterns) == {"a_shape"} else fused_last_queries(call, LAST_QUERIES)
    columns, by_distance = ranking.lines(call, patterns, last)
    batch, nk = call.q.shape[0], cdiv(call.k_len, ranking.block_k)
    columns = columns.expand(batch, heads, nk).contiguous()
    diagonals = lowest_across(ranking, call, by_distance.expand(batch, heads, -1)).contiguous()
    block_filled = filled_tiles(kernels.as_bytes(call.key_mask), ranking.block_k)
    facts = Facts(block_filled, columns=columns, diagonals=diagonals)
    return _kept(call, _scores(parts, call), _rule(parts, call, "lines"), facts), made


_SELECT: dict[type[Selector], Callable[[Parts, Call, bool], tuple[BlockMask, Prepared]]] = {
    MeanSimilarity: _by_means, TopK: _by_means, ExactKeys: _by_keys, XAttention: _by_strides, FlashPrefill: _by_rows,
    FlexPrefill: _by_heads, MInference: _by_lines,
}  # fmt: skip


def fused_last_queries(call: Call, count: int) -> LastQueries:
    """:func:`spas_attn.selectors.last_queries.last_queries` by kernels."""
    _, weight, queries = last_rows(call, count)
    count = queries.shape[2]
    last = last_query(call)
    columns, descending = last_masses(
        call.q, call.k, count, is_causal=call.is_causal, scale=call.scale, window=call.window,
        valid=kernels.as_bytes(call.key_mask), weight=weight,
        last_row=None if call.query_mask() is None else last.to(torch.int32),
    )  # fmt: skip
    # Place x of `descending` holds the distance `ahead - x`.
    distances, size = call.q_len + call.offset - first_distance(call), descending.shape[-1]
    if call.query_mask() is None:
        highest = call.q_len - count + call.offset + 128 - first_distance(call)
        padded = torch.nn.functional.pad(descending, (0, max(0, highest + 1 - size)))
        diagonals = padded[..., highest + 1 - distances : highest + 1].flip(-1)
    else:
        distance = first_distance(call) + torch.arange(distances, device=call.q.device)
        place = (last - count + 1 + call.offset + 128)[:, None] - distance
        inside = ((place >= 0) & (place < size))[:, None]
        place = place.clamp(0, size - 1)[:, None].expand(*descending.shape[:2], -1)
        diagonals = descending.gather(-1, place).masked_fill_(~inside, 0.0)
    mean = (queries * weight[:, None, :, None]).sum(2)
    return LastQueries(columns, diagonals, mean, last + call.offset)


def _dim(call: Call) -> int:
    return kernels.padded_dim(call.q.shape[-1])


def _scores(parts: Parts, call: Call) -> Tensor:
    """Memory of the scores, which becomes that of the lists, int32 ``[B, Hq, nq, nk]``."""
    nq, nk = cdiv(call.q_len, parts.ranking.block_q), cdiv(call.k_len, parts.ranking.block_k)
    return torch.empty(*call.q.shape[:2], nq, nk, dtype=torch.int32, device=call.q.device)


def _prepare(parts: Parts, call: Call, quantise: bool, **wanted: Any) -> Prepared:
    """What is wanted of Q, K and V (see ``prepare``), with ``quantise`` the 8 bits of the call's precision, too."""
    ranking, valid = parts.ranking, kernels.as_bytes(call.key_mask)
    return kernels.prepare(
        call.q if wanted.get("pool_q") else None,
        call.k if quantise or wanted.get("pool_k") else None,
        call.v if quantise and call.precision == "int8_fp8" else None,
        block_q=ranking.block_q, block_k=ranking.block_k, int8=quantise, valid=valid,
        **{"valid_q": None if call.document_start is None else valid, **wanted},
    )  # fmt: skip


def _pooled(call: Call, made: Prepared, scores: Tensor, pool: int, rule: Rule) -> None:
    pooled_probabilities(
        made.q, made.k, scores, call.q_len, call.k_len, pool=pool, block_q=rule.block_q, block_k=rule.block_k,
        is_causal=call.is_causal, scale=call.scale, window=call.window, sim_threshold=rule.sim_threshold,
        documents=call.document_start,
    )  # fmt: skip


def _rule(parts: Parts, call: Call, kind: str, **more: Any) -> Rule:
    ranking = parts.ranking
    return Rule(
        kind, _checked(ranking.threshold, call, ranking.tuned), ranking.block_q, ranking.block_k,
        more.pop("sink", int(ranking.sink)), ranking.local, dense=parts.dense, tokens=parts.tokens,
        tokens_sink=parts.tokens_sink, tokens_local=parts.tokens_local, touched_q=parts.touched_q,
        touched_k=parts.touched_k, **more,
    )  # fmt: skip


def _kept(call: Call, scores: Tensor, rule: Rule, facts: Facts, **scored: Any) -> BlockMask:
    return keep_blocks(
        scores, rule, facts, call.q_len, call.k_len, call.k.shape[1], is_causal=call.is_causal, window=call.window,
        **scored,
    )  # fmt: skip


def _checked(value: PerHead, call: Call, name: str) -> PerHead:
    heads = call.q.shape[1]
    if isinstance(value, Tensor) and (value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, heads))):
        raise ValueError(f"{name} must be a float or a tensor [{heads}], got shape {tuple(value.shape)}")
    return value
