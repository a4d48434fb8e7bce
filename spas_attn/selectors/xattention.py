"""XAttention: blocks ranked by antidiagonal scores (arXiv 2503.16428)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_mask import cdiv
from ..call import Call
from ..checks import PerHead, check_range
from .base import Selector
from .pooled import check_pool, fine_rows, mean_row, probabilities
from .ranking import MASSES, mass_before


@dataclass
class XAttention(Selector):
    """Keeps the key blocks of most antidiagonal mass until it reaches ``threshold``.

    Queries and keys are taken in groups of ``stride`` tokens. The score of a query group i and a key group j is the
    mean of q·k along the antidiagonal of their tile, which meets every vertical line and every diagonal of odd distance
    that crosses it, at 1/stride of the cost of QKᵀ::

        s[i, j] = scale / stride · Σ_r q[i·stride + stride − 1 − r] · k[j·stride + r]

    A row softmax over the key groups follows, a sum within each key block, and the mean over the rows of the query
    block. Tokens that are missing in a ragged last group, and padding, count as zeros.

    Attributes:
        threshold: mass to keep, a float or a tensor ``[Hq]`` (tables per query head exist); the block that crosses it
            is kept; 0 keeps the sink and the diagonal, 1 keeps everything.
        stride: tokens in a group, a divisor of both block sizes; 16, 8 and 4 in the paper.
    """

    threshold: PerHead = 0.9
    stride: int = 16
    packs: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    tuned: ClassVar[str] = "threshold"
    candidates: ClassVar[tuple[float, ...]] = MASSES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool(self, self.stride, "stride")
        check_range("threshold", self.threshold, 0, 1)

    def levels(self, call: Call) -> Tensor:
        filled = None
        q, k = call.q, call.k
        if call.key_mask is not None:
            k = k.masked_fill(~call.key_mask[:, None, :, None], 0.0)
            filled = _groups(call.key_mask[:, None, :, None], self.stride).any(-1)[:, 0]
            if call.document_start is not None:
                q = q.masked_fill(~call.key_mask[:, None, :, None], 0.0)
        # Reversed within each group, the antidiagonal sum is one product of vectors of stride · D.
        queries = _groups(q, self.stride).unflatten(-1, (self.stride, -1)).flip(-2).flatten(-2)
        keys = _groups(k, self.stride)
        rows = fine_rows(self, call, queries, keys, filled, self.stride, call.scale / self.stride)
        return mass_before(mean_row(probabilities(rows)), self.forced(call), self.visible(call))


def _groups(x: Tensor, stride: int) -> Tensor:
    """The rows of each group one after the other, ``[B, H, ceil(L / stride), stride · D]``."""
    missing = cdiv(x.shape[2], stride) * stride - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, stride)).flatten(3)
