"""The calls of the library: make a Call, plan it, select its blocks, run it.

    sparse_attention        selects the blocks itself (a selector decides)
    block_sparse_attention  computes a given BlockMask
    explain                 says which backend would run, and why

A backend that cannot serve a call declines it with a reason. Then ``strict=True`` raises; otherwise one warning names
the reason, the exact dense backend does the call, and ``fallback_counts()`` counts it. Where exact dense attention is
measured to be faster (cost_model.py), ``backend="auto"`` runs it and selects nothing; that is no fallback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import backends
from .block_mask import BlockMask
from .call import Call, CallOptions
from .plan import AUTOMATIC, Plan, count_fallback, plan, resolve_precision, wants_gradients
from .select import select
from .selectors import Dense, Selector

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class AttentionStats:
    """What one call did.

    Attributes:
        plan: how it ran.
        call: the call.
        computed: the blocks that were computed, None for a dense call (density 1); of packed sequences that ran as one
            call, those of that call.
    """

    plan: Plan
    call: Call
    computed: BlockMask | None

    @property
    def mask(self) -> BlockMask | None:
        """The blocks that were computed, as a mask for :func:`block_sparse_attention`; None for a dense call."""
        mask, cu_seqlens = self.computed, self.call.cu_seqlens_q
        if mask is None or cu_seqlens is None or mask.cu_seqlens_q is not None:
            return mask
        return mask.packed(cu_seqlens, self.call.q_len)

    @property
    def backend(self) -> str:
        """Name of the backend that ran."""
        return self.plan.backend

    @property
    def density(self) -> Tensor:
        """Kept blocks over the blocks of dense (causal) attention, float32 ``[B, Hq]``; 1 - sparsity.

        Computed when it is asked for: it costs a pass over the grid of blocks, which a call need not pay.
        """
        mask = self.mask
        if mask is None:
            return torch.ones(self.call.q.shape[:2], device=self.call.q.device)
        return mask.density(self.call.is_causal, self.call.window)


# fmt: off
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector, *, return_stats: Literal[True], backend: str = ...,
    strict: bool = ..., **options: Unpack[CallOptions],
) -> tuple[Tensor, AttentionStats]: ...
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector, *, return_stats: Literal[False] = ..., backend: str = ...,
    strict: bool = ..., **options: Unpack[CallOptions],
) -> Tensor: ...
# fmt: on
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector,
    *,
    return_stats: bool = False,
    backend: str = "auto",
    strict: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, AttentionStats]:
    """Attention over the blocks that ``selector`` keeps; the softmax runs over the tokens of the kept blocks.

    Args:
        q: ``[B, Hq, Lq, D]`` (layout "HND") or ``[B, Lq, Hq, D]`` ("NHD"); float16, bfloat16 or float32, any strides.
        k, v: the same with Hkv heads and Lk tokens; Hq is a multiple of Hkv. D is 16 to 256.
        selector: which blocks to keep.
        return_stats: also return :class:`AttentionStats`.
        backend: a name, or "auto".
        strict: raise instead of falling back to dense attention.
        options: is_causal, scale, attn_mask, window, layout, cu_seqlens_q, cu_seqlens_k, sinks, pv_threshold,
            precision, error_bound, expected_density, as :class:`spas_attn.call.CallOptions` documents them.

    Returns:
        The output in q's shape, dtype, layout and device; a query with no visible key gives 0.

    Raises:
        ValueError, TypeError: on bad arguments, naming the argument, what came and what is allowed.
        RuntimeError: with ``strict``, when the call cannot be served as asked.
    """
    if not isinstance(selector, Selector):
        raise TypeError(f"selector must be a Selector, got {type(selector).__name__}")
    out, stats = attend(Call.make(q, k, v, **options), selector, backend=backend, strict=strict)
    out = out.transpose(1, 2) if options.get("layout") == "NHD" else out
    return (out, stats) if return_stats else out


# fmt: off
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, return_lse: Literal[True], backend: str = ...,
    strict: bool = ..., **options: Unpack[CallOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, return_lse: Literal[False] = ..., backend: str = ...,
    strict: bool = ..., **options: Unpack[CallOptions],
) -> Tensor: ...
# fmt: on
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    return_lse: bool = False,
    backend: str = "auto",
    strict: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the blocks of a given mask; arguments, result and errors as in :func:`sparse_attention`.

    A packed mask brings its own ``cu_seqlens``. An output never depends on later tokens under ``is_causal``.
    With ``return_lse``, also the natural log of the sum of each query's exponentials, float32 ``[B, Hq, Lq]`` (-inf
    for a query that sees nothing), with which partial results can be merged; PV skip is then left out. With ``sinks``
    the sum has the sink's exponential in it, as the output's denominator has: of partial results to be merged, one
    takes the sinks. Backends `triton`, `cpu`, `sdpa` and `reference` tell it.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    if options.keys() & {"cu_seqlens_q", "cu_seqlens_k"}:
        raise TypeError("a packed mask brings its own cu_seqlens_q and cu_seqlens_k: leave them out")
    packed: CallOptions = {"cu_seqlens_q": mask.cu_seqlens_q, "cu_seqlens_k": mask.cu_seqlens_k}
    call = Call.make(q, k, v, mask=mask, **(options | packed))
    lse = None
    if return_lse:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _attend_with_lse(call, backend)
    else:
        out, _ = attend(call, backend=backend, strict=strict)
    out = out.transpose(1, 2) if options.get("layout") == "NHD" else out
    return out if lse is None else (out, lse)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selector: Selector | None = None,
    *,
    backend: str = "auto",
    **options: Unpack[CallOptions],
) -> Plan:
    """Which backend :func:`sparse_attention` would use for such a call, and why; computes nothing.

    Without a selector the call is a dense one; of packed sequences that do not run as one call the first one speaks for
    all.
    """
    if selector is not None and not isinstance(selector, Selector):
        raise TypeError(f"selector must be a Selector or None, got {type(selector).__name__}")
    call = _with_density(Call.make(q, k, v, **options), selector)
    with torch.autocast(q.device.type, enabled=False):
        together = _together(call, selector, backend)
    return plan(call.split()[0], selector, backend) if together is None else together.plan


def attend(
    call: Call, selector: Selector | None = None, *, backend: str = "auto", strict: bool = False
) -> tuple[Tensor, AttentionStats]:
    """Run a call, with the blocks of its mask or those that ``selector`` keeps; the output is ``[B, Hq, Lq, D]``.

    Autocast is off inside: the inputs' dtype and ``precision`` say what is computed in.
    """
    with torch.autocast(call.q.device.type, enabled=False):
        return _attend(_with_density(call, selector), selector, backend, strict)


def _attend(call: Call, selector: Selector | None, backend: str, strict: bool) -> tuple[Tensor, AttentionStats]:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return _attend_one(call, selector, backend, strict)
    together = _together(call, selector, backend)
    if together is not None:
        return _attend_together(together, call)
    parts = [_attend_one(part, selector, backend, strict) for part in call.split()]
    all_stats = [stats for _, stats in parts]
    mask = None
    if any(stats.mask is not None for stats in all_stats):  # sequences too short to gain from it ran dense
        masks = [stats.mask or _every_block(stats.call, selector) for stats in all_stats]
        mask = BlockMask.pack(masks, call.cu_seqlens_q, call.cu_seqlens_k)
    return torch.cat([out for out, _ in parts], dim=2), AttentionStats(all_stats[0].plan, call, mask)


@dataclass(frozen=True)
class _Together:
    """Packed sequences as one call.

    Attributes:
        plan: how it runs.
        call: with what is to be selected from (``Call.aligned``), and its blocks where they are known.
        selector: what selects them, where they are not.
        place: row of every token, int64 ``[total]``.
    """

    plan: Plan
    call: Call
    selector: Selector | None
    place: Tensor


def _together(call: Call, selector: Selector | None, backend: str) -> _Together | None:
    """Packed sequences as one call, or None where they have to run one by one.

    That is: anything but causal self-attention; a selector that speaks of the whole sequence; gradients and whatever
    else needs dense attention, which would compute all pairs of sequences; and 8 bits, whose scales and means would
    be taken over several sequences.
    """
    if not call.is_self_packed or wants_gradients(call) or resolve_precision(call) != "native":
        return None
    if selector is not None and not selector.fits_packing:
        return None
    aligned, place = call.aligned()
    if aligned.mask is None and (selector is None or isinstance(selector, Dense)):
        aligned = aligned.replace(mask=(selector or Dense()).mask_of(aligned))
    chosen = plan(_unpadded(aligned), selector, backend)
    if chosen.fallback is not None or not backends.get(chosen.backend).skips_blocks:
        return None
    return _Together(chosen, aligned, selector, place)


def _unpadded(aligned: Call) -> Call:
    """An aligned call for a backend: gaps come after all queries of their sequence, so that causality hides them."""
    return aligned.replace(attn_mask=None)


def _attend_together(together: _Together, call: Call) -> tuple[Tensor, AttentionStats]:
    aligned = together.call.replace(precision=together.plan.precision)
    if together.plan.selects:
        assert together.selector is not None
        aligned = aligned.replace(mask=select(together.selector, aligned).mask)
    out = backends.get(together.plan.backend).compute(_unpadded(aligned))
    return out.index_select(2, together.place), AttentionStats(together.plan, call, aligned.mask)


def _attend_one(call: Call, selector: Selector | None, backend: str, strict: bool) -> tuple[Tensor, AttentionStats]:
    """:func:`attend` for one sequence: plan, select, run."""
    chosen = plan(call, selector, backend)
    runner = backends.get(chosen.backend)
    call = call.replace(precision=chosen.precision)
    if chosen.selects:
        assert selector is not None
        quantise = runner.takes_keys and chosen.precision != "native"
        selection = select(selector, call, quantise=quantise)
        call = call.replace(mask=selection.mask, keys=selection.keys)
    if chosen.fallback is not None:
        if strict:
            raise RuntimeError(f"strict=True, and the call cannot be served as asked: {chosen.fallback}")
        count_fallback(chosen.fallback)
    return runner.compute(call), AttentionStats(chosen, call, call.mask)


def _attend_with_lse(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    pairs = [_run_with_lse(part, backend) for part in call.split()]
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
    return out, lse


def _run_with_lse(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp from the named backend, or with "auto" from the first that tells it."""
    call = call.replace(pv_threshold=None, precision=resolve_precision(call))
    order = (*AUTOMATIC.get(call.q.device.type, ()), "reference")
    tellers = [name for name in backends.names() if backends.get(name).run_with_lse is not None]
    if backend not in ("auto", *tellers):
        raise ValueError(f"return_lse needs backend {' or '.join(map(repr, tellers))} or 'auto', got {backend!r}")
    why = None
    for name in [name for name in order if name in tellers] if backend == "auto" else [backend]:
        chosen = backends.get(name)
        why = chosen.why_not(call)
        if why is None:
            return chosen.compute_with_lse(call)
    raise ValueError(f"return_lse: the call cannot be served as asked: {why}")


def _with_density(call: Call, selector: Selector | None) -> Call:
    """The call with the selector's own estimate of what it keeps, unless the caller gave one."""
    if selector is None or call.expected_density is not None:
        return call
    return call.replace(expected_density=selector.expected_density)


def _every_block(call: Call, selector: Selector | None) -> BlockMask:
    """What a dense call computed, in the blocks of the selector."""
    assert selector is not None
    return Dense(block_q=selector.block_q, block_k=selector.block_k).mask_of(call)
