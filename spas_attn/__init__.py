"""Training-free block-sparse attention: selectors choose blocks, backends compute them."""

from . import metrics
from .attention import (
    AttentionStats,
    Explanation,
    block_sparse_attention,
    count_fallback,
    explain,
    fallback_counts,
    sparse_attention,
)
from .block_mask import BlockMask

__version__ = "0.1.0"
__all__ = [
    "AttentionStats",
    "BlockMask",
    "Explanation",
    "block_sparse_attention",
    "count_fallback",
    "explain",
    "fallback_counts",
    "metrics",
    "sparse_attention",
]
