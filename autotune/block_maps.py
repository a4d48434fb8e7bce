"""Block maps: what a few heads kept in one call, small enough to stand in the statistics."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SIDE = 128  # rows and columns of a map at most; larger grids are kept as shares of blocks
HIDDEN = 255  # in a map: a block that no query may see; all others hold a percentage
EXTREMES = 4  # of a model, so many of the sparsest heads, and of the densest that are sparse

Map = dict[str, Any]


def record(kept: Tensor, visible: Tensor, sparse: Tensor) -> list[Map]:
    """The maps of the sparsest and of the densest sparse head of one layer; none where no head is sparse.

    Args:
        kept, visible: bool ``[H, nq, nk]``, blocks of one call.
        sparse: bool ``[H]``.
    """
    heads = sparse.nonzero()[:, 0].tolist()
    density = (kept.sum((1, 2)) / visible.sum((1, 2)).clamp(min=1)).tolist()
    heads.sort(key=lambda head: density[head])
    return [
        {
            "head": head,
            "density": round(density[head], 4),
            "blocks": list(kept.shape[1:]),
            **pack(_shares(kept[head], visible[head])),
        }
        for head in dict.fromkeys(heads[:1] + heads[-1:])
    ]


def _shares(kept: Tensor, visible: Tensor) -> Tensor:
    """Percentages of kept blocks, uint8 ``[rows, columns]`` of at most SIDE each, HIDDEN where none is visible."""
    rows, columns = (math.ceil(size / SIDE) for size in kept.shape)
    counts = [
        torch.nn.functional.avg_pool2d(blocks.float()[None], (rows, columns), ceil_mode=True, divisor_override=1)[0]
        for blocks in (kept & visible, visible)
    ]
    share = (100 * counts[0] / counts[1].clamp(min=1)).round()
    return torch.where(counts[1] > 0, share, float(HIDDEN)).byte()


def pack(values: Tensor) -> Map:
    """A uint8 matrix as JSON holds it; see :func:`unpack`."""
    data = zlib.compress(bytes(values.cpu().flatten().tolist()), 9)
    return {"size": list(values.shape), "zlib": base64.b64encode(data).decode()}


def unpack(packed: Map) -> Tensor:
    """The matrix again, uint8 ``[rows, columns]``.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        rows, columns = packed["size"]
        if not (0 < rows <= SIDE and 0 < columns <= SIDE):
            raise ValueError(f"its size is {packed['size']}")
        data = zlib.decompressobj().decompress(base64.b64decode(packed["zlib"], validate=True), rows * columns + 1)
        return torch.tensor(list(data), dtype=torch.uint8).reshape(rows, columns)
    except (KeyError, TypeError, ValueError, RuntimeError, zlib.error) as error:
        raise ValueError(f"a block map of the statistics is damaged: {error}") from error


def first(by_prompt: Mapping[int, list[Map]]) -> list[Map]:
    """The maps of the first prompt that has any, whoever ran it."""
    return by_prompt[min(by_prompt)] if by_prompt else []


def extremes(by_layer: Sequence[list[Map]]) -> list[list[Map]]:
    """Of the maps of every layer, those of the sparsest and the densest heads of the model."""
    order = sorted(
        ((found["density"], layer, found["head"]) for layer, maps in enumerate(by_layer) for found in maps),
    )
    chosen = {(layer, head) for _, layer, head in order[:EXTREMES] + order[-EXTREMES:]}
    return [[found for found in maps if (layer, found["head"]) in chosen] for layer, maps in enumerate(by_layer)]
