"""Prepared Q, K and V against plain torch: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from spas_attn.block_mask import cdiv
from spas_attn.selectors.mean_similarity import _self_similarity
from spas_attn.selectors.pooled import block_means

pytest.importorskip("triton")
from spas_attn.kernels.prepare import SAMPLES, Side, as_bytes, key_sums, padded_dim, prepare, prepare_v

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
PAIR = 2.0**-15  # relative error of a number held as a sum of two bf16 numbers


@dataclass(frozen=True)
class Shape:
    """One tensor to prepare and what to make of it."""

    length: int
    dim: int = 32
    pool: int | None = 16
    block: int = 128
    tile: int | None = 128
    batch: int = 1
    heads: int = 2
    dtype: torch.dtype = HALF
    layout: str = "HND"
    padding: bool = False
    smooth: bool = False

    def tensor(self, seed: int = 0) -> Tensor:
        """Rows about a mean that is far from 0, so that smoothing has something to do."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.heads, self.length, self.dim, generator=generator)
        x = x + 3 * torch.randn(1, self.heads, 1, self.dim, generator=generator)
        if self.layout == "NHD":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif self.layout == "strided":
            x = torch.stack([x, x + 1], 3).flatten(2, 3)[:, :, ::2]
        return x.to(DEVICE, self.dtype)

    def valid(self) -> Tensor | None:
        """Padding on the left of every second sequence, holes in all."""
        if not self.padding:
            return None
        keep = torch.rand(self.batch, self.length, generator=torch.Generator().manual_seed(1)) < 0.6
        keep[::2, : self.length * 2 // 3] = False
        return keep.to(DEVICE)


SHAPES = [
    Shape(256),
    Shape(300, dim=80, tile=64, batch=2, padding=True, layout="NHD"),
    Shape(129, dim=64, pool=128, dtype=F32, layout="strided", smooth=True),
    Shape(1, pool=8, block=64, dtype=BF16, tile=64),
    Shape(200, pool=64, block=64, tile=128, batch=2, padding=True, smooth=True, dtype=BF16),
    Shape(500, dim=16, pool=1, block=64, tile=16, smooth=True),
    Shape(260, dim=128, pool=8, tile=None, layout="NHD"),
    Shape(260, dim=256, pool=None, tile=64, heads=1),
]


def make(shape: Shape, x: Tensor) -> tuple[Side, Tensor]:
    """The prepared tensor, and the mean that it was smoothed by."""
    valid, dim = shape.valid(), padded_dim(shape.dim)
    sums = key_sums(x, dim, as_bytes(valid), exact=True) if shape.smooth else None
    side = prepare(
        x, dim, pool=shape.pool, block=shape.block, similarity=shape.pool is not None, tile=shape.tile,
        sums=sums, smooth_pooled=shape.smooth, valid=as_bytes(valid),
    )  # fmt: skip
    weight = torch.ones(x.shape[0], 1, x.shape[2], 1, device=x.device) if valid is None else valid[:, None, :, None]
    centre = (x.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
    return side, centre if shape.smooth else torch.zeros_like(centre)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_means_and_similarities(shape: Shape) -> None:
    x, valid = shape.tensor(), shape.valid()
    side, centre = make(shape, x)
    if shape.pool is None:
        assert side.means is None
        assert side.similarity is None
        return
    assert side.means is not None
    assert side.similarity is not None
    expected, filled = block_means(x.float() - centre, shape.pool, valid)
    assert side.means.shape == (*expected.shape[:3], 2, padded_dim(shape.dim))
    assert side.means.dtype == BF16
    means = side.means.float().sum(3)
    # Before the mean is taken away, the numbers are as large as the tensor's.
    assert (means[..., : shape.dim] - expected).abs().max() <= PAIR * x.abs().max()
    assert (means[..., shape.dim :] == 0).all()
    assert torch.allclose(side.similarity, _self_similarity(x.float() - centre, shape.block, valid), atol=2e-5)
    assert (side.filled is None) == (not shape.padding)
    if filled is not None and valid is not None:
        assert side.filled is not None
        assert side.block_filled is not None
        assert torch.equal(side.filled.bool(), filled)
        assert torch.equal(
            side.block_filled.bool(), torch.stack([part.any(1) for part in valid.split(shape.block, 1)], 1)
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape: Shape) -> None:
    x, valid = shape.tensor(), shape.valid()
    side, centre = make(shape, x)
    if shape.tile is None:
        assert side.int8 is None
        return
    assert side.int8 is not None
    assert side.scale is not None
    smooth = x.float() - centre
    if valid is not None:
        smooth = smooth.masked_fill(~valid[:, None, :, None], 0.0)
    tiles = smooth.split(shape.tile, 2)
    largest = torch.stack([tile.abs().amax((-1, -2)) for tile in tiles], -1)
    assert torch.allclose(side.scale, largest.clamp(min=1e-12) / 127, rtol=1e-5, atol=0)
    assert side.int8.shape == (*x.shape[:3], padded_dim(shape.dim))
    assert side.int8.is_contiguous()
    assert (side.int8[..., shape.dim :] == 0).all()
    step = side.scale.repeat_interleave(shape.tile, -1)[..., : shape.length, None]
    error = (side.int8[..., : shape.dim] * step - smooth).abs()
    assert (error <= 0.501 * step).all()
    if valid is not None:
        assert (side.int8.masked_select(~valid[:, None, :, None]) == 0).all()


def test_inputs_stay_and_results_repeat() -> None:
    shape = SHAPES[1]
    x = shape.tensor()
    before = x.clone()
    first, second = make(shape, x)[0], make(shape, x)[0]
    assert torch.equal(x, before)
    for a, b in zip(vars(first).values(), vars(second).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_key_sums(exact: bool, padding: bool) -> None:
    shape = Shape(1200, dim=24, batch=2, padding=padding)
    k, valid = shape.tensor(), shape.valid()
    sums, counts = key_sums(k, 32, as_bytes(valid), exact)
    assert sums.shape == (4, 1, 32)
    assert counts.shape == (4, 1)
    every = 1 if exact else cdiv(1200, SAMPLES)
    assert every > 1 or exact
    taken = torch.ones(2, 1200, device=DEVICE) if valid is None else valid.float()
    taken[:, torch.arange(1200, device=DEVICE) % every > 0] = 0
    expected = (k.float() * taken[:, None, :, None]).sum(2)
    assert torch.allclose(sums.view(2, 2, 32)[..., :24], expected, rtol=1e-4, atol=1e-2)
    assert torch.equal(counts.view(2, 2), taken.sum(1)[:, None].expand(2, 2))


def test_a_sampled_mean_smooths_as_well() -> None:
    """Channels far from zero: without smoothing int8 would spend its range on their offset."""
    shape = Shape(1500, dim=64)
    k = shape.tensor() + torch.where(torch.arange(64, device=DEVICE) % 20 == 0, 50.0, 0.0).to(HALF)
    scale = {
        name: prepare(k, 64, tile=128, sums=sums).scale
        for name, sums in [
            ("exact", key_sums(k, 64, None, True)),
            ("sampled", key_sums(k, 64, None, False)),
            ("none", None),
        ]
    }
    mean = {name: float(value.mean()) for name, value in scale.items() if value is not None}
    assert mean["sampled"] < 1.1 * mean["exact"]
    assert mean["none"] > 5 * mean["exact"]


def test_a_sample_without_a_valid_key() -> None:
    """Then nothing is subtracted."""
    k = torch.randn(1, 1, 1000, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    valid = (torch.arange(1000, device=DEVICE) == 1).to(torch.uint8)[None]
    side = prepare(k, 32, tile=128, sums=key_sums(k, 32, valid, exact=False), valid=valid)
    assert side.int8 is not None
    assert side.scale is not None
    assert torch.allclose(side.int8[0, 0, 1] * side.scale[0, 0, 0], k[0, 0, 1], atol=float(side.scale[0, 0, 0]))


def key_order() -> Tensor:
    """Which key of a group of 32 stands at each position, int64 ``[32]``.

    A thread of a matrix unit holds columns 2g, 2g + 1 of every group of 8; permuted, its keys stand side by side.
    """
    places = itertools.product((0, 1), range(4), (0, 1), (0, 1))
    return torch.tensor([16 * half + 8 * group + 2 * g + e for half, g, group, e in places])


@pytest.mark.parametrize(
    "shape",
    [
        Shape(256, dtype=HALF),
        Shape(300, dim=80, tile=64, batch=2, padding=True, layout="NHD"),
        Shape(40, dim=64, tile=32, dtype=F32, layout="strided"),
        Shape(1100, dim=16, heads=1, dtype=BF16),
    ],
    ids=str,
)
def test_fp8_v(shape: Shape) -> None:
    v, valid, dim, block = shape.tensor(), shape.valid(), padded_dim(shape.dim), shape.tile
    assert block is not None
    v[:, :, : block // 2] *= 100  # blocks differ in size
    out, scale = prepare_v(v, dim, block, valid=as_bytes(valid))
    padded = cdiv(shape.length, 128) * 128
    assert out.shape == (shape.batch, shape.heads, dim, padded)
    assert out.dtype == torch.float8_e4m3fn
    chosen = v.float() if valid is None else v.float().masked_fill(~valid[:, None, :, None], 0.0)
    largest = torch.stack([part.abs().amax((-1, -2)) for part in chosen.split(block, 2)], -1)
    assert torch.allclose(scale, largest.clamp(min=2.0**-60) / 448, rtol=1e-5, atol=0)
    values = out.float()
    assert values.isfinite().all()
    values = values.unflatten(-1, (-1, 32))[..., key_order().argsort().to(DEVICE)].flatten(-2)
    assert (values[..., shape.length :] == 0).all()
    assert (values[:, :, shape.dim :] == 0).all()
    values = values[:, :, : shape.dim, : shape.length].transpose(-1, -2)
    exact = chosen / scale.repeat_interleave(block, -1)[..., : shape.length, None]
    # Half a step of e4m3 (3 bits of mantissa, least exponent -6); the interpreter may be a whole step off.
    step = torch.exp2(exact.abs().clamp(min=2.0**-6).log2().floor() - 3)
    assert ((values - exact).abs() <= (0.501 if DEVICE == "cuda" else 1.0) * step).all()


def test_a_block_of_zeros() -> None:
    """It has a scale that one can divide by."""
    v = torch.randn(1, 1, 128, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, HALF)
    v[:, :, 64:] = 0
    out, scale = prepare_v(v, 32, 64)
    assert (out[..., 64:].float() == 0).all()
    assert scale.isfinite().all()
    assert (scale > 2.0**-80).all()
