"""BlockMask: which key blocks each query block attends to, as compact index lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from . import packing

BLOCK_SIZES = (64, 128)


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def blockwise(x: Tensor, block: int, value: float = 0) -> Tensor:
    """Cut the last dimension into blocks, the ragged last one filled with ``value``: ``[..., n, block]``."""
    length = x.shape[-1]
    return torch.nn.functional.pad(x, (0, cdiv(length, block) * block - length), value=value).unflatten(-1, (-1, block))


def visible_blocks(
    q_len: int,
    k_len: int,
    block_q: int,
    block_k: int,
    *,
    is_causal: bool,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Blocks that hold at least one visible (query, key) pair.

    Causality aligns to the lower right: query i sees keys up to i + (k_len - q_len); with ``window=n`` only the
    last n of them.

    Returns:
        bool ``[nq, nk]``.
    """
    starts_q = torch.arange(0, q_len, block_q, device=device)
    starts_k = torch.arange(0, k_len, block_k, device=device)
    if not is_causal:
        return torch.ones(len(starts_q), len(starts_k), dtype=torch.bool, device=device)
    offset = k_len - q_len
    last_q = (starts_q + block_q).clamp(max=q_len) - 1 + offset
    seen = starts_k[None, :] <= last_q[:, None]
    if window is not None:
        last_k = (starts_k + block_k).clamp(max=k_len) - 1
        seen &= last_k[None, :] > starts_q[:, None] + offset - window
    return seen


@dataclass(frozen=True)
class BlockMask:
    """Kept key blocks per query block.

    Block i covers rows ``i * block`` onwards, from row 0, whatever the lengths are; last blocks may be ragged.
    With ``cu_seqlens`` (packed sequences, batch 1) the grids restart at each sequence: query blocks of all sequences
    stand one after the other, and indices count from the first key block of their own sequence. Spare rows may follow
    the last sequence: how many rows there are is known on the device only.

    Attributes:
        counts: int32 ``[B, Hq, nq]``, number of kept key blocks.
        indices: int32 ``[B, Hq, nq, nk]``, kept key blocks first, in ascending order; the rest of a row is filler.
        block_q, block_k: block sizes in tokens, 64 or 128.
        q_len, k_len: sequence lengths in tokens (packed: total lengths).
        cu_seqlens_q, cu_seqlens_k: int32 ``[n + 1]`` for packed sequences, else None.
        trusted: (of the constructor only) the library made it; its contents are not checked, which would wait for the
            device.

    Raises:
        ValueError, TypeError: on shapes, types, counts and indices that are no selection of blocks.
    """

    counts: Tensor
    indices: Tensor
    block_q: int
    block_k: int
    q_len: int
    k_len: int
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    trusted: InitVar[bool] = False

    def __post_init__(self, trusted: bool) -> None:
        for name in ("block_q", "block_k"):
            if getattr(self, name) not in BLOCK_SIZES:
                raise ValueError(f"{name} must be one of {BLOCK_SIZES}, got {getattr(self, name)}")
        if self.counts.dim() != 3 or self.indices.dim() != 4 or self.indices.shape[:3] != self.counts.shape:
            raise ValueError(
                "counts must be [B, H, nq] and indices [B, H, nq, nk], got "
                f"{tuple(self.counts.shape)} and {tuple(self.indices.shape)}"
            )
        if self.counts.dtype != torch.int32 or self.indices.dtype != torch.int32:
            raise TypeError(f"counts and indices must be int32, got {self.counts.dtype} and {self.indices.dtype}")
        if self.counts.device != self.indices.device:
            raise ValueError(
                f"counts and indices must be on one device, got {self.counts.device} and {self.indices.device}"
            )
        if (self.cu_seqlens_q is None) != (self.cu_seqlens_k is None):
            raise ValueError("cu_seqlens_q and cu_seqlens_k go together, got only one of them")
        if self.cu_seqlens_q is None:
            grid = (cdiv(self.q_len, self.block_q), cdiv(self.k_len, self.block_k))
            if tuple(self.indices.shape[2:]) != grid:
                raise ValueError(
                    f"lengths {self.q_len} x {self.k_len} in blocks of {self.block_q} x {self.block_k} make a grid of "
                    f"{grid}, but indices have {tuple(self.indices.shape[2:])}"
                )
        if not trusted and not torch.compiler.is_compiling():
            self._check_packing()
            for part in self.split():
                part._check_contents()

    def _check_packing(self) -> None:
        """Reject a grid that is not the one of the packed sequences."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return
        ends = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        for name, cu, length in zip(("q", "k"), ends, (self.q_len, self.k_len), strict=True):
            if cu[0] != 0 or cu[-1] != length or any(a >= b for a, b in zip(cu[:-1], cu[1:], strict=True)):
                raise ValueError(f"cu_seqlens_{name} must rise from 0 to {name}_len {length}, got {cu}")
        if len(ends[0]) != len(ends[1]):
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k must have one length, got {ends[0]} and {ends[1]}")
        rows = sum(cdiv(b - a, self.block_q) for a, b in zip(ends[0][:-1], ends[0][1:], strict=True))
        columns = max(cdiv(b - a, self.block_k) for a, b in zip(ends[1][:-1], ends[1][1:], strict=True))
        if self.indices.shape[2] < rows or self.indices.shape[3] < columns:
            raise ValueError(
                f"these packed sequences make at least {rows} rows of up to {columns} blocks, but indices have "
                f"{tuple(self.indices.shape[2:])}"
            )

    def _check_contents(self) -> None:
        """Reject counts and indices that are no selection of blocks; reads them on the host."""
        counts, indices, nk = self.counts, self.indices, self.indices.shape[-1]
        if bool(((counts < 0) | (counts > nk)).any()):
            raise ValueError(
                f"counts must be in [0, {nk}] (key blocks), got {int(counts.min())} to {int(counts.max())}"
            )
        listed = torch.arange(nk, device=counts.device) < counts[..., None]
        outside = listed & ((indices < 0) | (indices >= nk))
        if bool(outside.any()):
            raise ValueError(f"indices of kept blocks must be in [0, {nk - 1}], got {int(indices[outside][0])}")
        unordered = (listed[..., 1:] & (indices.diff(dim=-1) <= 0)).any(-1)
        if bool(unordered.any()):
            row = indices[unordered][0].tolist()
            raise ValueError(f"indices of kept blocks must rise in every row, without duplicates, got {row}")

    @classmethod
    def from_dense(cls, kept: Tensor, q_len: int, k_len: int, block_q: int = 128, block_k: int = 128) -> BlockMask:
        """From a boolean grid.

        Args:
            kept: bool ``[B, Hq, nq, nk]``, True = kept.
            q_len, k_len: lengths in tokens.
            block_q, block_k: block sizes in tokens.
        """
        if kept.dtype != torch.bool or kept.dim() != 4:
            raise TypeError(f"kept must be a boolean [B, H, nq, nk] tensor, got {kept.dtype} {tuple(kept.shape)}")
        counts = kept.sum(-1, dtype=torch.int32)
        # A stable sort of "dropped" puts the kept blocks first and leaves them in ascending order.
        indices = torch.sort((~kept).to(torch.int8), dim=-1, stable=True).indices.to(torch.int32)
        return cls(counts, indices, block_q, block_k, q_len, k_len, trusted=True)

    def to_dense(self) -> Tensor:
        """bool ``[B, Hq, nq, nk]``, True = kept."""
        nk = self.indices.shape[-1]
        listed = torch.arange(nk, device=self.counts.device) < self.counts[..., None]
        # Filler, whatever it is, goes into a column of its own that is cut off.
        target = self.indices.long().masked_fill(~listed, nk)
        kept = torch.zeros(*target.shape[:-1], nk + 1, dtype=torch.bool, device=self.counts.device)
        return kept.scatter_(-1, target, True)[..., :nk]

    def density(self, is_causal: bool = False, window: int | None = None) -> Tensor:
        """Kept blocks over the blocks that dense (causal) attention would compute; sparsity is 1 - density.

        Returns:
            float32 ``[B, Hq]``, without a host synchronisation (but of packed cross-attention).
        """
        if is_causal and self.cu_seqlens_q is not None and self.cu_seqlens_q is self.cu_seqlens_k:
            kept, possible = self._packed_counts(self.cu_seqlens_q.to(self.counts.device), window)
        elif self.cu_seqlens_q is not None:
            pairs = [part._visible_counts(is_causal, window) for part in self.split()]
            kept, possible = (torch.stack(counts).sum(0) for counts in zip(*pairs, strict=True))
        else:
            kept, possible = self._visible_counts(is_causal, window)
        return kept.float() / possible.clamp(min=1)

    def _visible_counts(self, is_causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
        visible = visible_blocks(
            self.q_len,
            self.k_len,
            self.block_q,
            self.block_k,
            is_causal=is_causal,
            window=window,
            device=self.counts.device,
        )
        kept = self.counts.sum(-1) if not is_causal else (self.to_dense() & visible).sum((-1, -2))
        return kept, visible.sum()

    def _packed_counts(self, cu_seqlens: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """:meth:`_visible_counts` of causal self-attention, summed over the sequences on their device."""
        nk = self.indices.shape[-1]
        rows = packing.packed_rows(cu_seqlens, self.indices.shape[2], self.block_q)
        first_q = rows.block * self.block_q
        end = (torch.minimum(first_q + self.block_q, rows.length) + self.block_k - 1) // self.block_k
        begin = torch.zeros_like(end)
        if window is not None:
            begin = (first_q - window + 1).clamp(min=0) // self.block_k
        listed = torch.arange(nk, device=self.counts.device) < self.counts[..., None]
        seen = listed & (self.indices >= begin[:, None]) & (self.indices < end[:, None])
        return seen.sum((-1, -2)), (end - begin).clamp(min=0).sum()

    def aligned(self) -> BlockMask:
        """The mask of packed causal self-attention for the layout in which every sequence starts at a whole block.

        Nothing is read on the host; see :meth:`spas_attn.Call.aligned`.
        """
        assert self.cu_seqlens_q is not None
        cu_seqlens, blocks = self.cu_seqlens_q.to(self.counts.device), (self.block_q, self.block_k)
        counts, indices = packing.to_aligned(self.counts, self.indices, cu_seqlens, self.q_len, blocks)
        length = packing.aligned_length(self.q_len, len(cu_seqlens) - 1)
        return BlockMask(counts, indices, *blocks, length, length, trusted=True)

    def packed(self, cu_seqlens: Tensor, total: int) -> BlockMask:
        """The other way: the mask of an aligned call as one of packed sequences."""
        blocks = (self.block_q, self.block_k)
        on_device = cu_seqlens.to(self.counts.device)
        counts, indices = packing.from_aligned(self.counts, self.indices, on_device, total, blocks)
        return BlockMask(counts, indices, *blocks, total, total, cu_seqlens, cu_seqlens, trusted=True)

    def token_mask(self, rows: slice | None = None) -> Tensor:
        """Expand query rows ``rows`` (all by default) to a boolean token mask ``[B, Hq, rows, k_len]``."""
        if self.cu_seqlens_q is not None:
            raise ValueError("token_mask is defined for one sequence; call split() on a packed mask first")
        blocks = torch.arange(self.q_len, device=self.counts.device)[rows or slice(None)] // self.block_q
        columns = torch.arange(self.k_len, device=self.counts.device) // self.block_k
        return self.to_dense()[:, :, blocks][..., columns]

    def to_flex(self, is_causal: bool = False) -> Any:
        """The same mask for ``torch.nn.attention.flex_attention`` (a ``flex_attention.BlockMask``).

        It carries a matching ``mask_mod``: without one, FlexAttention silently computes dense attention when it runs
        eagerly.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexMask

        if self.cu_seqlens_q is not None:
            raise ValueError("a packed mask has no FlexAttention form; call split() first")
        return FlexMask.from_kv_blocks(
            self.counts,
            self.indices,
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=self._mask_mod(is_causal),
            seq_lengths=(self.q_len, self.k_len),
        )

    def _mask_mod(self, is_causal: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        kept, offset = self.to_dense(), self.k_len - self.q_len

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            inside = kept[b, h, i // self.block_q, j // self.block_k]
            return inside & (j <= i + offset) if is_causal else inside

        return mask_mod

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        if self.cu_seqlens_q is not None and self.cu_seqlens_q is self.cu_seqlens_k:
            moved["cu_seqlens_k"] = moved["cu_seqlens_q"]  # one tensor says that this is self-attention
        return dataclasses.replace(self, **moved, trusted=True)

    @classmethod
    def pack(cls, masks: list[BlockMask], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> BlockMask:
        """Join the masks of single sequences (batch 1 each) into one packed mask."""
        nk = max(mask.indices.shape[-1] for mask in masks)
        padded = [torch.nn.functional.pad(mask.indices, (0, nk - mask.indices.shape[-1])) for mask in masks]
        first = masks[0]
        return cls(
            torch.cat([mask.counts for mask in masks], dim=2),
            torch.cat(padded, dim=2),
            first.block_q,
            first.block_k,
            sum(mask.q_len for mask in masks),
            sum(mask.k_len for mask in masks),
            cu_seqlens_q,
            cu_seqlens_k,
            trusted=True,
        )

    def split(self) -> list[BlockMask]:
        """The masks of the single sequences of a packed mask (reads ``cu_seqlens`` on the host)."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return [self]
        q_lens, k_lens = self.cu_seqlens_q.diff().tolist(), self.cu_seqlens_k.diff().tolist()
        rows = [cdiv(n, self.block_q) for n in q_lens]
        used = sum(rows)
        counts, indices = self.counts[:, :, :used].split(rows, dim=2), self.indices[:, :, :used].split(rows, dim=2)
        return [
            BlockMask(c, i[..., : cdiv(nk, self.block_k)], self.block_q, self.block_k, nq, nk, trusted=True)
            for c, i, nq, nk in zip(counts, indices, q_lens, k_lens, strict=True)
        ]
