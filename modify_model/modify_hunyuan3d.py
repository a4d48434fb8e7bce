"""Hunyuan3D shape models: ours (modify_model/hunyuan3d) and those of hy3dgen, hy3dshape and ComfyUI.

Their attention stays dense unless one calibrates it, or asks for a selector outright: see :data:`WHY_DENSE`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from autotune import SparseAttention

from .families import Family, Layer, register
from .hunyuan3d import installed
from .hunyuan3d.condition import Denoiser
from .hunyuan3d.schedule import ShapeSteps, rising_unit
from .patching import patch_function
from .schedule import note_calls, unchanged

WHY_DENSE = (
    "the attention of a Hunyuan3D denoiser stays dense until you calibrate it: its latents are an unordered set, so "
    "neighbouring tokens are not alike and blocks predict little, and at 1,900 to 4,400 tokens even free attention "
    "would make a pass 1.3 to 1.7 times as fast at most (docs/hunyuan3d.md)"
)
# Lists of blocks, and what of a block is the layer ("" for itself).
_LISTS = {"double_blocks": "", "single_blocks": "", "blocks": "attn1"}


@dataclass(frozen=True)
class Hunyuan3DFamily(Family):
    """Blocks in lists of known names; our own read ``inner_attention``, those of others get a class that does."""

    def layers(self, model: nn.Module) -> list[Layer]:
        found: list[Layer] = []
        for path, root in model.named_modules():
            if not self._is_denoiser(root):
                continue
            for name, attribute in _LISTS.items():
                blocks: Any = getattr(root, name, ())
                for index, block in enumerate(blocks):
                    place = ".".join(part for part in (path, name, str(index), attribute) if part)
                    # A block without the attribute is taken whole, so that it is refused by its structure.
                    found.append(Layer(place, getattr(block, attribute, block) if attribute else block))
        return found

    def _is_denoiser(self, module: nn.Module) -> bool:
        return any(cls.__name__ in self.model_classes for cls in type(module).__mro__)

    def heads(self, attention: nn.Module) -> tuple[int, int]:
        return installed.sizes(attention)

    def unsupported(self, attention: nn.Module) -> str | None:
        return None if _ours(attention) else installed.unrecognised(attention)

    def is_sparse(self, attention: nn.Module) -> bool:
        return _ours(attention) or installed.is_installed(attention)

    def install(self, layer: Layer, inner: SparseAttention) -> None:
        if _ours(layer.attention):
            layer.attention.inner_attention = inner
        else:
            installed.install(layer.attention, inner)

    def remove(self, attention: nn.Module) -> None:
        if installed.is_installed(attention):
            installed.remove(attention)
        else:
            del attention.inner_attention

    def switch(self, model: nn.Module, on: bool, dense_steps: tuple[float, float] | None = None) -> None:
        for root in filter(self._is_denoiser, model.modules()):
            # ComfyUI's models get their time as others do, 1 = noise, and turn it around themselves.
            theirs = type(root).__module__.split(".")[0] == "comfy"
            steps = ShapeSteps(*(dense_steps or (0.0, 0.0)), unchanged if theirs else rising_unit)
            note_calls(root, steps if on else None)
        inners = [layer.attention._modules.get("inner_attention") for layer in self.layers(model)]
        if on and all(inner.mode == "dense" for inner in inners if isinstance(inner, SparseAttention)):
            warnings.warn(WHY_DENSE, UserWarning, stacklevel=3)


def _ours(attention: nn.Module) -> bool:
    return type(attention).__module__.startswith(f"{Denoiser.__module__.rpartition('.')[0]}.")


FAMILY = register(
    Hunyuan3DFamily("Hunyuan3D", ("Hunyuan3DDiT", "HunYuanDiTPlain", "Hunyuan3Dv2"), noise_level=rising_unit)
)

set_spas_sage_attn_hunyuan3d = patch_function("set_spas_sage_attn_hunyuan3d", FAMILY)
