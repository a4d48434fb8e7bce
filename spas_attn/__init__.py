"""Training-free block-sparse attention: selectors choose blocks, backends compute them."""

from . import metrics
from .attention import AttentionStats, block_sparse_attention, explain, sparse_attention
from .block_mask import BlockMask
from .call import Call
from .plan import Plan, count_fallback, fallback_counts

__version__ = "0.1.0"
__all__ = [
    "AttentionStats",
    "BlockMask",
    "Call",
    "Plan",
    "block_sparse_attention",
    "count_fallback",
    "explain",
    "fallback_counts",
    "metrics",
    "sparse_attention",
]
