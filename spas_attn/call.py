"""Call: one attention call, its arguments checked where it is made, passed on whole to everything that serves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from . import checks, packing
from .block_mask import BlockMask
from .checks import PerHead

Layout = Literal["HND", "NHD"]
Precision = Literal["native", "int8_bf16", "int8_fp8", "auto"]
Ranges = tuple[tuple[int, int], ...]  # (start, stop) of tokens

PRECISIONS = ("native", "int8_bf16", "int8_fp8", "auto")
ALIASES = {"bf16": "native"}  # the name of native precision in tuned files of format 1
DEFAULT_BOUND = 0.07


class CallOptions(TypedDict, total=False):
    """The keyword arguments of every public call.

    is_causal: query i sees keys up to i + Lk - Lq (needs Lq <= Lk).
    scale: factor above 0 on q·k, in selection too; ``D ** -0.5`` by default.
    attn_mask: bool, True = attend: key padding ``[B, Lk]`` or ``[B, 1, 1, Lk]``; a full ``[B, 1 or Hq, Lq, Lk]`` mask
        runs dense and exact instead (counted; ``strict`` raises).
    window: with causality, a query sees its last ``window`` keys.
    layout: of q, k, v and the output: "HND" (``[B, H, L, D]``) or "NHD" (``[B, L, H, D]``).
    cu_seqlens_q, cu_seqlens_k: int32 ``[n + 1]``, packed sequences in a batch of 1. Causal self-attention (one tensor
        for both) runs in one launch, and nothing is read on the host: bounds on a GPU are checked by an assertion
        there. Other packings run sequence by sequence, and so do calls that need exact dense attention, 8-bit
        precisions and selectors whose rule is about the whole sequence (``Selector.fits_packing``); that reads them.
    sinks: float32 ``[Hq]``, the logit of an attention sink per query head (GPT-OSS): exp(sink) is added to the
        denominator of the softmax, a key without a value. PV skip is left out then.
    pv_threshold: PV skip, above 0, a float or ``[Hq]``, in log2 of probability ratios; None or 50 is off.
    precision: "native" computes in the inputs' own dtype, "int8_bf16" with Q and K in 8 bits, "int8_fp8" with P and V
        in 8 bits too; "auto" takes the fastest whose quantisation error (plan.py) is at most half of ``error_bound``:
        errors of selection and of quantisation are independent and add up as squares do.
    error_bound: relative L1 that the whole call may have, for ``precision="auto"`` only.
    expected_density: share of blocks expected to be kept, for the choice of the backend; the selector's own estimate by
        default. Where that knows none, lengths alone decide whether dense attention is faster.
    """

    is_causal: bool
    scale: float | None
    attn_mask: Tensor | None
    window: int | None
    layout: Layout
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    sinks: Tensor | None
    pv_threshold: PerHead | None
    precision: Precision
    error_bound: float
    expected_density: float | None


@dataclass(frozen=True)
class Call:
    """One attention call. :meth:`make` checks its arguments; code of the library changes it with :meth:`replace`.

    Attributes:
        q: ``[B, Hq, Lq, D]``, any strides.
        k, v: ``[B, Hkv, Lk, D]``, Hq a multiple of Hkv, any strides.
        is_causal: lower-right aligned causality (query i sees keys up to i + Lk - Lq).
        scale: factor on q·k before the softmax.
        attn_mask: bool ``[B, Lk]`` key padding or bool ``[B, 1 or Hq, Lq, Lk]``, True = attend, or None.
        window: with causality, a query sees its last ``window`` keys, or None.
        blocks: (block_q, block_k) of the mask that is given or will be selected, None for a dense call.
        mask: the blocks to compute, None for all, or before they are selected.
        pv_threshold: float32 ``[Hq]``, PV skip of SpargeAttn (arXiv 2502.18137) in log2 units, or None for off.
        precision: "native" computes in the inputs' own dtype, the others quantise; see :meth:`make`.
        error_bound: relative L1 that the call may have, for ``precision="auto"``.
        expected_density: share of blocks expected to be kept, None when unknown; never read off this call's mask.
        text: (start, stop) of text tokens among queries and keys.
        keys, values: K and V in 8 bits, where selection has made them (``kernels.operands.Keys``, ``Values``).
        cu_seqlens_q, cu_seqlens_k: int32 ``[n + 1]`` of packed sequences, else None; one tensor where they are equal.
        sinks: float32 ``[Hq]``, logits added to the softmax's denominator, or None.
        document_start: int32 ``[L / 128]`` in a call of packed sequences that :meth:`aligned` made: the first row of
            the sequence that each stretch of 128 rows belongs to. No query sees another sequence's keys; ``attn_mask``
            says which rows hold a token.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool = False
    scale: float = 1.0
    attn_mask: Tensor | None = None
    window: int | None = None
    blocks: tuple[int, int] | None = None
    mask: BlockMask | None = None
    pv_threshold: Tensor | None = None
    precision: str = "native"
    error_bound: float = DEFAULT_BOUND
    expected_density: float | None = None
    text: Ranges = ()
    keys: tuple[Tensor, ...] | None = None
    values: tuple[Tensor, ...] | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    sinks: Tensor | None = None
    document_start: Tensor | None = None

    @classmethod
    def make(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        attn_mask: Tensor | None = None,
        window: int | None = None,
        layout: Layout = "HND",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sinks: Tensor | None = None,
        pv_threshold: PerHead | None = None,
        precision: str = "native",
        error_bound: float = DEFAULT_BOUND,
        expected_density: float | None = None,
        text: Ranges = (),
        mask: BlockMask | None = None,
    ) -> Call:
        """Check the arguments of a call, as :class:`CallOptions` has them; views, no copies.

        Args:
            q: ``[B, Hq, Lq, D]`` (in layout "HND"); float16, bfloat16 or float32, any strides.
            k, v: the same with Hkv heads and Lk tokens; Hq is a multiple of Hkv. D is 16 to 256.
            text: (start, stop) of text tokens among queries and keys, for those who watch a model's calls.
            mask: the blocks to compute.

        Raises:
            ValueError, TypeError: naming the argument, what came and what is allowed.
        """
        checks.check_choice("layout", layout, ("HND", "NHD"))
        precision = ALIASES.get(precision, precision)
        checks.check_choice("precision", precision, PRECISIONS)
        checks.check_tensors(q, k, v)
        if layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        checks.check_shapes(q, k, v)
        packed = checks.check_packed(q, k, cu_seqlens_q, cu_seqlens_k)
        if packed is not None:
            cu_seqlens_q, cu_seqlens_k = packed
        checks.check_causal(is_causal, q, k, packed)
        checks.check_window(window, is_causal)
        checks.check_mask(mask, q, k)
        return cls(
            q,
            k,
            v,
            is_causal=bool(is_causal),
            scale=checks.check_scale(scale, q.shape[-1]),
            attn_mask=checks.check_attn_mask(attn_mask, q, k, packed),
            window=window,
            blocks=None if mask is None else (mask.block_q, mask.block_k),
            mask=mask,
            pv_threshold=checks.check_pv_threshold(pv_threshold, q),
            precision=precision,
            error_bound=checks.check_error_bound(error_bound),
            expected_density=checks.check_density(expected_density),
            text=tuple(text),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            sinks=checks.check_sinks(sinks, q),
        )

    @property
    def q_len(self) -> int:
        """Lq."""
        return self.q.shape[2]

    @property
    def k_len(self) -> int:
        """Lk."""
        return self.k.shape[2]

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys under (lower-right) causality."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def key_mask(self) -> Tensor | None:
        """The key-padding mask ``[B, Lk]`` when ``attn_mask`` is one."""
        return self.attn_mask if self.attn_mask is not None and self.attn_mask.dim() == 2 else None

    @property
    def is_self_packed(self) -> bool:
        """Whether this is causal self-attention of packed sequences, which :meth:`aligned` serves."""
        return self.is_causal and self.cu_seqlens_q is not None and self.cu_seqlens_q is self.cu_seqlens_k

    @property
    def wants_gradients(self) -> bool:
        """Whether a backward pass may follow."""
        tensors = (self.q, self.k, self.v, self.sinks)
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None)

    def query_mask(self) -> Tensor | None:
        """Queries that are no padding themselves, bool ``[B, Lq]``: in self-attention the padding of the keys tells."""
        if self.key_mask is None or not (self.is_causal or self.q_len == self.k_len):
            return None
        return self.key_mask[:, self.offset :]

    def replace(self, **changes: object) -> Call:
        """A copy with some attributes changed; a new mask brings its block sizes."""
        mask = changes.get("mask")
        if isinstance(mask, BlockMask):
            changes["blocks"] = (mask.block_q, mask.block_k)
        if torch.compiler.is_compiling():
            return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        unknown = changes.keys() - vars(self).keys()
        if unknown:
            raise TypeError(f"a Call has no attributes {sorted(unknown)}")
        copy = object.__new__(Call)  # dataclasses.replace takes ten times as long
        vars(copy).update(vars(self), **changes)
        return copy

    def split(self) -> list[Call]:
        """One call per packed sequence, with its part of the mask; views, nothing is copied."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return [self]
        ends_q = checks.check_ends("cu_seqlens_q", self.cu_seqlens_q, self.q_len)
        ends_k = ends_q if self.is_self_packed else checks.check_ends("cu_seqlens_k", self.cu_seqlens_k, self.k_len)
        pairs = list(zip(_spans(ends_q), _spans(ends_k), strict=True))
        masks: Sequence[BlockMask | None] = [None] * len(pairs) if self.mask is None else self.mask.split()
        parts = [
            {"q": self.q[:, :, a:b], "k": self.k[:, :, c:d], "v": self.v[:, :, c:d], "mask": mask}
            for ((a, b), (c, d)), mask in zip(pairs, masks, strict=True)
        ]
        return [self.replace(cu_seqlens_q=None, cu_seqlens_k=None, **part) for part in parts]

    def aligned(self) -> tuple[Call, Tensor]:
        """Causal self-attention of packed sequences as one call, in which every sequence starts at a whole block.

        Nothing is read on the host.

        Returns:
            the call (see ``document_start``), and where its rows hold the tokens, int64 ``[total]``.
        """
        assert self.is_self_packed and self.cu_seqlens_q is not None
        cu_seqlens, total = self.cu_seqlens_q.to(self.q.device), self.q_len
        if not checks.is_readable(self.cu_seqlens_q):
            rises = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() > 0).all()
            torch._assert_async(rises, f"cu_seqlens must rise from 0 to the total length {total}")
        layout = packing.layout(cu_seqlens, total)
        tensors = {name: packing.spread(getattr(self, name), layout) for name in ("q", "k", "v")}
        mask = None if self.mask is None else self.mask.aligned()
        call = self.replace(
            **tensors, mask=mask, attn_mask=layout.valid[None], document_start=layout.document_start,
            cu_seqlens_q=None, cu_seqlens_k=None,
        )  # fmt: skip
        return call, layout.place

    def document_starts(self, block: int) -> Tensor:
        """First row of the packed sequence of each block of an :meth:`aligned` call, int64 ``[L / block]``."""
        assert self.document_start is not None
        return self.document_start.long().repeat_interleave(packing.STRETCH // block)

    def token_mask(self, start: int, stop: int) -> Tensor | None:
        """Everything that hides keys from query rows ``start`` to ``stop``, as one boolean mask.

        Returns:
            bool, broadcastable to ``[B, Hq, stop - start, Lk]``, True = attend; None when nothing is hidden.
        """
        parts: list[Tensor] = []
        device = self.q.device
        if self.is_causal:
            rows = torch.arange(start, stop, device=device)[:, None] + self.offset
            columns = torch.arange(self.k_len, device=device)
            seen = columns <= rows
            if self.window is not None:
                seen = seen & (columns > rows - self.window)
            parts.append(seen[None, None])
            if self.document_start is not None:
                parts.append((columns >= self.document_starts(1)[start:stop, None])[None, None])
        if self.attn_mask is not None:
            mask = self.attn_mask
            parts.append(mask[:, None, None] if mask.dim() == 2 else mask[:, :, start:stop])
        if self.mask is not None:
            parts.append(self.mask.token_mask(slice(start, stop)))
        if not parts:
            return None
        combined = parts[0]
        for part in parts[1:]:
            combined = combined & part
        return combined


def _spans(ends: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of every packed sequence."""
    return list(zip(ends[:-1], ends[1:], strict=True))
