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
from spas_attn.kernels.operands import Keys
from spas_attn.kernels.prepare import SAMPLES, Prepared, as_bytes, padded_dim, prepare

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
    int8: bool = True
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
    Shape(300, dim=80, block=64, batch=2, padding=True, layout="NHD"),
    Shape(129, dim=64, pool=128, dtype=F32, layout="strided", smooth=True),
    Shape(1, pool=8, block=64, dtype=BF16),
    Shape(200, pool=64, block=64, batch=2, padding=True, smooth=True, dtype=BF16),
    Shape(700, dim=16, pool=1, block=64, smooth=True),
    Shape(260, dim=128, pool=8, int8=False, layout="NHD"),
    Shape(260, dim=256, pool=None, block=32, heads=1),
]


def make(shape: Shape, x: Tensor) -> Prepared:
    return prepare(
        x, x, block_q=shape.block, block_k=shape.block, pool_q=shape.pool, pool_k=shape.pool,
        similarity=shape.pool is not None, smooth=shape.smooth, int8=shape.int8, valid_q=as_bytes(shape.valid()),
        valid=as_bytes(shape.valid()),
    )  # fmt: skip


def mean_of(x: Tensor, valid: Tensor | None, every: int = 1) -> Tensor:
    """Mean of the valid tokens, of every stretch of ``every`` the middle one, float32 ``[B, H, 1, D]``."""
    weight = torch.ones(x.shape[0], 1, x.shape[2], 1, device=x.device)
    if valid is not None:
        weight = valid[:, None, :, None].float()
    weight = weight * (torch.arange(x.shape[2], device=x.device) % every == every // 2)[:, None]
    return (x.float() * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_means_and_similarities(shape: Shape) -> None:
    x, valid = shape.tensor(), shape.valid()
    made = make(shape, x)
    for side, centre in ((made.q, 0.0), (made.k, mean_of(x, valid) if shape.smooth else 0.0)):
        if shape.pool is None:
            assert side == (None,) * 4
            continue
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


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_rounded_means(shape: Shape) -> None:
    """For scores that are happy with 8 bits, and of Q alone."""
    x = shape.tensor()
    pairs = make(shape, x).q.means
    made = prepare(
        x, block_q=shape.block, pool_q=shape.pool, pairs=False, valid_q=as_bytes(shape.valid())
    )  # fmt: skip
    assert pairs is not None and made.q.means is not None
    assert torch.equal(made.q.means, pairs[:, :, :, :1])
    assert made.k == (None,) * 4
    assert made.keys is None and made.values is None


def smoothed(shape: Shape, x: Tensor, keys: Keys) -> Tensor:
    """Keys less the mean that was taken away, float32, zero in padding."""
    valid, smooth = shape.valid(), x.float() - keys.mean[..., None, : shape.dim]
    return smooth if valid is None else smooth.masked_fill(~valid[:, None, :, None], 0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8(shape: Shape) -> None:
    x, valid = shape.tensor(), shape.valid()
    keys = make(shape, x).keys
    if not shape.int8:
        assert keys is None
        return
    assert keys is not None
    exact = shape.smooth and shape.pool is not None
    expected = mean_of(x, valid, 1 if exact else cdiv(shape.length, SAMPLES))[:, :, 0]
    assert cdiv(shape.length, SAMPLES) > 1 or shape.length < 100
    assert torch.allclose(keys.mean[..., : shape.dim], expected, atol=1e-4)
    assert (keys.mean[..., shape.dim :] == 0).all()
    smooth = smoothed(shape, x, keys)
    largest = torch.stack([part.abs().amax((-1, -2)) for part in smooth.split(shape.block, 2)], -1)
    assert torch.allclose(keys.scale, largest.clamp(min=1e-12) / 127, rtol=1e-5, atol=0)
    assert keys.int8.shape == (*x.shape[:3], padded_dim(shape.dim))
    assert keys.int8.is_contiguous()
    assert (keys.int8[..., shape.dim :] == 0).all()
    step = keys.scale.repeat_interleave(shape.block, -1)[..., : shape.length, None]
    error = (keys.int8[..., : shape.dim] * step - smooth).abs()
    assert (error <= 0.501 * step).all()
    if valid is not None:
        assert (keys.int8.masked_select(~valid[:, None, :, None]) == 0).all()


def test_one_launch_makes_what_many_make() -> None:
    """Inputs stay as they are, and what is made of one tensor does not depend on what else is asked for."""
    shape = Shape(300, dim=80, block=64, batch=2, padding=True, layout="NHD")
    q, k, v = (shape.tensor(seed) for seed in range(3))
    k, v = k[:, :1], v[:, :1]
    before, valid = [x.clone() for x in (q, k, v)], as_bytes(shape.valid())
    asked = {"block_q": 128, "block_k": 64, "pool_q": 32, "pool_k": 16, "valid": valid}
    made, again = (prepare(q, k, v, int8=True, **asked) for _ in range(2))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    alone = Prepared(
        prepare(q, block_q=128, pool_q=32).q,
        prepare(k=k, block_k=64, pool_k=16, valid=valid).k,
        prepare(k=k, block_k=64, int8=True, valid=valid).keys,
        prepare(v=v, block_k=64, valid=valid).values,
    )
    for other in (again, alone):
        for first, second in zip(made, other, strict=True):
            assert first is not None and second is not None
            for a, b in zip(first, second, strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_nothing_to_make() -> None:
    assert prepare() == Prepared()


def test_a_sampled_mean_smooths_as_well() -> None:
    """Channels far from zero: without smoothing int8 would spend its range on their offset."""
    shape = Shape(1500, dim=64)
    k = shape.tensor() + torch.where(torch.arange(64, device=DEVICE) % 20 == 0, 50.0, 0.0).to(HALF)
    sampled, exact = (
        prepare(k=k, pool_k=64, int8=True, similarity=smooth, smooth=smooth).keys for smooth in (False, True)
    )
    assert sampled is not None and exact is not None
    assert sampled.scale.mean() < 1.1 * exact.scale.mean()
    assert k.abs().amax() / 127 > 5 * exact.scale.mean()


def test_a_sample_without_a_valid_key() -> None:
    """Then nothing is subtracted."""
    k = torch.randn(1, 1, 1000, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    valid = (torch.arange(1000, device=DEVICE) == 1).to(torch.uint8)[None]
    keys = prepare(k=k, int8=True, valid=valid).keys
    assert keys is not None
    assert (keys.mean == 0).all()
    assert torch.allclose(keys.int8[0, 0, 1] * keys.scale[0, 0, 0], k[0, 0, 1], atol=float(keys.scale[0, 0, 0]))


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
        Shape(300, dim=80, block=64, batch=2, padding=True, layout="NHD"),
        Shape(40, dim=64, block=32, dtype=F32, layout="strided"),
        Shape(1100, dim=16, heads=1, dtype=BF16),
    ],
    ids=str,
)
def test_fp8_v(shape: Shape) -> None:
    v, valid, dim, block = shape.tensor(), shape.valid(), padded_dim(shape.dim), shape.block
    v[:, :, : block // 2] *= 100  # blocks differ in size
    values_made = prepare(v=v, block_k=block, valid=as_bytes(valid)).values
    assert values_made is not None
    out, scale = values_made
    padded = cdiv(shape.length, 128) * 128
    assert out.shape == (shape.batch, shape.heads, dim, padded)
    assert out.dtype == torch.float8_e4m3fn
    chosen = v.float() if valid is None else v.float().masked_fill(~valid[:, None, :, None], 0.0)
    largest = torch.stack([part.abs().amax((-1, -2)) for part in chosen.split(block, 2)], -1)
    assert torch.equal(scale, torch.exp2((largest.clamp(min=2.0**-60) / 448).log2().ceil()))
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
    values = prepare(v=v, block_k=64).values
    assert values is not None
    out, scale = values
    assert (out[..., 64:].float() == 0).all()
    assert scale.isfinite().all()
    assert (scale > 2.0**-80).all()
