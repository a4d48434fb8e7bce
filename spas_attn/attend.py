"""Running a call: plan it, select its blocks, compute it; packed sequences as one call where that is possible."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, gradients, packing
from .block_mask import BlockMask
from .call import Call
from .plan import AUTOMATIC, Plan, count_fallback, plan, resolve_precision
from .select import select
from .selectors import Dense, Selector


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


def attend(
    call: Call,
    selector: Selector | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
    chosen: Plan | None = None,
) -> tuple[Tensor, AttentionStats]:
    """Run a call, with the blocks of its mask or those that ``selector`` keeps; the output is ``[B, Hq, Lq, D]``.

    ``chosen`` is how it runs, where that is known of a call of the same signature.
    Autocast is off inside: the inputs' dtype and ``precision`` say what is computed in.
    """
    with no_autocast(call.q):
        return _attend(with_density(call, selector), selector, backend, strict, chosen)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast switched off, where it is on."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _attend(
    call: Call, selector: Selector | None, backend: str, strict: bool, chosen: Plan | None
) -> tuple[Tensor, AttentionStats]:
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return _attend_one(call, selector, backend, strict, chosen)
    together = as_one(call, selector, backend)
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


def as_one(call: Call, selector: Selector | None, backend: str) -> _Together | None:
    """Packed sequences as one call, or None where they have to run one by one.

    That is: anything but causal self-attention; a selector that speaks of the whole sequence; what needs dense
    attention, as gradients through a selection do, which would compute all pairs of sequences; and 8 bits, whose scales
    and means would be taken over several sequences.
    """
    if not call.is_self_packed or resolve_precision(call) != "native":
        return None
    if call.wants_gradients and call.mask is None:
        return None
    if selector is not None and not selector.fits_packing:
        return None
    aligned, place = call.aligned()
    if aligned.mask is None and (selector is None or isinstance(selector, Dense)):
        aligned = aligned.replace(mask=(selector or Dense()).mask_of(aligned))
    chosen = plan(unpadded(aligned), selector, backend)
    if chosen.fallback is not None or not backends.get(chosen.backend).skips_blocks:
        return None
    return _Together(chosen, aligned, selector, place)


def unpadded(aligned: Call) -> Call:
    """An aligned call for a backend: gaps come after all queries of their sequence, so that causality hides them."""
    return aligned.replace(attn_mask=None)


def _attend_together(together: _Together, call: Call) -> tuple[Tensor, AttentionStats]:
    aligned = together.call.replace(precision=together.plan.precision)
    if together.plan.selects:
        assert together.selector is not None
        aligned = aligned.replace(mask=select(together.selector, aligned).mask)
    out = gradients.compute(backends.get(together.plan.backend), unpadded(aligned))
    return packing.collect(out, together.place), AttentionStats(together.plan, call, aligned.mask)


def _attend_one(
    call: Call, selector: Selector | None, backend: str, strict: bool, chosen: Plan | None = None
) -> tuple[Tensor, AttentionStats]:
    """:func:`attend` for one sequence: plan, select, run."""
    chosen = chosen or plan(call, selector, backend)
    runner = backends.get(chosen.backend)
    call = call.replace(precision=chosen.precision)
    if chosen.selects:
        assert selector is not None
        quantise = runner.takes_keys and chosen.precision != "native"
        selection = select(selector, call, quantise=quantise)
        call = call.replace(mask=selection.mask, keys=selection.keys, values=selection.values)
    if chosen.fallback is not None:
        if strict:
            raise RuntimeError(f"strict=True, and the call cannot be served as asked: {chosen.fallback}")
        count_fallback(chosen.fallback)
    return gradients.compute(runner, call), AttentionStats(chosen, call, call.mask)


def attend_with_lse(call: Call, backend: str) -> tuple[Tensor, Tensor, str]:
    """Output, log-sum-exp, and the backend that ran (the first, of packed sequences)."""
    parts = [_run_with_lse(part, backend) for part in call.split()]
    if len(parts) == 1:
        return parts[0]
    outs, lses, names = zip(*parts, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2), names[0]


def _run_with_lse(call: Call, backend: str) -> tuple[Tensor, Tensor, str]:
    """Output and log-sum-exp from the named backend, or with "auto" from the first that tells it, and its name."""
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
            return (*gradients.compute_with_lse(chosen, call), name)
    raise ValueError(f"return_lse: the call cannot be served as asked: {why}")


def with_density(call: Call, selector: Selector | None) -> Call:
    """The call with the selector's own estimate of what it keeps, unless the caller gave one."""
    if selector is None or call.expected_density is not None:
        return call
    return call.replace(expected_density=selector.expected_density)


def _every_block(call: Call, selector: Selector | None) -> BlockMask:
    """What a dense call computed, in the blocks of the selector."""
    assert selector is not None
    return Dense(block_q=selector.block_q, block_k=selector.block_k).mask_of(call)
