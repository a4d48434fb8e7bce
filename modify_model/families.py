"""Which families of models there are; a model's family is found by the names of its classes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from autotune import SparseAttention
from spas_attn import count_fallback
from spas_attn.traced import constant_when_traced

from .schedule import NoiseLevel

# Class names of models, and the file that serves them. The file is imported when such a model arrives, so that nobody
# needs diffusers for a language model; importing it registers its Family.
ADAPTERS = {
    "LlamaModel": "modify_model.modify_llama",
    "CogVideoXTransformer3DModel": "modify_model.modify_cogvideo",
    "FluxTransformer2DModel": "modify_model.modify_flux",
    "HunyuanDiT2DModel": "modify_model.modify_hunyuan",
    "HunyuanVideoTransformer3DModel": "modify_model.modify_hunyuan",
    "Hunyuan3DDiT": "modify_model.modify_hunyuan3d",
    "HunYuanDiTPlain": "modify_model.modify_hunyuan3d",  # Hunyuan3D 2.1
    "Hunyuan3Dv2": "modify_model.modify_hunyuan3d",  # ComfyUI's name of Hunyuan3DDiT
    "LTXVideoTransformer3DModel": "modify_model.modify_ltx",
    "MochiTransformer3DModel": "modify_model.modify_mochi",
    "QwenImageTransformer2DModel": "modify_model.modify_qwenimage",
    "SD3Transformer2DModel": "modify_model.modify_sd3",
    "WanTransformer3DModel": "modify_model.modify_wan",
}
# What every model of transformers derives from; the family that serves those which have none of their own.
ANY_TRANSFORMERS = "PreTrainedModel"


# Where the text stands among the tokens that attend to each other; None: there is none (it is in cross-attention).
Place = Literal["text first", "text last"] | None


class Layer(NamedTuple):
    """One self-attention layer of a model: its path, what stands there, and where its text stands."""

    path: str
    attention: nn.Module
    place: Place = None


@dataclass(frozen=True)
class Family:
    """What is special to one family of models; a subclass says how.

    Attributes:
        name: as users read it in messages.
        model_classes: names of the model classes it serves; subclasses and wrapped models are found too.
        noise_level: maps the ``timestep`` that a diffusion model receives to [0, 1], 1 = pure noise.
    """

    name: str
    model_classes: tuple[str, ...]
    noise_level: NoiseLevel | None = None

    def label(self, model: nn.Module) -> str:
        """The name of the family of one model, as tuned files record it: they fit no model of another."""
        return self.name

    def layers(self, model: nn.Module) -> list[Layer]:
        """Every self-attention layer of a model, in layer order, patched or not."""
        raise NotImplementedError

    def heads(self, attention: nn.Module) -> tuple[int, int]:
        """Query heads of an attention layer, and their dimension."""
        raise NotImplementedError

    def kv_heads(self, attention: nn.Module) -> int:
        """KV heads of an attention layer; as many as query heads unless a family knows better."""
        return self.heads(attention)[0]

    def install(self, layer: Layer, inner: SparseAttention) -> None:
        """Make a layer sparse, with ``inner`` as its child ``inner_attention``; also one that is no longer sparse."""
        raise NotImplementedError

    def remove(self, attention: nn.Module) -> None:
        """Undo ``install``."""
        raise NotImplementedError

    def is_sparse(self, attention: nn.Module) -> bool:
        """Whether what ``install`` put into a layer is still there."""
        return True

    def unsupported(self, attention: nn.Module) -> str | None:
        """Why a layer that is not sparse cannot be made so, or None."""
        return None

    def defaults(self) -> dict[str, Any]:
        """Options of SparseAttention that suit the family better than the general ones."""
        return {}

    def switch(self, model: nn.Module, on: bool, dense_steps: tuple[float, float] | None = None) -> None:
        """What belongs to the model as a whole: set after a patch, undone after a restore."""

    def problem(self, model: nn.Module) -> str | None:
        """Why an installed patch cannot work any more, or None."""
        return None

    def missing(self, model: nn.Module) -> str:
        """What is wrong with a model that has no attention layer."""
        return "no attention layer was found in it"


_families: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known; called by its file at import."""
    _families[family.name] = family
    return family


def find_family(model: nn.Module) -> Family:
    """The family that serves a model, found by the class names of its modules (PEFT and compiled models included)."""
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    for name in names & ADAPTERS.keys():
        importlib.import_module(ADAPTERS[name])
    if ANY_TRANSFORMERS in names:
        importlib.import_module("modify_model.modify_transformers")
    # A family of a model's own comes before the one for any model of transformers.
    for family in sorted(_families.values(), key=lambda family: ANY_TRANSFORMERS in family.model_classes):
        if names.intersection(family.model_classes):
            return family
    known = sorted({*ADAPTERS, *(name for family in _families.values() for name in family.model_classes)})
    raise ValueError(f"{type(model).__name__} has no adapter; supported are models built on {', '.join(known)}")


@constant_when_traced
def count_dense_call(reason: str) -> None:
    """Count a call that runs dense instead of sparse; under torch.compile once, while tracing."""
    count_fallback(reason)


def find_modules(model: nn.Module, class_name: str) -> list[tuple[str, nn.Module]]:
    """Every module whose class, or a class it derives from, has that name, with its path."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(cls.__name__ == class_name for cls in type(module).__mro__)
    ]
