"""The similarity filter (SpargeAttn, arXiv 2502.18137): blocks whose mean does not speak for their tokens.

A block whose self-similarity, the mean pairwise cosine of its rows, lies below the threshold is *mixed*. Mixed key
blocks take no part in the scores and are kept; mixed query blocks keep every visible block. Under causality a query
block judges only key blocks of which it sees every token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_rows(b_x):
    """Rows of length 1: the squared norm of their mean is their mean pairwise cosine."""
    return b_x * (1.0 / tl.maximum(tl.sqrt(tl.sum(b_x * b_x, 1)), 1e-12))[:, None]


@triton.jit
def last_within(limit, length, SIZE: tl.constexpr):
    """Index of the last stretch of SIZE tokens that ends at ``limit`` or before; the ragged last one ends at length."""
    whole = tl.where(limit < 0, -1, limit // SIZE - 1)
    return tl.where(limit >= length, tl.cdiv(length, SIZE) - 1, whole)


@triton.jit
def mixed(p_similarity, inside, threshold):
    """Whether blocks are mixed, bool like the pointers; blocks that are not ``inside`` are not."""
    return tl.load(p_similarity, mask=inside, other=1.0) < threshold
