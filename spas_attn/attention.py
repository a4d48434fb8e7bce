"""The two calls of the library: check the arguments, select the blocks, choose a backend, compute.

    sparse_attention        selects the blocks itself (a selector decides)
    block_sparse_attention  computes a given BlockMask
    explain                 says which backend would run, and why

A backend that cannot serve a call declines it with a reason. Then ``strict=True`` raises; otherwise one warning names
the reason, the exact dense backend does the call, and ``fallback_counts()`` counts it. Where exact dense attention is
measured to be faster (crossover.py), ``backend="auto"`` runs it and selects nothing; that is no fallback.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from . import backends
from .backends import Call
from .block_mask import BlockMask, cdiv
from .checks import check_arguments
from .dispatch import DEFAULT_BOUND, Explanation, choose, needs_dense, resolve_precision
from .selectors import Dense, Inputs, Selector, fused
from .selectors.base import spans

Layout = Literal["HND", "NHD"]
Precision = Literal["bf16", "int8_bf16", "int8_fp8", "auto"]

_fallbacks: Counter[str] = Counter()


@dataclass(frozen=True)
class AttentionStats:
    """What one call did.

    Attributes:
        backend: name of the backend that ran.
        mask: the blocks that were computed, None for a dense call (density 1).
        shape: (batch, query heads) of the call; device, is_causal, window: its own.
    """

    backend: str
    mask: BlockMask | None
    shape: tuple[int, int]
    device: torch.device
    is_causal: bool
    window: int | None

    @property
    def density(self) -> Tensor:
        """Kept blocks over the blocks of dense (causal) attention, float32 ``[B, Hq]``; 1 - sparsity.

        Computed when it is asked for: it costs a pass over the grid of blocks, which a call need not pay.
        """
        if self.mask is None:
            return torch.ones(self.shape, device=self.device)
        return self.mask.density(self.is_causal, self.window)


# fmt: off
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector, *, is_causal: bool = ..., scale: float | None = ...,
    attn_mask: Tensor | None = ..., window: int | None = ..., layout: Layout = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., pv_threshold: float | Tensor | None = ..., precision: Precision = ...,
    error_bound: float = ..., backend: str = ..., expected_density: float | None = ..., strict: bool = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector, *, is_causal: bool = ..., scale: float | None = ...,
    attn_mask: Tensor | None = ..., window: int | None = ..., layout: Layout = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., pv_threshold: float | Tensor | None = ..., precision: Precision = ...,
    error_bound: float = ..., backend: str = ..., expected_density: float | None = ..., strict: bool = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, AttentionStats]: ...
# fmt: on
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    layout: Layout = "HND",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pv_threshold: float | Tensor | None = None,
    precision: Precision = "bf16",
    error_bound: float = DEFAULT_BOUND,
    backend: str = "auto",
    expected_density: float | None = None,
    strict: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Attention over the blocks that ``selector`` keeps; the softmax runs over the tokens of the kept blocks.

    Args:
        q: ``[B, Hq, Lq, D]`` (layout "HND") or ``[B, Lq, Hq, D]`` ("NHD"); float16, bfloat16 or float32, any strides.
        k, v: the same with Hkv heads and Lk tokens; Hq is a multiple of Hkv. D is 16 to 256.
        selector: which blocks to keep.
        is_causal: query i sees keys up to i + Lk - Lq (needs Lq <= Lk).
        scale: factor on q·k, in selection too; ``D ** -0.5`` by default.
        attn_mask: bool, True = attend: key padding ``[B, Lk]`` or ``[B, 1, 1, Lk]``; a full ``[B, 1 or Hq, Lq, Lk]``
            mask runs dense and exact instead (counted; ``strict`` raises).
        window: with causality, a query sees its last ``window`` keys.
        cu_seqlens_q, cu_seqlens_k: int32 ``[n + 1]``, packed sequences in a batch of 1; read on the host.
        pv_threshold: PV skip, a float or ``[Hq]``, in log2 of probability ratios; None or 50 is off.
        precision: "bf16" computes in the inputs' own 16 (or 32) bits, "int8_bf16" with Q and K in 8 bits, "int8_fp8"
            with P and V in 8 bits too; "auto" takes the fastest whose quantisation error (dispatch.py) is at most half
            of ``error_bound``: errors of selection and of quantisation are independent and add up as squares do.
        error_bound: relative L1 that the whole call may have, for ``precision="auto"`` only.
        backend: a name, or "auto".
        expected_density: share of blocks expected to be kept, for the choice of the backend; the selector's own
            estimate by default. Where that knows none, lengths alone decide whether dense attention is faster.
        strict: raise instead of falling back to dense attention.
        return_stats: also return :class:`AttentionStats`.

    Returns:
        The output in q's shape, dtype, layout and device; a query with no visible key gives 0.

    Raises:
        ValueError, TypeError: on bad arguments, naming the argument, what came and what is allowed.
        RuntimeError: with ``strict``, when the call cannot be served as asked.
    """
    if not isinstance(selector, Selector):
        raise TypeError(f"selector must be a Selector, got {type(selector).__name__}")
    density = selector.expected_density if expected_density is None else expected_density
    call, cu_seqlens = check_arguments(
        q,
        k,
        v,
        is_causal,
        scale,
        attn_mask,
        window,
        layout,
        cu_seqlens_q,
        cu_seqlens_k,
        pv_threshold,
        precision,
        density,
    )
    call = resolve_precision(call, error_bound)
    if cu_seqlens is not None:
        calls = _unpack(call, cu_seqlens)
        parts = [_select_and_run(part, selector, backend, strict) for part in calls]
        mask = None
        if any(part[2] is not None for part in parts):  # sequences too short to gain from it ran dense
            masks = [part[2] or _all_blocks(c, selector) for c, part in zip(calls, parts, strict=True)]
            mask = BlockMask.pack(masks, *cu_seqlens)
        out, used = torch.cat([part[0] for part in parts], dim=2), parts[0][1]
    else:
        out, used, mask = _select_and_run(call, selector, backend, strict)
    out = out.transpose(1, 2) if layout == "NHD" else out
    shape = (call.q.shape[0], call.q.shape[1])
    stats = AttentionStats(used, mask, shape, call.q.device, call.is_causal, call.window)
    return (out, stats) if return_stats else out


# fmt: off
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, is_causal: bool = ..., scale: float | None = ...,
    attn_mask: Tensor | None = ..., window: int | None = ..., layout: Layout = ...,
    pv_threshold: float | Tensor | None = ..., precision: Precision = ..., error_bound: float = ...,
    backend: str = ..., expected_density: float | None = ..., strict: bool = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, is_causal: bool = ..., scale: float | None = ...,
    attn_mask: Tensor | None = ..., window: int | None = ..., layout: Layout = ...,
    pv_threshold: float | Tensor | None = ..., precision: Precision = ..., error_bound: float = ...,
    backend: str = ..., expected_density: float | None = ..., strict: bool = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    layout: Layout = "HND",
    pv_threshold: float | Tensor | None = None,
    precision: Precision = "bf16",
    error_bound: float = DEFAULT_BOUND,
    backend: str = "auto",
    expected_density: float | None = None,
    strict: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the blocks of a given mask; arguments, result and errors as in :func:`sparse_attention`.

    A packed mask brings its own ``cu_seqlens``. An output never depends on later tokens under ``is_causal``.
    With ``return_lse``, also the natural log of the sum of each query's exponentials, float32 ``[B, Hq, Lq]`` (-inf
    for a query that sees nothing), with which partial results can be merged; PV skip is then left out. Backends
    `triton` and `reference` tell it.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    call, cu_seqlens = check_arguments(
        q,
        k,
        v,
        is_causal,
        scale,
        attn_mask,
        window,
        layout,
        mask.cu_seqlens_q,
        mask.cu_seqlens_k,
        pv_threshold,
        precision,
        expected_density,
        mask,
    )
    call = resolve_precision(call, error_bound)
    if cu_seqlens is None:
        calls = [call.replace(mask=mask)]
    else:
        calls = [c.replace(mask=m) for c, m in zip(_unpack(call, cu_seqlens), mask.split(), strict=True)]
    if return_lse:
        pairs = [_run_with_lse(part.replace(pv_threshold=None), backend) for part in calls]
        out, lse = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
        return (out.transpose(1, 2) if layout == "NHD" else out), lse
    if cu_seqlens is not None:
        out = torch.cat([_run_given(part, backend, strict) for part in calls], dim=2)
    else:
        out = _run_given(calls[0], backend, strict)
    return out.transpose(1, 2) if layout == "NHD" else out


def _run_with_lse(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    for name in ("triton", "reference") if backend == "auto" else (backend,):
        chosen = backends.get(name)
        if chosen.run_with_lse is None:
            raise ValueError(f"return_lse needs backend 'triton', 'reference' or 'auto', got {name!r}")
        why = chosen.missing() or chosen.declines(call)
        if why is None and (name != "triton" or backend != "auto" or call.q.is_cuda):
            return chosen.run_with_lse(call)
    raise ValueError(f"return_lse: the call cannot be served as asked: {why}")


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    layout: Layout = "HND",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    pv_threshold: float | Tensor | None = None,
    precision: Precision = "bf16",
    error_bound: float = DEFAULT_BOUND,
    backend: str = "auto",
    expected_density: float | None = None,
) -> Explanation:
    """Which backend :func:`sparse_attention` would use for such a call, and why; computes nothing.

    Without a selector the call is a dense one; of packed sequences the first one speaks for all.
    """
    selector = Dense() if selector is None else selector
    if not isinstance(selector, Selector):
        raise TypeError(f"selector must be a Selector or None, got {type(selector).__name__}")
    density = selector.expected_density if expected_density is None else expected_density
    call, cu_seqlens = check_arguments(
        q,
        k,
        v,
        is_causal,
        scale,
        attn_mask,
        window,
        layout,
        cu_seqlens_q,
        cu_seqlens_k,
        pv_threshold,
        precision,
        density,
    )
    call = resolve_precision(call, error_bound)
    if cu_seqlens is not None:
        call = _unpack(call, cu_seqlens)[0]
    if _selects(call, selector):
        call = call.replace(mask=_stand_in(call, selector))
    return choose(call, backend, sparse=not isinstance(selector, Dense))


def fallback_counts() -> dict[str, int]:
    """How many calls ran on exact dense attention instead of what was asked, by reason, since the process began."""
    return dict(_fallbacks)


def count_fallback(reason: str) -> None:
    """Count one call that runs dense instead of as asked; the first of each reason also warns."""
    _fallbacks[reason] += 1
    if _fallbacks[reason] == 1:
        warnings.warn(f"spas_attn: running exact dense attention instead: {reason}", RuntimeWarning, stacklevel=3)


def _select_and_run(call: Call, selector: Selector, backend: str, strict: bool) -> tuple[Tensor, str, BlockMask | None]:
    """The output, the name of the backend, and the selected blocks (None: dense)."""
    selects = _selects(call, selector)
    expected = call.replace(mask=_stand_in(call, selector)) if selects else call
    choice = choose(expected, backend, sparse=not isinstance(selector, Dense))
    if selects and choice.instead_of is None:
        call = _select(call, selector, choice.backend)
    return _run(call, choice, backend, strict), choice.backend, call.mask


def _select(call: Call, selector: Selector, backend: str) -> Call:
    """The call with its blocks; for the 8-bit kernels, the pass over K that scores its blocks quantises it as well."""
    inputs = Inputs(call.q, call.k, call.is_causal, call.scale, call.key_mask, call.window)
    if backend == "triton" and call.precision != "bf16" and fused.serves(selector, inputs):
        mask, keys = fused.select_and_quantise(selector, inputs)
        return call.replace(mask=mask, keys=keys)
    mask = selector.select(
        call.q, call.k, is_causal=call.is_causal, scale=call.scale, attn_mask=call.attn_mask, window=call.window
    )
    return call.replace(mask=mask)


def _selects(call: Call, selector: Selector) -> bool:
    """Whether blocks are selected for a call; otherwise it runs dense."""
    return not isinstance(selector, Dense) and needs_dense(call) is None


def _stand_in(call: Call, selector: Selector) -> BlockMask:
    """A mask without content or memory of its own, for what depends on block sizes only."""
    grid = (cdiv(call.q.shape[2], selector.block_q), cdiv(call.k.shape[2], selector.block_k))
    number = call.q.new_empty((), dtype=torch.int32)  # never read
    counts, indices = number.expand(*call.q.shape[:2], grid[0]), number.expand(*call.q.shape[:2], *grid)
    return BlockMask(counts, indices, selector.block_q, selector.block_k, call.q.shape[2], call.k.shape[2])


def _all_blocks(call: Call, selector: Selector) -> BlockMask:
    """What a dense call computed, in the blocks of the selector."""
    everything = Dense(block_q=selector.block_q, block_k=selector.block_k)
    return everything.select(call.q, call.k, is_causal=call.is_causal, scale=call.scale, window=call.window)


def _run_given(call: Call, backend: str, strict: bool) -> Tensor:
    return _run(call, choose(call, backend, sparse=True, mask_given=True), backend, strict)


def _run(call: Call, choice: Explanation, backend: str, strict: bool) -> Tensor:
    """Run the call on the chosen backend."""
    asked = choice.declined.get(backend if backend != "auto" else "sparse")
    if asked is not None:
        if strict:
            raise RuntimeError(f"strict=True, and the call cannot be served as asked: {asked}")
        count_fallback(asked)
    return backends.get(choice.backend).run(call)


def _unpack(call: Call, cu_seqlens: tuple[Tensor, Tensor]) -> list[Call]:
    """One call per packed sequence; views, nothing is copied."""
    pairs = zip(spans(cu_seqlens[0]), spans(cu_seqlens[1]), strict=True)
    return [call.replace(q=call.q[:, :, a:b], k=call.k[:, :, c:d], v=call.v[:, :, c:d]) for (a, b), (c, d) in pairs]
