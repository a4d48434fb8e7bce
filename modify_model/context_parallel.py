"""Ulysses sequence parallelism of diffusers: the exchange of parts of the sequence for heads, around our attention.

With ``enable_parallelism`` every rank holds all heads of a part of the sequence (DeepSpeed Ulysses, arXiv 2309.14509).
Before attention the ranks exchange: each gets the whole sequence of its share of the heads, and with it their
thresholds. Parts of joint attention hold some text and some image each; they are put back into the order that one
device has, so that the blocks, and hence the result, are those of one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from autotune import SparseAttention

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Exchange:
    """How the ranks of a group exchange.

    Attributes:
        group: of the ranks.
        rank, size: of this one in it, and how many there are.
        text: (start, stop) of the text among the tokens of a part; equal ones for none.
    """

    group: Any
    rank: int
    size: int
    text: tuple[int, int] = (0, 0)

    def attend(
        self, inner: SparseAttention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, text: Ranges,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """The attention of a layer; q, k, v and the result ``[B, H, part, D]``, ``key_mask [B, part]``."""
        q, k, v = (self.to_heads(x) for x in (q, k, v))
        key_mask = None if key_mask is None else self.whole_mask(key_mask)

        def dense() -> Tensor:
            seen = None if key_mask is None else key_mask[:, None, None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)

        whole = tuple((start * self.size, stop * self.size) for start, stop in text)
        share = (self.rank, self.size)
        return self.to_parts(inner(q, k, v, dense=dense, attn_mask=key_mask, text=whole, share=share, **options))

    def to_heads(self, x: Tensor) -> Tensor:
        """``[B, H, part, D]`` to ``[B, H / size, size * part, D]``."""
        parts = x.unflatten(1, (self.size, -1)).permute(1, 3, 0, 2, 4)  # [rank, part, B, own heads, D]
        return self._joined(self._swap(parts)).permute(1, 2, 0, 3)

    def to_parts(self, x: Tensor) -> Tensor:
        """What :meth:`to_heads` gave back to ``[B, H, part, D]``."""
        parts = self._apart(x.permute(2, 0, 1, 3))  # [rank, part, B, own heads, D]
        return self._swap(parts).permute(2, 0, 3, 1, 4).flatten(1, 2)

    def whole_mask(self, mask: Tensor) -> Tensor:
        """Key padding ``[B, part]`` to ``[B, size * part]``."""
        gathered = collectives.all_gather_tensor(mask.to(torch.uint8)[None].contiguous(), 0, self.group)
        return self._joined(collectives.wait_tensor(gathered).transpose(1, 2)).T.bool()

    def _swap(self, parts: Tensor) -> Tensor:
        """Part r of the first dimension to rank r; ``[size, ...]`` by the rank that it is from."""
        flat = parts.contiguous().flatten(0, 1)
        swapped = collectives.all_to_all_single(flat, None, None, self.group)
        return collectives.wait_tensor(swapped).unflatten(0, (self.size, -1))

    def _joined(self, parts: Tensor) -> Tensor:
        """``[size, part, ...]`` as one sequence, text and the rest each in the order of the ranks."""
        start, stop = self.text
        pieces = (parts[:, :start], parts[:, start:stop], parts[:, stop:])
        return torch.cat([piece.flatten(0, 1) for piece in pieces])

    def _apart(self, whole: Tensor) -> Tensor:
        """The other way round."""
        start, stop = self.text
        lengths = (start, stop - start, whole.shape[0] // self.size - stop)
        pieces = whole.split([self.size * length for length in lengths])
        return torch.cat([piece.view(self.size, -1, *piece.shape[1:]) for piece in pieces if len(piece)], dim=1)


def exchange_for(config: Any, heads: int, text: Ranges) -> tuple[Exchange | None, str | None]:
    """How to exchange under a ``ParallelConfig`` of diffusers, or why our attention cannot run under it."""
    parallel = config.context_parallel_config
    if parallel is None:
        return None, None  # tensor parallelism: every rank has whole sequences of its own heads
    if parallel.ring_degree > 1:
        return None, "ring attention gives each device a part of the keys, and blocks are selected on the whole"
    if parallel.ulysses_degree < 2:
        return None, None
    if heads % parallel.ulysses_degree:
        return None, f"{heads} heads do not divide by ulysses_degree {parallel.ulysses_degree}"
    if len(text) > 1:
        return None, "several ranges of text cannot be put in order"
    mesh = parallel._ulysses_mesh
    return Exchange(mesh.get_group(), mesh.get_local_rank(), parallel.ulysses_degree, *text), None


def parts_of_sequence(processor: Any) -> int:
    """Into how many parts the sequences that a processor sees are split."""
    config = getattr(processor, "_parallel_config", None)
    parallel = getattr(config, "context_parallel_config", None)
    return 1 if parallel is None else parallel.ulysses_degree * parallel.ring_degree
