"""Patch pretrained models with tunable sparse attention; one file per model family.

Importing it registers the attention implementation ``"spas_attn"`` with transformers.
"""

from typing import TYPE_CHECKING, Any

from .patching import patch, restore, verify
from .registration import register_with_transformers
from .schedule import dense_steps_of

if TYPE_CHECKING:
    from .streaming import stream_heads
    from .streaming_cache import StreamingCache

__all__ = ["StreamingCache", "dense_steps_of", "patch", "restore", "stream_heads", "verify"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    """Load what needs transformers when it is asked for."""
    if name == "stream_heads":
        from .streaming import stream_heads

        return stream_heads
    if name == "StreamingCache":
        from .streaming_cache import StreamingCache

        return StreamingCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
