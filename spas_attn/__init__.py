"""Training-free block-sparse attention: selectors choose blocks, backends compute them."""

from typing import TYPE_CHECKING, Any

from . import metrics
from .attention import AttentionStats, block_sparse_attention, explain, sparse_attention
from .block_mask import BlockMask
from .call import Call
from .plan import Plan, count_fallback, fallback_counts

if TYPE_CHECKING:
    from .choose import choose_attention

__version__ = "0.1.0"
__all__ = [
    "AttentionStats",
    "BlockMask",
    "Call",
    "Plan",
    "block_sparse_attention",
    "choose_attention",
    "count_fallback",
    "explain",
    "fallback_counts",
    "metrics",
    "sparse_attention",
]


def __getattr__(name: str) -> Any:
    """Load what few need when it is asked for."""
    if name == "choose_attention":
        from .choose import choose_attention

        return choose_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
