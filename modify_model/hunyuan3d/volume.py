"""Decode the field on a grid: tens of millions of points against a few thousand keys, which is where sparsity pays.

Points that are near to each other look at the same latents. :class:`KeySelection` therefore chooses keys once per cell
of space, by a sample of the cell's points, as FlashVDM does (arXiv 2503.16302).
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spas_attn import BlockMask, block_sparse_attention

from .attention import attend
from .vae import ShapeVAE, grid_axis

PUBLISHED_KEEP = {3072: 1024, 512: 256}  # of so many keys so many; a third of any other number
BLOCK_Q, BLOCK_K = 128, 64


@dataclass(frozen=True)
class KeySelection:
    """Which keys the points of a cell attend to, per head: those with the largest mean score over a sample of points.

    Attributes:
        cells: cells along each axis; FlashVDM has 4 for a coarse grid and 6 for the fine one near the surface.
        every: every so many points of a cell are the sample; 100 and 50 there.
        keep: keys to keep; the published number by default (1024 of 3072, 256 of 512, a third of any other number).
        whole_blocks: keep blocks of 64 keys through ``block_sparse_attention``, keys being put in an order in which
            similar ones stand together, and a block's score being the logarithm of the sum of the exponentials of its
            keys' mean scores. False keeps single keys, gathered, which is FlashVDM's own rule.
    """

    cells: int = 4
    every: int = 100
    keep: int | None = None
    whole_blocks: bool = True

    def __post_init__(self) -> None:
        for name in ("cells", "every", *(("keep",) if self.keep is not None else ())):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")

    def kept(self, keys: int) -> int:
        """How many of so many keys are kept; whole blocks round it up."""
        return min(keys, PUBLISHED_KEEP.get(keys, max(1, keys // 3)) if self.keep is None else self.keep)


@torch.no_grad()
def decode_volume(
    vae: ShapeVAE,
    latents: Tensor,
    resolution: int = 384,
    *,
    bounds: float = 1.01,
    chunk: int = 65536,
    selection: KeySelection | None = None,
    progress: bool = False,
) -> Tensor:
    """The field of shapes on a grid of ``(resolution + 1)³`` points in ``[-bounds, bounds]³``.

    Args:
        vae: the decoder; its keys and values are computed once for the whole volume.
        latents: of the denoiser, ``[B, L, embed_dim]``.
        resolution: cells along an axis.
        bounds: half the side of the volume.
        chunk: points at once.
        selection: keys to attend to in each cell of space; None attends to all (exact).
        progress: show a bar.

    Returns:
        float32 ``[B, n, n, n]``, n = resolution + 1, axes x, y, z; positive inside.
    """
    for name, value in (("resolution", resolution), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if bounds <= 0:
        raise ValueError(f"bounds must be above 0, got {bounds}")
    axis = grid_axis(resolution, bounds, latents.device)
    return torch.stack([_decode(vae, row[None], axis, chunk, selection, progress) for row in vae(latents)])


def _decode(
    vae: ShapeVAE, latents: Tensor, axis: Tensor, chunk: int, selection: KeySelection | None, progress: bool
) -> Tensor:
    k, v = vae.geo_decoder.keys(latents)
    if selection is not None and selection.whole_blocks:
        order = similar_together(k, BLOCK_K)[..., None].expand_as(k)
        k, v = k.gather(2, order), v.gather(2, order)
    n = len(axis)
    volume = torch.empty(n, n, n, device=axis.device)
    cells = list(itertools.product(_spans(n, 1 if selection is None else selection.cells), repeat=3))
    bar = _bar(n**3, progress)
    for cell in cells:
        x, y, z = (slice(*span) for span in cell)
        points = torch.stack(torch.meshgrid(axis[x], axis[y], axis[z], indexing="ij"), dim=-1).reshape(1, -1, 3)
        chosen = None if selection is None else _choose(vae, points, k, selection)
        parts = []
        for part in points.split(chunk, dim=1):
            parts.append(_field(vae, part, k, v, chosen))
            bar.update(part.shape[1])
        volume[x, y, z] = torch.cat(parts, dim=1).reshape(volume[x, y, z].shape).float()
    bar.close()
    return volume


def _field(vae: ShapeVAE, points: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None) -> Tensor:
    x, q = vae.geo_decoder.queries(points)
    if chosen is None:
        attended = attend(q, k, v, vae.cross_engine)
        if vae.cross_engine != "sdpa" and not bool(attended.isfinite().all()):
            warnings.warn(
                f"the volume decoder's attention with engine={vae.cross_engine!r} gave inf or NaN; these points are "
                "repeated with exact attention, and later ones use it from the start",
                RuntimeWarning,
                stacklevel=4,
            )
            vae.cross_engine = "sdpa"
            attended = attend(q, k, v)
    elif chosen.dtype == torch.bool:
        dense = chosen[:, :, None].expand(-1, -1, -(-q.shape[2] // BLOCK_Q), -1)
        mask = BlockMask.from_dense(dense, block_q=BLOCK_Q, block_k=BLOCK_K, q_len=q.shape[2], k_len=k.shape[2])
        attended = block_sparse_attention(q, k, v, mask)
    else:
        index = chosen[..., None].expand(-1, -1, -1, k.shape[-1])
        attended = attend(q, k.gather(2, index), v.gather(2, index))
    return vae.geo_decoder.field(x, attended)


def _choose(vae: ShapeVAE, points: Tensor, k: Tensor, selection: KeySelection) -> Tensor:
    """The keys of a cell: int64 ``[1, H, keep]``, or with whole blocks bool ``[1, H, blocks]``."""
    _, q = vae.geo_decoder.queries(points[:, :: selection.every])
    # The mean of raw scores is the score of the mean query.
    scores = (k.float() @ q.float().mean(2)[..., None])[..., 0]  # [1, H, L]
    keep = selection.kept(k.shape[2])
    if not selection.whole_blocks:
        return scores.topk(keep, dim=-1).indices
    blocks = -(-k.shape[2] // BLOCK_K)
    padded = torch.nn.functional.pad(scores * k.shape[-1] ** -0.5, (0, blocks * BLOCK_K - k.shape[2]), value=-torch.inf)
    level = padded.unflatten(-1, (blocks, BLOCK_K)).logsumexp(-1)
    best = level.topk(min(blocks, -(-keep // BLOCK_K)), dim=-1).indices
    return torch.zeros_like(level, dtype=torch.bool).scatter_(-1, best, True)


def similar_together(x: Tensor, block: int) -> Tensor:
    """An order of vectors in which similar ones stand together, by halving along the direction of largest variance.

    Args:
        x: ``[..., L, D]``.
        block: groups are halved while the halves are as long as a block.

    Returns:
        Places ``[..., L]``, int64: ``x.gather(-2, order[..., None].expand_as(x))`` is in order.
    """
    length, size = x.shape[-2], x.shape[-2]
    order = torch.arange(length, device=x.device).expand(x.shape[:-1]).contiguous()
    while size > 1:
        whole = length // size * size  # a remainder stays at the end
        taken = order[..., :whole].unflatten(-1, (-1, size))
        groups = x.float().gather(-2, order[..., :whole, None].expand(*order.shape[:-1], whole, x.shape[-1]))
        groups = groups.unflatten(-2, (-1, size))
        centred = groups - groups.mean(-2, keepdim=True)
        direction = _main_direction(centred.mT @ centred)
        places = (centred @ direction)[..., 0].argsort(-1)
        order = torch.cat([taken.gather(-1, places).flatten(-2), order[..., whole:]], dim=-1)
        if size // 2 < block:
            break
        size //= 2
    return order


def _main_direction(covariance: Tensor) -> Tensor:
    """``[..., D, 1]``, about the eigenvector of the largest eigenvalue of ``[..., D, D]``: by squaring the matrix, as
    ``eigh`` takes a second on a GPU for what is to be a few milliseconds.
    """
    power = covariance
    for _ in range(5):
        power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-30)
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
    return power.gather(-1, largest[..., None, None].expand(*power.shape[:-1], 1))


def _spans(count: int, parts: int) -> list[tuple[int, int]]:
    """``count`` numbers in at most ``parts`` runs of about one length."""
    ends = [count * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True) if b > a]


class _NoBar:
    def update(self, count: int) -> None: ...

    def close(self) -> None: ...


def _bar(total: int, show: bool) -> Any:
    if not show:
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=total, desc="decoding", unit="point", unit_scale=True)
