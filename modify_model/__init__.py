"""Patch pretrained models with tunable sparse attention; one file per model family."""

from .patching import patch, restore, verify
from .schedule import dense_steps_of

__all__ = ["dense_steps_of", "patch", "restore", "verify"]
