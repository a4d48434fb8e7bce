"""The two calls of the library: check the arguments, select the blocks, choose a backend, compute.

    sparse_attention        selects the blocks itself (a selector decides)
    block_sparse_attention  computes a given BlockMask
    explain                 says which backend would run, and why

A backend that cannot serve a call declines it with a reason. Then ``strict=True`` raises; otherwise one warning names
the reason, the exact dense backend does the call, and ``fallback_counts()`` counts it.
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
from .selectors import Dense, Selector
from .selectors.base import spans

Layout = Literal["HND", "NHD"]
Precision = Literal["bf16", "int8_bf16"]

_AUTO = {"cpu": ("cpu",), "cuda": ("triton",)}  # by device type, best first; exact dense `sdpa` comes last
_fallbacks: Counter[str] = Counter()


@dataclass(frozen=True)
class AttentionStats:
    """What one call did.

    Attributes:
        backend: name of the backend that ran.
        mask: the blocks that were computed, None for a dense call.
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


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, why, and why the others do not."""

    backend: str
    reason: str
    declined: dict[str, str]
    pv_skip_left_out: str | None = None  # why PV skip, if asked for, is not carried out

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.reason}"]
        if self.pv_skip_left_out is not None:
            lines[0] += f"; leaves PV skip out (the error only falls): {self.pv_skip_left_out}"
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.declined.items()])


# fmt: off
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector, *, is_causal: bool = ..., scale: float | None = ...,
    attn_mask: Tensor | None = ..., window: int | None = ..., layout: Layout = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., pv_threshold: float | Tensor | None = ..., precision: Precision = ...,
    backend: str = ..., expected_density: float | None = ..., strict: bool = ..., return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector, *, is_causal: bool = ..., scale: float | None = ...,
    attn_mask: Tensor | None = ..., window: int | None = ..., layout: Layout = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., pv_threshold: float | Tensor | None = ..., precision: Precision = ...,
    backend: str = ..., expected_density: float | None = ..., strict: bool = ..., return_stats: Literal[True],
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
        precision: "bf16" computes in the inputs' own 16 (or 32) bits, "int8_bf16" with Q and K in 8 bits.
        backend: a name, or "auto".
        expected_density: share of blocks expected to be kept, for the choice of the backend; the selector's own
            estimate by default.
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
    if cu_seqlens is not None:
        parts = [_select_and_run(part, selector, backend, strict) for part in _unpack(call, cu_seqlens)]
        masks = [part_mask for _, _, part_mask in parts]
        mask = None if None in masks else BlockMask.pack([m for m in masks if m is not None], *cu_seqlens)
        out, used = torch.cat([o for o, _, _ in parts], dim=2), parts[0][1]
    else:
        out, used, mask = _select_and_run(call, selector, backend, strict)
    out = out.transpose(1, 2) if layout == "NHD" else out
    shape = (call.q.shape[0], call.q.shape[1])
    stats = AttentionStats(used, mask, shape, call.q.device, call.is_causal, call.window)
    return (out, stats) if return_stats else out


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
    backend: str = "auto",
    expected_density: float | None = None,
    strict: bool = False,
) -> Tensor:
    """Attention over the blocks of a given mask; arguments, result and errors as in :func:`sparse_attention`.

    A packed mask brings its own ``cu_seqlens``. An output never depends on later tokens under ``is_causal``.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    density = 0.5 if expected_density is None else expected_density
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
        density,
        mask,
    )
    if cu_seqlens is not None:
        calls = [c.replace(mask=m) for c, m in zip(_unpack(call, cu_seqlens), mask.split(), strict=True)]
        out = torch.cat([_run(part, backend, strict)[0] for part in calls], dim=2)
    else:
        out, _ = _run(call.replace(mask=mask), backend, strict)
    return out.transpose(1, 2) if layout == "NHD" else out


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
    if cu_seqlens is not None:
        call = _unpack(call, cu_seqlens)[0]
    if _selects(call, selector):
        call = call.replace(mask=_stand_in(call, selector))
    return _choose(call, backend, sparse=not isinstance(selector, Dense))


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
    mask = None
    if _selects(call, selector):
        mask = selector.select(
            call.q, call.k, is_causal=call.is_causal, scale=call.scale, attn_mask=call.attn_mask, window=call.window
        )
    out, used = _run(call.replace(mask=mask), backend, strict, sparse=not isinstance(selector, Dense))
    return out, used, mask


def _selects(call: Call, selector: Selector) -> bool:
    """Whether blocks are selected for a call; otherwise it runs dense."""
    return not isinstance(selector, Dense) and _needs_dense(call) is None


def _stand_in(call: Call, selector: Selector) -> BlockMask:
    """A mask without content or memory of its own, for what depends on block sizes only."""
    grid = (cdiv(call.q.shape[2], selector.block_q), cdiv(call.k.shape[2], selector.block_k))
    zero = torch.zeros((), dtype=torch.int32, device=call.q.device)
    counts, indices = zero.expand(*call.q.shape[:2], grid[0]), zero.expand(*call.q.shape[:2], *grid)
    return BlockMask(counts, indices, selector.block_q, selector.block_k, call.q.shape[2], call.k.shape[2])


def _run(call: Call, backend: str, strict: bool, sparse: bool = True) -> tuple[Tensor, str]:
    """Run the call on the chosen backend; returns the output and the backend's name."""
    choice = _choose(call, backend, sparse)
    asked = choice.declined.get(backend if backend != "auto" else "sparse")
    if asked is not None:
        if strict:
            raise RuntimeError(f"strict=True, and the call cannot be served as asked: {asked}")
        count_fallback(asked)
    return backends.get(choice.backend).run(call), choice.backend


def _choose(call: Call, backend: str, sparse: bool) -> Explanation:
    """The backend for a call. ``declined["sparse"]`` says why a call that should be sparse has to run dense."""
    declined: dict[str, str] = {}
    dense_reason = _needs_dense(call) if sparse or call.mask is not None else None
    if backend != "auto":
        chosen = backends.get(backend)
        # The exact backends honour a given mask whatever else is asked; without one the call would be silently dense.
        why = None if call.mask is not None and backend in ("sdpa", "reference") else dense_reason
        why = why or chosen.missing() or chosen.declines(call)
        if why is None:
            return Explanation(backend, "asked for by name", declined, chosen.leaves_pv_skip_out(call))
        return Explanation("sdpa", "the exact dense backend serves every call", {backend: why})
    if dense_reason is not None:
        return Explanation("sdpa", "exact and differentiable", {"sparse": dense_reason})
    if not sparse and call.mask is None and call.precision == "bf16":
        return Explanation("sdpa", "a dense call", declined)
    for name in _AUTO.get(call.q.device.type, ()):
        candidate = backends.get(name)
        why = candidate.missing() or candidate.declines(call)
        if why is None:
            reason = f"first choice on {call.q.device.type}"
            return Explanation(name, reason, declined, candidate.leaves_pv_skip_out(call))
        declined[name] = why
    why = "; ".join(f"{name}: {reason}" for name, reason in declined.items()) or f"no backend for {call.q.device.type}"
    return Explanation("sdpa", "the exact dense backend serves every call", {**declined, "sparse": why})


def _needs_dense(call: Call) -> str | None:
    """Why a call cannot be sparse on any backend."""
    if _grad(call):
        return "gradients are asked for, and only the exact dense path is differentiable"
    if call.attn_mask is not None and call.attn_mask.dim() == 4:
        return "attn_mask is a full 4-D mask, which only exact dense backends honour"
    return None


def _grad(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))


def _unpack(call: Call, cu_seqlens: tuple[Tensor, Tensor]) -> list[Call]:
    """One call per packed sequence; views, nothing is copied."""
    pairs = zip(spans(cu_seqlens[0]), spans(cu_seqlens[1]), strict=True)
    return [call.replace(q=call.q[:, :, a:b], k=call.k[:, :, c:d], v=call.v[:, :, c:d]) for (a, b), (c, d) in pairs]
