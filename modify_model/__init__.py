"""Patch pretrained models with tunable sparse attention; one file per model family."""

from .patching import patch, restore, verify

__all__ = ["patch", "restore", "verify"]
