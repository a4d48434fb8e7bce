"""Which key tiles hold no padding, so that the forward kernel looks at single keys in the others only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .operands import Valid
from .recorded import launch


@triton.jit
def tile_valid_kernel(valid, out, length, tiles, BLOCK: tl.constexpr):
    """One program per tile and sequence."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys = tile * BLOCK + tl.arange(0, BLOCK)
    p_valid = valid.data + b * valid.stride_b + tl.cast(keys, tl.int64) * valid.stride_n
    whole = tl.min((tl.load(p_valid, mask=keys < length, other=0) != 0).to(tl.int32), 0)
    tl.store(out + b * tiles + tile, whole.to(tl.uint8))


def tile_valid(valid: Tensor, block: int) -> Tensor:
    """uint8 ``[B, ceil(Lk / block)]``: 1 where the tile is whole and all its keys may be attended to.

    Args:
        valid: uint8 ``[B, Lk]``, 0 for padding.
        block: keys of a tile, a power of two.
    """
    batch, length = valid.shape
    tiles = cdiv(length, block)
    out = torch.empty(batch, tiles, dtype=torch.uint8, device=valid.device)
    launch(tile_valid_kernel, (tiles, batch), Valid.of(valid), out, length, tiles, BLOCK=block, num_warps=1)
    return out
