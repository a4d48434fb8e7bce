"""The route from selectors to the fused kernels: which selectors they serve, and what they need to know of them.

Served are MeanSimilarity, TopK, and either of them joined with Tokens; the result is that of the torch code, up to
ties between probabilities. Everything else, and what exceeds the kernels' limits, is selected by torch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..block_mask import BlockMask, cdiv
from ..kernels.config import capability
from .base import Inputs, PerHead, Selector
from .mean_similarity import MeanSimilarity
from .tokens import Tokens
from .topk import TopK
from .union import Union

if TYPE_CHECKING:
    from ..kernels.prepare import Prepared
    from ..kernels.select import Rule

MAX_BLOCKS = 4096  # key blocks that the kernels serve
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)  # matrix products in bf16
_touched: dict[tuple[object, ...], Tensor] = {}  # see _touched_blocks


_INSTALLED = importlib.util.find_spec("triton") is not None


def parts(selector: Selector) -> tuple[MeanSimilarity | TopK, list[Tokens]] | None:
    """The ranking selector and the Tokens joined with it, or None if the kernels do not know such a selector.

    Subclasses may rank otherwise, so that only the very classes count.
    """
    leaves = _leaves(selector)
    ranking = [leaf for leaf in leaves if type(leaf) is MeanSimilarity or type(leaf) is TopK]
    tokens = [leaf for leaf in leaves if type(leaf) is Tokens]
    return (ranking[0], tokens) if len(ranking) == 1 and len(leaves) == 1 + len(tokens) else None


def _leaves(selector: Selector) -> list[Selector]:
    if type(selector) is Union:
        return _leaves(selector.first) + _leaves(selector.second)
    return [selector]


def serves(selector: Selector, inputs: Inputs) -> bool:
    """Whether :func:`prepare_and_select` can select for a call on a GPU."""
    q, k = inputs.q, inputs.k
    return (
        q.is_cuda
        and _INSTALLED
        and q.dtype in _DTYPES
        and k.dtype in _DTYPES
        and q.shape[-1] <= 256
        and min(q.numel(), k.numel()) > 0
        and cdiv(k.shape[2], selector.block_k) <= MAX_BLOCKS
        and capability(q.device) >= _MIN_CAPABILITY
        and parts(selector) is not None
    )


def prepare_and_select(
    selector: Selector, inputs: Inputs, int8_tiles: tuple[int | None, int | None] = (None, None), dim: int | None = None
) -> Prepared:
    """Select blocks, and with ``int8_tiles`` quantise Q or K, from one pass over Q and one over K.

    Nothing is synchronised with the host. K is read twice only when a similarity filter needs its exact mean (not
    under causality).

    Args:
        selector: one that ``parts`` knows.
        inputs: the call.
        int8_tiles: queries and keys that share an int8 scale, powers of two of at most 128; None for no int8.
        dim: padded head dim of the int8 tensors, a power of two; ``kernels.prepare.padded_dim(D)`` by default.

    Raises:
        ValueError: for a selector that the kernels do not serve.
    """
    from ..kernels import prepare as kernels
    from ..kernels.select import select_blocks

    q, k, causal = inputs.q, inputs.k, inputs.is_causal
    on_device = torch.cuda.device(q.device) if q.is_cuda and q.device.index != torch.cuda.current_device() else None
    if on_device is not None:
        with on_device:
            return prepare_and_select(selector, inputs, int8_tiles, dim)
    rule = _rule(selector, inputs)
    dim = dim or kernels.padded_dim(q.shape[-1])
    valid = kernels.as_bytes(inputs.key_mask)
    filters = rule.sim_threshold is not None
    tile_q, tile_k = int8_tiles
    sums = kernels.key_sums(k, dim, valid, exact=filters and not causal) if tile_k or not causal else None
    side_q = kernels.prepare(
        q, dim, pool=rule.pool, block=rule.block_q, similarity=filters, tile=tile_q,
        factor=inputs.scale * kernels.LOG2E,
    )  # fmt: skip
    # Under causality means and similarities stay unsmoothed: the smoothing vector would carry later tokens into them.
    side_k = kernels.prepare(
        k, dim, pool=rule.pool, block=rule.block_k, similarity=filters, tile=tile_k, sums=sums,
        smooth_pooled=not causal, valid=valid,
    )  # fmt: skip
    mask = select_blocks(
        side_q, side_k, rule, q.shape[2], k.shape[2], is_causal=causal, scale=inputs.scale, window=inputs.window
    )
    return kernels.Prepared(mask, side_q, side_k, sums)


def select(selector: Selector, inputs: Inputs) -> BlockMask:
    """The blocks that ``selector`` keeps, by the fused kernels; arguments as in :func:`prepare_and_select`."""
    if torch.compiler.is_compiling():
        return _traced(selector, inputs, quantise=False)[0]
    return prepare_and_select(selector, inputs).mask


def select_and_quantise(selector: Selector, inputs: Inputs) -> tuple[BlockMask, tuple[Tensor, ...]]:
    """The blocks, and K in 8 bits with one scale per key block (the fields of ``kernels.launch.Keys``)."""
    if torch.compiler.is_compiling():
        return _traced(selector, inputs, quantise=True)
    made = prepare_and_select(selector, inputs, (None, selector.block_k))
    assert made.k.int8 is not None
    assert made.k.scale is not None
    assert made.key_sums is not None
    return made.mask, (made.k.int8, made.k.scale, *made.key_sums)


def _traced(selector: Selector, inputs: Inputs, quantise: bool) -> tuple[BlockMask, tuple[Tensor, ...]]:
    """Through the custom operator, which torch.compile does not look into."""
    known = parts(selector)
    assert known is not None
    ranking, tokens = known
    topk = isinstance(ranking, TopK)
    level = ranking.keep if isinstance(ranking, TopK) else ranking.cdf_threshold
    sim: PerHead = -1.0 if isinstance(ranking, TopK) else ranking.sim_threshold
    described = []
    for part in tokens:
        flags = [int(part.queries), int(part.keys), int(part.sink), part.local, len(part.ranges)]
        described += flags + [end for span in part.ranges for end in span]
    counts, indices, *keys = _select_op(
        inputs.q, inputs.k, inputs.key_mask,
        level if isinstance(level, Tensor) else None, -1.0 if isinstance(level, Tensor) else float(level),
        sim if isinstance(sim, Tensor) else None, -1.0 if isinstance(sim, Tensor) else float(sim),
        topk, ranking.pool, selector.block_q, selector.block_k, ranking.sink, ranking.local, described,
        inputs.is_causal, inputs.scale, inputs.window, quantise,
    )  # fmt: skip
    mask = BlockMask(counts, indices, selector.block_q, selector.block_k, inputs.q.shape[2], inputs.k.shape[2])
    return mask, tuple(keys)


@torch.library.custom_op("spas_attn::select_blocks", mutates_args=())
def _select_op(
    q: Tensor, k: Tensor, key_mask: Tensor | None, level: Tensor | None, level_value: float, sim: Tensor | None,
    sim_value: float, topk: bool, pool: int, block_q: int, block_k: int, sink: bool, local: int, tokens: list[int],
    is_causal: bool, scale: float, window: int | None, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Counts and indices of the kept blocks, and the fields of ``Keys`` (empty without ``quantise``)."""
    blocks: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    threshold = level_value if level is None else level
    selector: Selector
    if topk:
        selector = TopK(threshold, pool, sink=sink, local=local, **blocks)
    else:
        selector = MeanSimilarity(threshold, sim_value if sim is None else sim, pool, sink=sink, local=local, **blocks)
    rest = list(tokens)
    while rest:
        queries, keys_too, own_sink, own_local, count = rest[:5]
        ends, rest = rest[5 : 5 + 2 * count], rest[5 + 2 * count :]
        ranges = tuple(zip(ends[::2], ends[1::2], strict=True))
        selector |= Tokens(ranges, bool(queries), bool(keys_too), sink=bool(own_sink), local=own_local, **blocks)
    inputs = Inputs(q, k, is_causal, scale, key_mask, window)
    if quantise:
        mask, keys = select_and_quantise(selector, inputs)
        return (mask.counts, mask.indices, keys[0], keys[1], keys[2], keys[3])
    mask = select(selector, inputs)
    none = [q.new_empty(0) for _ in range(4)]
    return (mask.counts, mask.indices, none[0], none[1], none[2], none[3])


@_select_op.register_fake
def _select_shapes(
    q: Tensor, k: Tensor, key_mask: Tensor | None, level: Tensor | None, level_value: float, sim: Tensor | None,
    sim_value: float, topk: bool, pool: int, block_q: int, block_k: int, sink: bool, local: int, tokens: list[int],
    is_causal: bool, scale: float, window: int | None, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, q_len, dim), (_, k_heads, k_len, _) = q.shape, k.shape
    nq, nk = cdiv(q_len, block_q), cdiv(k_len, block_k)
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


def _rule(selector: Selector, inputs: Inputs) -> Rule:
    from ..kernels.select import Rule

    known = parts(selector)
    if known is None:
        raise ValueError(
            "the fused kernels serve MeanSimilarity, TopK and either of them joined with Tokens, not "
            f"{type(selector).__name__}"
        )
    ranking, tokens = known
    heads, q_len, k_len = inputs.q.shape[1], inputs.q.shape[2], inputs.k.shape[2]
    sim: PerHead | None
    if isinstance(ranking, TopK):
        level, sim = _checked(ranking.keep, heads, "keep"), None
    else:
        level, sim = _checked(ranking.cdf_threshold, heads, "cdf_threshold"), ranking.sim_threshold
        # No similarity is negative. A tensor's values are not read, that would wait for the device.
        sim = None if isinstance(sim, (int, float)) and sim <= 0 else _checked(sim, heads, "sim_threshold")
    return Rule(
        level=level,
        sim_threshold=sim,
        by_rank=isinstance(ranking, TopK),
        pool=min(ranking.pool, ranking.block_q, ranking.block_k),
        block_q=selector.block_q,
        block_k=selector.block_k,
        sink=ranking.sink,
        local=ranking.local,
        tokens=bool(tokens),
        tokens_sink=any(part.sink for part in tokens),
        tokens_local=max((part.local for part in tokens), default=0),
        touched_q=_touched_blocks([part for part in tokens if part.queries], q_len, selector.block_q, inputs.q.device),
        touched_k=_touched_blocks([part for part in tokens if part.keys], k_len, selector.block_k, inputs.q.device),
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
        return Tokens(ranges)._touched(length, block, device).view(torch.uint8)

    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return made()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (ranges, length, block, device, stream)
    if key not in _touched:
        if len(_touched) >= 256:
            _touched.clear()
        _touched[key] = made()
    return _touched[key]
