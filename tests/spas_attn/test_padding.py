"""Key tiles without padding, and those that are nothing else, against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from spas_attn.kernels.padding import filled_tiles, whole_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("length", [1, 63, 64, 200])
@pytest.mark.parametrize("strided", [False, True])
def test_tiles(length: int, strided: bool) -> None:
    """A ragged last tile counts as one with padding; so does a tile with a single 0."""
    valid = torch.ones(3, length, dtype=torch.uint8)
    valid[1, length // 2] = 0
    valid[2, :64] = 0
    valid = valid.to(DEVICE)
    if strided:
        valid = torch.stack([valid, 1 - valid], -1)[..., 0]
    tiles = -(-length // 64)
    padded = torch.nn.functional.pad(valid, (0, tiles * 64 - length)).unflatten(1, (tiles, 64))
    assert torch.equal(whole_tiles(valid, 64), padded.amin(-1))
    assert torch.equal(filled_tiles(valid, 64), padded.amax(-1))
