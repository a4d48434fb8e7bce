"""Select the blocks of a call: by fused kernels on a GPU where they serve the selector, else by its levels.

The kernels serve MeanSimilarity, TopK, and either of them joined with Tokens; their result is that of the torch code,
up to ties between probabilities.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .block_mask import BlockMask, cdiv
from .call import Call
from .checks import PerHead
from .kernels.config import capability
from .selectors import MeanSimilarity, Selector, Tokens, TopK, Union

if TYPE_CHECKING:
    from .kernels.select import Rule

MAX_BLOCKS = 4096  # key blocks that the kernels serve
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)  # matrix products in bf16
_INSTALLED = importlib.util.find_spec("triton") is not None
_touched: dict[tuple[object, ...], Tensor] = {}  # see _touched_blocks


@dataclass(frozen=True)
class Selection:
    """The selected blocks, and K in 8 bits (``kernels.launch.Keys``) if the pass that scored its blocks made it."""

    mask: BlockMask
    keys: tuple[Tensor, ...] | None = None


def select(selector: Selector, call: Call, *, quantise: bool = False) -> Selection:
    """Select the blocks of a call of one sequence, without a host synchronisation.

    Args:
        selector: the rule.
        call: what to select for.
        quantise: the kernel that follows takes K in 8 bits: make it in the same pass where that is possible.
    """
    if not fused_serves(selector, call):
        return Selection(selector.mask_of(call))
    rule = rule_of(selector, call)
    mask, keys = (_fused_traced if torch.compiler.is_compiling() else run_fused)(rule, call, quantise)
    return Selection(mask, keys if quantise else None)


def fused_serves(selector: Selector, call: Call) -> bool:
    """Whether the fused kernels select for this call."""
    return (
        call.q.is_cuda
        and _INSTALLED
        and call.q.dtype in _DTYPES
        and cdiv(call.k_len, selector.block_k) <= MAX_BLOCKS
        and capability(call.q.device) >= _MIN_CAPABILITY
        and _parts(selector) is not None
    )


def _parts(selector: Selector) -> tuple[MeanSimilarity | TopK, list[Tokens]] | None:
    """The ranking selector and the Tokens joined with it, or None if the kernels do not know such a selector.

    Subclasses may rank otherwise, so that only the very classes count.
    """
    leaves = _leaves(selector)
    ranking = [leaf for leaf in leaves if type(leaf) is MeanSimilarity or type(leaf) is TopK]
    tokens = [leaf for leaf in leaves if type(leaf) is Tokens]
    known = len(ranking) == 1 and len(leaves) == 1 + len(tokens) and all(leaf.dense_heads is None for leaf in leaves)
    return (ranking[0], tokens) if known else None


def _leaves(selector: Selector) -> list[Selector]:
    if type(selector) is Union:
        return _leaves(selector.first) + _leaves(selector.second)
    return [selector]


def rule_of(selector: Selector, call: Call) -> Rule:
    """What the kernels need to know of a selector; a ValueError for one that they do not serve."""
    from .kernels.select import Rule

    known = _parts(selector)
    if known is None:
        raise ValueError(
            "the fused kernels serve MeanSimilarity, TopK and either of them joined with Tokens, not "
            f"{type(selector).__name__}"
        )
    ranking, tokens = known
    heads, device = call.q.shape[1], call.q.device
    sim = ranking.sim_threshold if isinstance(ranking, MeanSimilarity) and ranking.filters else None
    return Rule(
        level=_checked(ranking.threshold, heads, ranking.tuned),
        sim_threshold=None if sim is None else _checked(sim, heads, "sim_threshold"),
        by_rank=isinstance(ranking, TopK),
        pool=ranking.pool,
        block_q=selector.block_q,
        block_k=selector.block_k,
        sink=ranking.sink,
        local=ranking.local,
        tokens=len(tokens) > 0,  # bool() of a list breaks graphs in torch 2.11
        tokens_sink=any(part.sink for part in tokens),
        tokens_local=max([0, *(part.local for part in tokens)]),
        touched_q=_touched_blocks([part for part in tokens if part.queries], call.q_len, selector.block_q, device),
        touched_k=_touched_blocks([part for part in tokens if part.keys], call.k_len, selector.block_k, device),
    )


def run_fused(rule: Rule, call: Call, quantise: bool) -> tuple[BlockMask, tuple[Tensor, ...]]:
    """The blocks, and with ``quantise`` K in 8 bits with one scale per key block, from one pass over Q and one over K.

    K is read twice only when a similarity filter needs its exact mean (not under causality).
    """
    from .kernels import prepare as kernels
    from .kernels.select import select_blocks

    q, k, causal = call.q, call.k, call.is_causal
    filters, dim = rule.sim_threshold is not None, kernels.padded_dim(q.shape[-1])
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        valid = kernels.as_bytes(call.key_mask)
        sums = kernels.key_sums(k, dim, valid, exact=filters and not causal) if quantise or not causal else None
        side_q = kernels.prepare(q, dim, pool=rule.pool, block=rule.block_q, similarity=filters)
        # Under causality means and similarities stay unsmoothed: the smoothing vector would carry later tokens into
        # them.
        side_k = kernels.prepare(
            k, dim, pool=rule.pool, block=rule.block_k, similarity=filters, tile=rule.block_k if quantise else None,
            sums=sums, smooth_pooled=not causal, valid=valid,
        )  # fmt: skip
        mask = select_blocks(
            side_q, side_k, rule, call.q_len, call.k_len, is_causal=causal, scale=call.scale, window=call.window
        )
    if not quantise:
        return mask, ()
    assert side_k.int8 is not None and side_k.scale is not None and sums is not None
    return mask, (side_k.int8, side_k.scale, *sums)


def _fused_traced(rule: Rule, call: Call, quantise: bool) -> tuple[BlockMask, tuple[Tensor, ...]]:
    """Through a custom op, which torch.compile does not look into."""
    level, sim = rule.level, rule.sim_threshold
    numbers = [0.0 if isinstance(x, Tensor) or x is None else float(x) for x in (level, sim)]
    flags = [
        sim is not None, rule.by_rank, rule.pool, rule.block_q, rule.block_k, rule.sink, rule.local, rule.tokens,
        rule.tokens_sink, rule.tokens_local,
    ]  # fmt: skip
    counts, indices, *keys = _fused_op(
        call.q, call.k, call.key_mask, level if isinstance(level, Tensor) else None,
        sim if isinstance(sim, Tensor) else None, rule.touched_q, rule.touched_k, numbers, [int(x) for x in flags],
        call.is_causal, call.scale, call.window, quantise,
    )  # fmt: skip
    return BlockMask(counts, indices, rule.block_q, rule.block_k, call.q_len, call.k_len, trusted=True), tuple(keys)


@torch.library.custom_op("spas_attn::select_blocks", mutates_args=())
def _fused_op(
    q: Tensor, k: Tensor, key_mask: Tensor | None, level: Tensor | None, sim: Tensor | None, touched_q: Tensor | None,
    touched_k: Tensor | None, numbers: list[float], flags: list[int], is_causal: bool, scale: float,
    window: int | None, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Counts and indices of the kept blocks, and the fields of ``Keys`` (empty without ``quantise``)."""
    from .kernels.select import Rule

    filters, by_rank, pool, block_q, block_k, sink, local, tokens, tokens_sink, tokens_local = flags
    rule = Rule(
        numbers[0] if level is None else level, (numbers[1] if sim is None else sim) if filters else None,
        bool(by_rank), pool, block_q, block_k, bool(sink), local, bool(tokens), bool(tokens_sink), tokens_local,
        touched_q, touched_k,
    )  # fmt: skip
    call = Call(q, k, k, is_causal, scale, key_mask, window)
    mask, keys = run_fused(rule, call, quantise)
    none = [q.new_empty(0) for _ in range(4)]
    k_int8, k_scale, k_total, k_count = keys or none
    return mask.counts, mask.indices, k_int8, k_scale, k_total, k_count


@_fused_op.register_fake
def _fused_shapes(
    q: Tensor, k: Tensor, key_mask: Tensor | None, level: Tensor | None, sim: Tensor | None, touched_q: Tensor | None,
    touched_k: Tensor | None, numbers: list[float], flags: list[int], is_causal: bool, scale: float,
    window: int | None, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, q_len, dim), (_, k_heads, k_len, _) = q.shape, k.shape
    nq, nk = cdiv(q_len, flags[3]), cdiv(k_len, flags[4])
    counts = q.new_empty(batch, heads, nq, dtype=torch.int32)
    indices = q.new_empty(batch, heads, nq, nk, dtype=torch.int32)
    if not quantise:
        none = [q.new_empty(0) for _ in range(4)]
        return (counts, indices, none[0], none[1], none[2], none[3])
    padded = max(32, 1 << (dim - 1).bit_length())
    return (
        counts,
        indices,
        q.new_empty(batch, k_heads, k_len, padded, dtype=torch.int8),
        q.new_empty(batch, k_heads, nk, dtype=torch.float32),
        q.new_empty(batch * k_heads, 1, padded, dtype=torch.float32),
        q.new_empty(batch * k_heads, 1, dtype=torch.float32),
    )


def _checked(value: PerHead, heads: int, name: str) -> PerHead:
    if isinstance(value, Tensor) and (value.dim() > 1 or (value.dim() == 1 and value.shape[0] not in (1, heads))):
        raise ValueError(f"{name} must be a float or a tensor [{heads}], got shape {tuple(value.shape)}")
    return value


def _touched_blocks(tokens: list[Tokens], length: int, block: int, device: torch.device) -> Tensor | None:
    """uint8 ``[n]``: 1 for the blocks that touch a range; made on the device, and kept for later calls.

    Kept per stream, as another one could read it before it is written; never while a graph is captured, because what a
    graph makes is there only after its first replay.
    """
    ranges = tuple((start, stop) for part in tokens for start, stop in part.ranges)
    if not ranges:
        return None

    def made() -> Tensor:
        return dataclasses.replace(tokens[0], ranges=ranges).touched(length, block, device).view(torch.uint8)

    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return made()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (ranges, length, block, device, stream)
    if key not in _touched:
        if len(_touched) >= 256:
            _touched.clear()
        _touched[key] = made()
    return _touched[key]
