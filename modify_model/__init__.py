"""Patch pretrained models with tunable sparse attention; one file per model family.

Importing it registers the attention implementation ``"spas_attn"`` with transformers.
"""

from .patching import patch, restore, verify
from .registration import register_with_transformers
from .schedule import dense_steps_of
from .streaming import stream_heads
from .streaming_cache import StreamingCache

__all__ = ["StreamingCache", "dense_steps_of", "patch", "restore", "stream_heads", "verify"]

register_with_transformers()
