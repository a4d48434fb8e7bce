"""Select the blocks of a call: by fused kernels on a GPU where they serve the selector, else by its levels.

The kernels serve MeanSimilarity, TopK, ExactKeys, XAttention, FlexPrefill, FlashPrefill, MInference without
block-sparse heads, and any of them joined with Tokens, or in the full heads of ByHead; their result is that of the
torch code, up to ties between scores.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .block_mask import BlockMask, cdiv
from .call import Call
from .kernels.config import capability, shared_memory_limit
from .kernels.recorded import constant
from .replay import replayed
from .selectors import (
    ByHead,
    ExactKeys,
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    Selector,
    Tokens,
    TopK,
    Union,
    XAttention,
)
from .selectors.exact_keys import QUERIES, RANKS
from .selectors.minference import PATTERNS

if TYPE_CHECKING:
    from .fused import Parts

MAX_BLOCKS = 16384  # key blocks that the kernels serve: a program holds a row of them in registers
_MAX_BLOCKS_OF_HEADS = 4096  # of FlexPrefill, which holds 16 rows
_PACKS = (ExactKeys, MeanSimilarity, TopK)
_WIDE, _WIDE_MEMORY = (FlexPrefill, MInference), 135_168  # bytes of tiles of exact scores in fp32 or of wide heads
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MIN_CAPABILITY = (8, 0)  # matrix products in bf16
_INSTALLED = importlib.util.find_spec("triton") is not None
_touched: dict[tuple[object, ...], Tensor] = {}  # see _touched_blocks

# The selectors that rank blocks in kernels: their thresholds, and their whole numbers.
_RANKING: tuple[tuple[type[Selector], tuple[str, ...], tuple[str, ...]], ...] = (
    (MeanSimilarity, ("cdf_threshold", "sim_threshold"), ("pool",)),
    (TopK, ("keep",), ("pool",)),
    (ExactKeys, ("cdf_threshold",), ("pool", "queries", "rank")),
    (XAttention, ("threshold",), ("stride",)),
    (FlashPrefill, ("alpha",), ("sink_blocks", "last_blocks")),
    (FlexPrefill, ("gamma", "tau"), ("min_budget", "max_budget")),
    (MInference, ("vertical_size", "slash_size", "adaptive_budget"), ()),
)
_ABSENT = -1  # a whole number that is None
_WORDS = {"queries": QUERIES, "rank": RANKS}  # fields whose whole number is the place of a word


@dataclass(frozen=True)
class Selection:
    """The selected blocks, and what the launch that made ready for them has made of K and V in 8 bits.

    Attributes:
        keys, values: the fields of ``kernels.operands.Keys`` and ``Values``, None for what was not made.
    """

    mask: BlockMask
    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None


def select(selector: Selector, call: Call, *, quantise: bool = False) -> Selection:
    """Select the blocks of a call of one sequence, without a host synchronisation.

    Args:
        selector: the rule.
        call: what to select for.
        quantise: the kernel that follows takes 8 bits: make them of K, and for ``call.precision`` "int8_fp8" of V, in
            the launch that makes ready for the scores.
    """
    if type(selector) is ByHead:
        return Selection(selector.joined(call, lambda part, own: select(part, own).mask))
    if not fused_serves(selector, call):
        return Selection(selector.mask_of(call))
    parts = parts_of(selector, call)
    return (_fused_traced if torch.compiler.is_compiling() else _fused_now)(parts, call, quantise)


def fused_serves(selector: Selector, call: Call) -> bool:
    """Whether the fused kernels select for this call."""
    return (
        call.q.is_cuda
        and _INSTALLED
        and call.q.dtype in _DTYPES
        and cdiv(call.k_len, selector.block_k) <= MAX_BLOCKS
        and capability(call.q.device) >= _MIN_CAPABILITY
        and _serves(selector, call)
    )


def _serves(selector: Selector, call: Call) -> bool:
    """Whether there are kernels for the rule; for packed sequences in one call those of pooled scores know them."""
    known = _known(selector)
    if known is None or (call.document_start is not None and type(known[0]) not in _PACKS):
        return False
    if isinstance(known[0], FlexPrefill) and cdiv(call.k_len, selector.block_k) > _MAX_BLOCKS_OF_HEADS:
        return False
    wide = call.q.dtype == torch.float32 or call.q.shape[-1] > 128
    return not (wide and isinstance(known[0], _WIDE) and shared_memory_limit(call.q.device) < _WIDE_MEMORY)


def _known(selector: Selector) -> tuple[Selector, list[Tokens]] | None:
    """The ranking selector and the Tokens joined with it, or None if the kernels do not know such a selector.

    Subclasses may rank otherwise, so that only the very classes count.
    """
    leaves = _leaves(selector)
    ranking = [leaf for leaf in leaves if _number_of(leaf) is not None]
    tokens = [leaf for leaf in leaves if type(leaf) is Tokens]
    known = len(ranking) == 1 and len(leaves) == 1 + len(tokens)
    return (ranking[0], tokens) if known else None


def _number_of(selector: Selector) -> int | None:
    """Which row of ``_RANKING`` the selector is; None for none."""
    if type(selector) is MInference:
        named = (selector.pattern,) if isinstance(selector.pattern, str) else selector.pattern
        if "block_sparse" in named:
            return None
    for number, (kind, _, _) in enumerate(_RANKING):
        if type(selector) is kind:
            return number
    return None


def _leaves(selector: Selector) -> list[Selector]:
    if type(selector) is Union:
        return _leaves(selector.first) + _leaves(selector.second)
    return [selector]


def parts_of(selector: Selector, call: Call) -> Parts:
    """What the kernels need to know of a selector; a ValueError for one that they do not serve."""
    from .fused import Parts

    known = _known(selector)
    if known is None:
        raise ValueError(
            "the fused kernels serve MeanSimilarity, TopK, ExactKeys, XAttention, FlexPrefill, FlashPrefill, MInference"
            f" without block-sparse heads, and one of them joined with Tokens, not {type(selector).__name__}"
        )
    ranking, tokens = known
    device = call.q.device
    return Parts(
        ranking=ranking,
        dense=_dense_heads(_leaves(selector), call),
        tokens=len(tokens) > 0,  # bool() of a list breaks graphs in torch 2.11
        tokens_sink=any(part.sink for part in tokens),
        tokens_local=max([0, *(part.local for part in tokens)]),
        touched_q=_touched_blocks([part for part in tokens if part.queries], call.q_len, selector.block_q, device),
        touched_k=_touched_blocks([part for part in tokens if part.keys], call.k_len, selector.block_k, device),
    )


def _dense_heads(leaves: list[Selector], call: Call) -> Tensor | None:
    """uint8 ``[Hq]``: 1 for heads that some part keeps whole; None where no part names any."""
    heads, dense = call.q.shape[1], None
    for leaf in leaves:
        if leaf.dense_heads is None:
            continue
        if leaf.dense_heads.shape[0] != heads:
            shape = tuple(leaf.dense_heads.shape)
            raise ValueError(f"dense_heads must be a boolean tensor [{heads}], got shape {shape}")
        named = leaf.dense_heads.to(call.q.device)
        dense = named if dense is None else dense | named
    return None if dense is None else dense.view(torch.uint8)


def _fused_now(parts: Parts, call: Call, quantise: bool) -> Selection:
    from .fused import run_fused

    mask, made = run_fused(parts, call, quantise)
    return Selection(mask, made.keys, made.values)


def _fused_traced(parts: Parts, call: Call, quantise: bool) -> Selection:
    """Through a custom op, which torch.compile does not look into."""
    ranking = parts.ranking
    number = _number_of(ranking)
    assert number is not None
    _, per_head, whole = _RANKING[number]
    values = [getattr(ranking, name) for name in per_head]
    numbers = [0.0 if isinstance(x, Tensor) or x is None else float(x) for x in values]
    counts = [getattr(ranking, name) for name in whole]
    counts = [_WORDS[name].index(x) if name in _WORDS else x for name, x in zip(whole, counts, strict=True)]
    flags = [
        number, ranking.block_q, ranking.block_k, int(ranking.sink), ranking.local, int(parts.tokens),
        int(parts.tokens_sink), parts.tokens_local, *[_ABSENT if x is None else x for x in counts],
        *[int(x is None) for x in values],
    ]  # fmt: skip
    if isinstance(ranking, MInference):
        flags += [PATTERNS.index(name) for name in ranking.patterns(call.q.shape[1])]
    tensors = [x if isinstance(x, Tensor) else None for x in values]
    v = call.v if quantise and call.precision == "int8_fp8" else None
    kept, indices, *made = _fused_op(
        call.q, call.k, v, call.key_mask, [*tensors, parts.touched_q, parts.touched_k, parts.dense],
        call.document_start, numbers, flags, call.is_causal, call.scale, call.window, quantise,
    )  # fmt: skip
    mask = BlockMask(kept, indices, ranking.block_q, ranking.block_k, call.q_len, call.k_len, trusted=True)
    return Selection(mask, tuple(made[:3]) if quantise else None, tuple(made[3:]) if v is not None else None)


def _parts_again(tensors: list[Tensor | None], numbers: list[float], flags: list[int]) -> Parts:
    """What ``_fused_traced`` took apart."""
    from .fused import Parts

    kind, per_head, whole = _RANKING[flags[0]]
    rest = flags[8:]
    counts, absent, patterns = rest[: len(whole)], rest[len(whole) :][: len(per_head)], rest[len(whole + per_head) :]
    values: dict[str, Any] = dict(zip(("block_q", "block_k"), flags[1:3], strict=True))
    values |= {"sink": bool(flags[3]), "local": flags[4]}
    for name, x in zip(whole, counts, strict=True):
        values[name] = _WORDS[name][x] if name in _WORDS else None if x == _ABSENT else x
    for place, name in enumerate(per_head):
        tensor = tensors[place]
        values[name] = None if absent[place] else numbers[place] if tensor is None else tensor
    if patterns:
        values["pattern"] = tuple(PATTERNS[number] for number in patterns)
    ranking = _unchecked(kind, values)
    touched_q, touched_k, dense = tensors[-3:]
    return Parts(ranking, dense, bool(flags[5]), bool(flags[6]), flags[7], touched_q, touched_k)


def _unchecked(kind: type[Selector], values: dict[str, Any]) -> Selector:
    """A selector with these fields; its constructor would read tensors to check them."""
    ranking = copy.copy(kind())
    vars(ranking).update(values)
    if kind is MInference and values["adaptive_budget"] is not None:
        vars(ranking).pop("tuned", None)
    return ranking


@torch.library.custom_op("spas_attn::select_blocks", mutates_args=())
@replayed
def _fused_op(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, tensors: list[Tensor | None],
    document_start: Tensor | None, numbers: list[float], flags: list[int], is_causal: bool, scale: float,
    window: int | None, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Counts and indices of the kept blocks, the fields of ``Keys`` (empty without ``quantise``), those of ``Values``.

    v: given where it is wanted in 8 bits.
    """
    call = Call(q, k, k if v is None else v, is_causal, scale, key_mask, window, document_start=document_start)
    call = call.replace(precision="native" if v is None else "int8_fp8")
    selection = _fused_now(_parts_again(tensors, numbers, flags), call, quantise)
    k_int8, k_scale, k_mean = selection.keys or [q.new_empty(0) for _ in range(3)]
    v_fp8, v_scale = selection.values or [q.new_empty(0) for _ in range(2)]
    return selection.mask.counts, selection.mask.indices, k_int8, k_scale, k_mean, v_fp8, v_scale


@_fused_op.register_fake
def _fused_shapes(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, tensors: list[Tensor | None],
    document_start: Tensor | None, numbers: list[float], flags: list[int], is_causal: bool, scale: float,
    window: int | None, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, heads, q_len, dim), (_, k_heads, k_len, _) = q.shape, k.shape
    nq, nk = cdiv(q_len, flags[1]), cdiv(k_len, flags[2])
    counts = q.new_empty(batch, heads, nq, dtype=torch.int32)
    indices = q.new_empty(batch, heads, nq, nk, dtype=torch.int32)
    keys = [q.new_empty(0) for _ in range(3)]
    values = [q.new_empty(0) for _ in range(2)]
    padded, scale_shape = max(32, 1 << (dim - 1).bit_length()), (batch, k_heads, nk)
    if quantise:
        keys = [
            q.new_empty(batch, k_heads, k_len, padded, dtype=torch.int8),
            q.new_empty(scale_shape, dtype=torch.float32),
            q.new_empty(batch, k_heads, padded, dtype=torch.float32),
        ]
    if v is not None:
        values = [
            q.new_empty(batch, k_heads, padded, cdiv(k_len, 128) * 128, dtype=torch.float8_e4m3fn),
            q.new_empty(scale_shape, dtype=torch.float32),
        ]
    return (counts, indices, keys[0], keys[1], keys[2], values[0], values[1])


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
    return constant(_touched[key])
