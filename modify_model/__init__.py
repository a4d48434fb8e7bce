"""Patch pretrained models with tunable sparse attention; one file per model family.

Importing it registers the attention implementation ``"spas_attn"`` with transformers.
"""

from .patching import patch, restore, verify
from .registration import register_with_transformers
from .schedule import dense_steps_of

__all__ = ["dense_steps_of", "patch", "restore", "verify"]

register_with_transformers()
