"""Makes the attention implementation ``"spas_attn"`` known to transformers, once that is imported, and not before.

``import modify_model`` alone does not import transformers, which takes seconds and need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

_REGISTRY = "transformers.modeling_utils"  # the module that keeps attention implementations


class _AtImport(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, and registers when it has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader: Any = spec and spec.loader
        if hasattr(loader, "exec_module"):
            original = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                original(module)
                _register()

            loader.exec_module = exec_module
        return spec


def _register() -> None:
    """Import what registers itself; it may be what imports transformers."""
    importlib.import_module("modify_model.interface")


def register_with_transformers() -> None:
    """Register ``"spas_attn"`` now, or as soon as transformers' models are imported."""
    if hasattr(sys.modules.get(_REGISTRY), "AttentionInterface"):
        _register()
    elif not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport())
