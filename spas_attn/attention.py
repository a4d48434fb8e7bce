"""The calls of the library: make a Call, plan it, select its blocks, run it.

    sparse_attention        selects the blocks itself (a selector decides)
    block_sparse_attention  computes a given BlockMask
    explain                 says which backend would run, and why

A backend that cannot serve a call declines it with a reason. Then ``strict=True`` raises; otherwise one warning names
the reason, the exact dense backend does the call, and ``fallback_counts()`` counts it. Where exact dense attention is
measured to be faster (cost_model.py), ``backend="auto"`` runs it and selects nothing; that is no fallback.
Gradients flow through given blocks at the cost of these (gradients.py); a call that selects its blocks runs dense then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .again import attend_again, with_lse_again
from .attend import AttentionStats, as_one, no_autocast, with_density
from .attend import attend as attend
from .block_mask import BlockMask
from .call import Call, CallOptions
from .plan import Plan, plan
from .selectors import Selector

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    out, stats = attend_again(q, k, v, selector, options, backend=backend, strict=strict, wants_stats=return_stats)
    out = out.transpose(1, 2) if options.get("layout") == "NHD" else out
    return out if not return_stats or stats is None else (out, stats)


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
    Gradients of q, k, v and ``sinks`` cost what the kept blocks cost, need no memory for scores and are the same every
    time, on backends `triton` and `cpu` (FlashAttention-2's backward pass, arXiv 2307.08691); `sdpa` and `reference`
    compute them dense, the others decline. They are those of native precision without PV skip; second derivatives
    raise a RuntimeError.
    With ``return_lse``, also the natural log of the sum of each query's exponentials, float32 ``[B, Hq, Lq]`` (-inf
    for a query that sees nothing), with which partial results can be merged; PV skip is then left out. With ``sinks``
    the sum has the sink's exponential in it, as the output's denominator has: of partial results to be merged, one
    takes the sinks. Backends `triton`, `flash`, `flex`, `cudnn`, `cpu`, `sdpa` and `reference` tell it.
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    if options.keys() & {"cu_seqlens_q", "cu_seqlens_k"}:
        raise TypeError("a packed mask brings its own cu_seqlens_q and cu_seqlens_k: leave them out")
    packed: CallOptions = {"cu_seqlens_q": mask.cu_seqlens_q, "cu_seqlens_k": mask.cu_seqlens_k}
    given, lse = {**options, **packed, "mask": mask}, None
    if return_lse:
        out, lse = with_lse_again(q, k, v, given, backend)
    else:
        out, _ = attend_again(q, k, v, None, given, backend=backend, strict=strict)
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
    call = with_density(Call.make(q, k, v, **options), selector)
    with no_autocast(q):
        one = as_one(call, selector, backend)
    return plan(call.split()[0], selector, backend) if one is None else one.plan
