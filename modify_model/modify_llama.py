"""LLaMA (transformers 4.56 to 5.x): SparseLlamaAttention in place of LlamaAttention.

What LLaMA shares with every model of transformers is in modify_transformers.py and interface.py. Its own are the class
of its layers, the name of its family in tuned files, and a patch function of the name that users of SpargeAttn know.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.models.llama import modeling_llama

from autotune import enable_tune_mode

from .families import Layer, find_modules, register
from .interface import SparseLayer, use_class
from .modify_transformers import TransformersFamily
from .patching import patch

__all__ = ["SparseLlamaAttention", "enable_tune_mode", "set_spas_sage_attn_llama"]


def set_spas_sage_attn_llama(
    model: nn.Module,
    l1: float = 0.06,
    pv_l1: float = 0.07,
    tail: float | None = 0.5,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
) -> nn.Module:
    """Patch a LLaMA model in place; arguments and errors as in :func:`modify_model.patch`.

    ``layer_range=(start, stop)`` makes only layers start to stop - 1 sparse.
    """
    if not isinstance(model, nn.Module) or not find_modules(model, "LlamaAttention"):
        raise ValueError(f"model must contain LlamaAttention layers, got {type(model).__name__}")
    return patch(model, l1=l1, pv_l1=pv_l1, tail=tail, layer_range=layer_range, verbose=verbose)


class SparseLlamaAttention(SparseLayer, modeling_llama.LlamaAttention):
    """LlamaAttention whose attention proper runs through ``inner_attention``: a patched layer is given this class."""


use_class(modeling_llama.LlamaAttention, SparseLlamaAttention)


@dataclass(frozen=True)
class LlamaFamily(TransformersFamily):
    """LLaMA; tuned files call the family so."""

    def layers(self, model: nn.Module) -> list[Layer]:
        return [Layer(path, attention) for path, attention in find_modules(model, "LlamaAttention")]

    def label(self, model: nn.Module) -> str:
        return self.name

    def unsupported(self, attention: nn.Module) -> str | None:
        if type(attention).forward is not modeling_llama.LlamaAttention.forward:
            return f"{type(attention).__name__} has a forward of its own"
        return None


register(LlamaFamily("LLaMA", ("LlamaModel",)))
