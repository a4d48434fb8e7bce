"""What every selector is: a small dataclass whose ``select`` turns q and k into a BlockMask."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..block_mask import BLOCK_SIZES, BlockMask, cdiv, visible_blocks

PerHead = float | Tensor  # one value, or a tensor [Hq]


def per_head(value: PerHead, heads: int, name: str, device: torch.device) -> Tensor:
    """``value`` as a float32 tensor ``[heads]``."""
    tensor = torch.as_tensor(value, dtype=torch.float32, device=device)
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.shape[0] not in (1, heads)):
        raise ValueError(f"{name} must be a float or a tensor [{heads}], got shape {tuple(tensor.shape)}")
    return tensor.expand(heads)


@dataclass(frozen=True)
class Inputs:
    """What a selector sees of one call: q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]``, key padding ``[B, Lk]``."""

    q: Tensor
    k: Tensor
    is_causal: bool
    scale: float
    key_mask: Tensor | None
    window: int | None

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys under (lower-right) causality."""
        return self.k.shape[2] - self.q.shape[2]


@dataclass
class Selector:
    """Base of the selectors.

    Attributes:
        block_q, block_k: mask block sizes in tokens (64 or 128).
        sink: always keep the first block that has a visible key (block 0 unless the batch is padded on the left).
        local: under causality, always keep the blocks of the ``local`` keys before each query block. Without them
            the first queries of a block see little of what directly precedes them, and perplexity suffers long before
            any mean error shows it (docs/benchmarks/notes.md).
    """

    block_q: int = dataclasses.field(default=128, kw_only=True)
    block_k: int = dataclasses.field(default=128, kw_only=True)
    sink: bool = dataclasses.field(default=True, kw_only=True)
    local: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            if getattr(self, name) not in BLOCK_SIZES:
                raise ValueError(f"{name} must be one of {BLOCK_SIZES}, got {getattr(self, name)!r}")
        if not isinstance(self.local, int) or self.local < 0:
            raise ValueError(f"local must be a number of tokens, 0 or more, got {self.local!r}")

    @property
    def expected_density(self) -> float | None:
        """Share of blocks this selector is expected to keep, None when nothing is known before the call."""
        return None

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        is_causal: bool,
        scale: float | None = None,
        attn_mask: Tensor | None = None,
        window: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> BlockMask:
        """Choose the blocks of one call.

        Args:
            q: ``[B, Hq, Lq, D]``.
            k: ``[B, Hkv, Lk, D]``.
            is_causal: lower-right aligned causality.
            scale: softmax scale, ``D ** -0.5`` by default.
            attn_mask: bool key-padding mask ``[B, Lk]`` or ``[B, 1, 1, Lk]``, True = attend.
            window: with causality, a query sees its last ``window`` keys.
            cu_seqlens_q, cu_seqlens_k: int32 ``[n + 1]`` for packed sequences (batch 1; read on the host).
        """
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            masks = [
                self.select(q[:, :, a:b], k[:, :, c:d], is_causal=is_causal, scale=scale, window=window)
                for (a, b), (c, d) in zip(spans(cu_seqlens_q), spans(cu_seqlens_k), strict=True)
            ]
            return BlockMask.pack(masks, cu_seqlens_q, cu_seqlens_k)
        if attn_mask is not None and attn_mask.dim() == 4:
            if attn_mask.shape[1] != 1 or attn_mask.shape[2] != 1:
                raise ValueError(
                    f"attn_mask must be a key-padding mask [B, Lk] or [B, 1, 1, Lk], got {tuple(attn_mask.shape)}"
                )
            attn_mask = attn_mask[:, 0, 0]
        inputs = Inputs(q, k, is_causal, scale, attn_mask, window)
        from . import fused  # knows the selectors, which are made from this class

        if fused.serves(self, inputs):
            return fused.select(self, inputs)
        visible, kept = self.visible(inputs), self.kept_blocks(inputs)
        # A rule may keep nothing of a query block that has something to see; then its first visible block is kept.
        first = visible & (visible.cumsum(-1) == 1)
        kept = (kept | (first & ~kept.any(-1, keepdim=True))).expand(q.shape[0], q.shape[1], -1, -1)
        return BlockMask.from_dense(kept, q.shape[2], k.shape[2], self.block_q, self.block_k)

    def kept_blocks(self, inputs: Inputs) -> Tensor:
        """Kept blocks, bool broadcastable to ``[B, Hq, nq, nk]``; invisible blocks are never kept."""
        raise NotImplementedError

    def visible(self, inputs: Inputs) -> Tensor:
        """Blocks with something to see: causality, window and padding; bool ``[B or 1, 1, nq, nk]``."""
        q, k = inputs.q, inputs.k
        visible = visible_blocks(
            q.shape[2],
            k.shape[2],
            self.block_q,
            self.block_k,
            is_causal=inputs.is_causal,
            window=inputs.window,
            device=q.device,
        )[None, None]
        if inputs.key_mask is not None:
            visible = visible & blockwise(inputs.key_mask, self.block_k).any(-1)[:, None, None]
        return visible

    def forced(self, inputs: Inputs, visible: Tensor) -> Tensor:
        """Blocks kept whatever the scores say: the sink, and under causality the diagonal and the local keys."""
        forced = torch.zeros_like(visible)
        nq, nk = visible.shape[-2:]
        device = visible.device
        if inputs.is_causal:
            start_q = torch.arange(nq, device=device)[:, None] * self.block_q + inputs.offset
            start_k = torch.arange(nk, device=device) * self.block_k
            forced = forced | ((start_k < start_q + self.block_q) & (start_k + self.block_k > start_q - self.local))
        if self.sink:
            first = torch.zeros(1, dtype=torch.long, device=device)
            if inputs.key_mask is not None:
                first = inputs.key_mask.to(torch.int8).argmax(-1) // self.block_k
            forced = forced | (torch.arange(nk, device=device) == first[:, None])[:, None, None]
        return forced & visible

    def __or__(self, other: Selector) -> Selector:
        """Keeps what either keeps."""
        from .union import Union

        return Union(self, other)


def check_pool(selector: Selector) -> None:
    """Refuse a ``pool`` that does not divide both block sizes."""
    length = getattr(selector, "pool")  # noqa: B009 - only some selectors have one
    sizes = (selector.block_q, selector.block_k)
    if not isinstance(length, int) or length < 1 or any(size % length for size in sizes):
        raise ValueError(f"pool must be a divisor of both block sizes {sizes}, got {length!r}")


def spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every packed sequence; reads the tensor on the host."""
    ends = cu_seqlens.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def blockwise(x: Tensor, block: int, value: float = 0) -> Tensor:
    """Cut the last dimension into blocks, the ragged last one filled with ``value``: ``[..., n, block]``."""
    length = x.shape[-1]
    return torch.nn.functional.pad(x, (0, cdiv(length, block) * block - length), value=value).unflatten(-1, (-1, block))
