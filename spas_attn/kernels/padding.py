"""Which tiles of keys hold padding, and which nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..block_mask import cdiv
from .operands import Valid
from .recorded import launch


@triton.jit
def tiles_kernel(valid, out, length, tiles, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One program per tile and sequence."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys = tile * BLOCK + tl.arange(0, BLOCK)
    p_valid = valid.data + b * valid.stride_b + tl.cast(keys, tl.int64) * valid.stride_n
    taken = (tl.load(p_valid, mask=keys < length, other=0) != 0).to(tl.int32)
    found = tl.min(taken, 0) if WHOLE else tl.max(taken, 0)
    tl.store(out + b * tiles + tile, found.to(tl.uint8))


def _tiles(valid: Tensor | None, block: int, whole: bool) -> Tensor | None:
    if valid is None:
        return None
    batch, length = valid.shape
    tiles = cdiv(length, block)
    out = torch.empty(batch, tiles, dtype=torch.uint8, device=valid.device)
    launch(tiles_kernel, (tiles, batch), Valid.of(valid), out, length, tiles, BLOCK=block, WHOLE=whole, num_warps=1)
    return out


def whole_tiles(valid: Tensor | None, block: int) -> Tensor | None:
    """uint8 ``[B, ceil(Lk / block)]``: 1 where all ``block`` keys of the tile are there and may be attended to.

    Args:
        valid: uint8 ``[B, Lk]``, 0 for padding; None without, as the result is then.
        block: keys of a tile, a power of two.
    """
    return _tiles(valid, block, True)


def filled_tiles(valid: Tensor | None, block: int) -> Tensor | None:
    """uint8 ``[B, ceil(Lk / block)]``: 1 where some key of the tile may be attended to; arguments as before."""
    return _tiles(valid, block, False)
