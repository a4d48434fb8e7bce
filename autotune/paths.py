"""Where the attention layers of a model or pipeline are: the modules that hold them, and their paths."""

from __future__ import annotations

from typing import Any

from torch import nn

# Attributes of a pipeline object that hold its transformers, and the prefix of the second one in a tuned file; those of
# shape models (Hunyuan3D) call it ``model``.
_PIPELINE_PARTS = (("transformer", ""), ("transformer_2", "transformer_2."))
_SHAPE_PARTS = (("model", ""),)
_WRAPPERS = ("base_model.model.", "module.")  # of PEFT, and of DataParallel and DistributedDataParallel


def transformers_of(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules of a model or pipeline that hold its attention layers, each with its prefix in a tuned file."""
    if isinstance(model, nn.Module):
        return [("", model)]
    for names in (_PIPELINE_PARTS, _SHAPE_PARTS):
        parts = [(prefix, getattr(model, name, None)) for name, prefix in names]
        found = [(prefix, part) for prefix, part in parts if isinstance(part, nn.Module)]
        if found:
            return found
    raise ValueError(
        f"model must be a module, a shape pipeline with .model, "
        f"or a pipeline with .transformer, got {type(model).__name__}"
    )


def clean_path(path: str) -> str:
    """A module's path without what torch.compile, PEFT, DataParallel and DistributedDataParallel put into it."""
    path = ".".join(part for part in path.split(".") if part != "_orig_mod")
    while path.startswith(_WRAPPERS):
        path = path.split(".", 2 if path.startswith(_WRAPPERS[0]) else 1)[-1]
    return path
