"""The two attentions that gates of heads choose between: full, and streaming (sink and window)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spas_attn import BlockMask, block_sparse_attention
from spas_attn.selectors import Dense, Selector, Streaming

MASK_OPTIONS = ("is_causal", "attn_mask", "window")  # what says which blocks are kept, besides lengths and documents
CALL_OPTIONS = (*MASK_OPTIONS, "scale", "sinks")


class _Mix(torch.autograd.Function):
    """z · full + (1 − z) · streaming, which keeps nothing that the branches do not keep anyway."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, full: Tensor, streaming: Tensor) -> Tensor:
        ctx.save_for_backward(z, full, streaming)
        return torch.lerp(streaming, full, z[:, None, None].to(full.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, full, streaming = ctx.saved_tensors
        of_z = of_full = of_streaming = None
        if ctx.needs_input_grad[0]:
            # The difference first: the two are often close, and a sum of each alone would cancel in half precision.
            of_z = (grad * (full - streaming)).sum((0, 2, 3), dtype=torch.float32).to(z.dtype)
        if any(ctx.needs_input_grad[1:]):
            of_full = grad * z[:, None, None].to(grad.dtype)
            of_streaming = grad - of_full
        return of_z, of_full, of_streaming


def mix(z: Tensor, full: Tensor, streaming: Tensor) -> Tensor:
    """z · full + (1 − z) · streaming; z ``[Hq]`` float32, the others ``[B, Hq, L, D]``."""
    mixed: Tensor = _Mix.apply(z, full, streaming.to(full.dtype))
    return mixed


class Branches:
    """Full and streaming attention of a model's layers.

    The masks of blocks are the same in all layers of a forward and in all heads: they are made once.

    Args:
        streaming: the rule of the streaming branch, the one that serves streaming heads later.
    """

    def __init__(self, streaming: Streaming) -> None:
        self.rule = streaming
        self._streaming = _Masks(streaming)
        self._full = _Masks(Dense(block_q=streaming.block_q, block_k=streaming.block_k))

    def full(self, q: Tensor, k: Tensor, v: Tensor, dense: Callable[[], Tensor], options: dict[str, Any]) -> Tensor:
        """The model's own attention; of packed sequences every one by itself, without a mask of all pairs of tokens."""
        if options.get("cu_seqlens") is None:
            return dense()
        return _attend(q, k, v, self._full.get(q, k, options), options)

    def streaming(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention to sink and window."""
        return _attend(q, k, v, self._streaming.get(q, k, options), options)

    def fixed(
        self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, dense: Callable[[], Tensor], options: dict[str, Any]
    ) -> Tensor:
        """Full attention in the heads (bool ``[Hq]``, on the CPU) that are True, streaming in the others."""
        if bool(heads.all()):
            return self.full(q, k, v, dense, options)
        mask = self._streaming.get(q, k, options)
        if bool(heads.any()):
            mask = _per_head(heads, self._full.get(q, k, options), mask)
        return _attend(q, k, v, mask, options)


class _Masks:
    """The blocks that a rule, which is the same for all heads, keeps in a call; those of the last call are kept."""

    def __init__(self, rule: Selector) -> None:
        self.rule = rule
        self._last: tuple[tuple[Any, ...], BlockMask] | None = None

    def get(self, q: Tensor, k: Tensor, options: dict[str, Any]) -> BlockMask:
        """The mask of a call; the lists of one head stand for all (strides of 0)."""
        documents, padding = options.get("cu_seqlens"), options.get("attn_mask")
        if torch.compiler.is_compiling():  # a traced graph must not depend on what is kept here
            return self._make(q, k, options)
        versions = [x._version for x in (documents, padding) if x is not None and not x.is_inference()]
        inference = torch.is_inference_mode_enabled()  # what is made then cannot be kept for a backward pass
        key = (q.shape[:3], k.shape[2], q.device, options.get("window"), versions, inference, documents, padding)
        known = self._last  # threads share the object
        if known is None or not all(_same(a, b) for a, b in zip(known[0], key, strict=True)):
            known = self._last = (key, self._make(q, k, options))
        return known[1]

    def _make(self, q: Tensor, k: Tensor, options: dict[str, Any]) -> BlockMask:
        documents, padding = options.get("cu_seqlens"), options.get("attn_mask")
        rows = slice(None) if padding is not None else slice(1)
        chosen: dict[str, Any] = {name: options.get(name) for name in MASK_OPTIONS}
        one = self.rule.select(
            q[rows, :1].detach(), k[rows, :1].detach(), cu_seqlens_q=documents, cu_seqlens_k=documents, **chosen
        )
        return _with(one, *(x.expand(*q.shape[:2], *x.shape[2:]) for x in (one.counts, one.indices)))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}  # a copy of a model need not have it


def _same(a: Any, b: Any) -> bool:
    return a is b or (not (isinstance(a, Tensor) or isinstance(b, Tensor)) and a == b)


def _per_head(heads: Tensor, full: BlockMask, streaming: BlockMask) -> BlockMask:
    """The blocks of ``full`` in the heads that are True, those of ``streaming`` in the others."""
    heads = heads.to(full.counts.device, non_blocking=True)[:, None]
    counts = torch.where(heads, full.counts, streaming.counts)
    return _with(full, counts, torch.where(heads[..., None], full.indices, streaming.indices))


def _with(mask: BlockMask, counts: Tensor, indices: Tensor) -> BlockMask:
    return BlockMask(
        counts, indices, mask.block_q, mask.block_k, mask.q_len, mask.k_len, mask.cu_seqlens_q, mask.cu_seqlens_k,
        trusted=True,
    )  # fmt: skip


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, options: dict[str, Any]) -> Tensor:
    given: dict[str, Any] = {name: options.get(name) for name in CALL_OPTIONS}
    return block_sparse_attention(q, k, v, mask, **given)
