"""The error measures, against their definitions in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spas_attn import metrics


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 3, 5, 4, generator=generator)
    return exact + 0.1 * torch.randn(2, 3, 5, 4, generator=generator), exact


def test_relative_l1(pair: tuple[Tensor, Tensor]) -> None:
    a, b = (x.flatten().tolist() for x in pair)
    expected = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / sum(abs(y) for y in b)
    assert metrics.relative_l1(*pair).item() == pytest.approx(expected, rel=1e-5)
    assert metrics.relative_l1(pair[1], pair[1]) == 0


def test_cosine_similarity(pair: tuple[Tensor, Tensor]) -> None:
    a, b = (x.flatten().tolist() for x in pair)
    expected = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    assert metrics.cosine_similarity(*pair).item() == pytest.approx(expected, rel=1e-5)
    assert metrics.cosine_similarity(-2 * pair[1], pair[1]).item() == pytest.approx(-1, rel=1e-6)


def test_sqnr(pair: tuple[Tensor, Tensor]) -> None:
    a, b = (x.flatten().tolist() for x in pair)
    noise = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    assert metrics.sqnr(*pair).item() == pytest.approx(10 * math.log10(sum(y * y for y in b) / noise), rel=1e-5)
    assert metrics.sqnr(pair[1] * 1.1, pair[1]).item() == pytest.approx(20, abs=1e-3)


def test_psnr(pair: tuple[Tensor, Tensor]) -> None:
    a, b = (x.flatten().tolist() for x in pair)
    mean = sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    assert metrics.psnr(*pair).item() == pytest.approx(10 * math.log10(1 / mean), rel=1e-5)
    assert metrics.psnr(*pair, peak=255.0).item() == pytest.approx(10 * math.log10(255**2 / mean), rel=1e-5)


@pytest.mark.parametrize("measure", [metrics.relative_l1, metrics.cosine_similarity, metrics.sqnr])
def test_one_value_per_head(measure: object, pair: tuple[Tensor, Tensor]) -> None:
    values = measure(*pair, dim=(2, 3))  # type: ignore[operator]
    assert values.shape == (2, 3)
    alone = measure(pair[0][1, 2], pair[1][1, 2])  # type: ignore[operator]
    assert values[1, 2].item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    """Sums of squares of 300 leave the range of float16 at once, and bfloat16 cannot add 4,096 ones."""
    exact = torch.full((4096,), 300.0, dtype=dtype)
    output = exact * 1.5
    assert metrics.relative_l1(output, exact).item() == pytest.approx(0.5, rel=1e-5)
    assert metrics.cosine_similarity(output, exact).item() == pytest.approx(1.0, rel=1e-5)
    assert metrics.sqnr(output, exact).item() == pytest.approx(20 * math.log10(2), rel=1e-4)
    assert metrics.psnr(output, exact, peak=150.0).item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("measure", [metrics.relative_l1, metrics.cosine_similarity, metrics.sqnr, metrics.psnr])
def test_shapes_must_agree(measure: object) -> None:
    with pytest.raises(ValueError, match=r"output and exact must have one shape, got \(2, 3\) and \(3,\)"):
        measure(torch.ones(2, 3), torch.ones(3))  # type: ignore[operator]
