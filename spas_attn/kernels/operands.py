"""Tensors as kernels take them: pointer and strides in one argument, a named tuple, or None for an absent tensor.

Triton makes None a compile-time constant: ``if x is not None`` in a kernel costs nothing, and needs no flag beside x.
Triton 3.6 takes no tensor descriptor inside a tuple, and cannot ask that of a tuple which holds None itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """Q, K, V or the output, ``[B, H, L, D]``, in any layout; strides in elements."""

    data: Tensor
    stride_b: int
    stride_h: int
    stride_n: int
    stride_d: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x, *x.stride())


class Valid(NamedTuple):
    """Key padding, uint8 ``[B, L]``: 0 for tokens that take no part."""

    data: Tensor
    stride_b: int
    stride_n: int

    @classmethod
    def of(cls, valid: Tensor | None) -> Valid | None:
        return None if valid is None else cls(valid, *valid.stride())


class Blocks(NamedTuple):
    """A block mask: int32 ``[B, Hq, nq]`` and ascending lists ``[B, Hq, nq, nk]``, both dense in the last dimension."""

    counts: Tensor
    counts_b: int
    counts_h: int
    indices: Tensor
    stride_b: int
    stride_h: int
    stride_q: int


class Keys(NamedTuple):
    """K in 8 bits.

    Attributes:
        int8: ``[B, Hkv, Lk, dim]``, contiguous, of the smoothed keys, zero in padding.
        scale: float32 ``[B, Hkv, key blocks]``: largest magnitude / 127 of a block of keys.
        mean: float32 ``[B, Hkv, dim]``, what was subtracted from every key.
    """

    int8: Tensor
    scale: Tensor
    mean: Tensor


class Values(NamedTuple):
    """V in 8 bits.

    Attributes:
        data: float8_e4m3fn ``[B, Hkv, dim, Lk padded to a multiple of 128]``, zero in all padding. The keys of every
            group of 32 are permuted so that the accumulator of one product is the operand of the next without
            exchanging registers between threads.
        scale: float32 ``[B, Hkv, key blocks]``: of a block of keys the least power of two from largest magnitude / 448.
    """

    data: Tensor
    scale: Tensor


class Side(NamedTuple):
    """What selection needs of Q or of K; None for what was not asked for.

    Attributes:
        means: bf16 ``[B, H, n, 2, dim]``: the means of sub-blocks, each as a sum of two bf16 numbers; without ``pairs``
            ``[B, H, n, 1, dim]``, rounded.
        similarity: float32 ``[B, H, blocks]``, mean pairwise cosine of the rows of a block.
        filled, block_filled: uint8 ``[B, n]`` and ``[B, blocks]``: 1 where a (sub-)block has a valid token; None
            without padding.
    """

    means: Tensor | None = None
    similarity: Tensor | None = None
    filled: Tensor | None = None
    block_filled: Tensor | None = None


class PerHead(NamedTuple):
    """A threshold: float32 ``[H]``, or ``[1]`` with stride 0; where ``data`` is None, one number for all heads."""

    data: Tensor | None
    stride: int
    number: float

    @classmethod
    def of(cls, value: float | Tensor, device: torch.device) -> PerHead:
        """A float goes by value, without a copy to the device."""
        if not isinstance(value, Tensor):
            return cls(None, 0, float(value))
        value = value.to(device, torch.float32)
        return cls(value, value.stride(0) if value.dim() and value.shape[0] > 1 else 0, 0.0)


@triton.jit
def are_valid(valid, b, tokens, inside):
    """Which of the tokens take part, of those that lie ``inside`` the tensor; bool like both."""
    if valid is not None:
        p_valid = valid.data + b * valid.stride_b + tl.cast(tokens, tl.int64) * valid.stride_n
        inside &= tl.load(p_valid, mask=inside, other=0) != 0
    return inside


@triton.jit
def of_head(threshold, h):
    """The threshold of one head, a scalar."""
    value = threshold.number
    if threshold.data is not None:
        value = tl.load(threshold.data + h * threshold.stride)
    return value
