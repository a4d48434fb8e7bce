"""How far an output is from the exact one: relative L1, cosine similarity, SQNR, PSNR.

All take tensors of one shape and compute in float32; ``dim`` limits the reduction, so that one value per head (or
per query) comes out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _pair(output: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    if output.shape != exact.shape:
        raise ValueError(f"output and exact must have one shape, got {tuple(output.shape)} and {tuple(exact.shape)}")
    return output.float(), exact.float()


def relative_l1(output: Tensor, exact: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Σ|output - exact| / Σ|exact| (the error measure of SageAttention and SpargeAttn, arXiv 2502.18137)."""
    output, exact = _pair(output, exact)
    return (output - exact).abs().sum(dim) / exact.abs().sum(dim)


def cosine_similarity(output: Tensor, exact: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Cosine of the angle between output and exact, seen as vectors."""
    output, exact = _pair(output, exact)
    return (output * exact).sum(dim) / (output.square().sum(dim) * exact.square().sum(dim)).sqrt()


def sqnr(output: Tensor, exact: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Signal to quantisation noise ratio in decibels: 10 log10(Σ exact² / Σ (output - exact)²)."""
    output, exact = _pair(output, exact)
    return 10 * torch.log10(exact.square().sum(dim) / (output - exact).square().sum(dim))


def psnr(output: Tensor, exact: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal to noise ratio in decibels; ``peak`` is the largest value the signal can take."""
    output, exact = _pair(output, exact)
    return 10 * torch.log10(peak**2 / (output - exact).square().mean())
