"""What the families of diffusers share; a family is a row of facts: :func:`diffusers_family`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autotune import SparseAttention

from .families import Family, Layer, Place, count_dense_call, register
from .processors import SparseProcessor, sparse_processor, unsupported
from .schedule import DenseSteps, NoiseLevel, note_calls, thousandths


def diffusers_family(
    name: str,
    model_classes: str | tuple[str, ...],
    places: Mapping[str, Place],
    *,
    noise_level: NoiseLevel = thousandths,
) -> Family:
    """Make a family of diffusers known.

    Args:
        name: as users read it in messages.
        model_classes: names of the model classes that it serves; their subclasses are found too.
        places: for each self-attention, as ``"<class of the block>.<attribute>"``, where the text stands: "text
            first", "text last", or None without text. An attention that gets the text as ``encoder_hidden_states`` of
            its own has it beside ``hidden_states``; one without gets both in one sequence, and its text is as long as
            the transformer's ``encoder_hidden_states``.
        noise_level: maps the ``timestep`` that the model receives to [0, 1], 1 = pure noise.
    """
    classes = (model_classes,) if isinstance(model_classes, str) else model_classes
    return register(DiffusersFamily(name, classes, noise_level, dict(places)))


@dataclass(frozen=True)
class DiffusersFamily(Family):
    """A family whose attention layers keep a processor, which is swapped."""

    places: Mapping[str, Place] = field(default_factory=dict)

    def layers(self, model: nn.Module) -> list[Layer]:
        found = []
        for path, block in model.named_modules():
            classes = {cls.__name__ for cls in type(block).__mro__}
            for key, place in self.places.items():
                name, attribute = key.split(".")
                attention = getattr(block, attribute, None) if name in classes else None
                if attention is not None:
                    found.append(Layer(f"{path}.{attribute}", attention, place))
        return found

    def heads(self, attention: Any) -> tuple[int, int]:
        return int(attention.heads), int(attention.inner_dim) // int(attention.heads)

    def unsupported(self, attention: Any) -> str | None:
        return unsupported(attention.processor)

    def is_sparse(self, attention: Any) -> bool:
        return isinstance(attention.processor, SparseProcessor)

    def install(self, layer: Layer, inner: SparseAttention) -> None:
        attention: Any = layer.attention
        attention.inner_attention = inner
        attention.processor = sparse_processor(attention.processor, layer.place)

    def remove(self, attention: Any) -> None:
        if self.is_sparse(attention):  # else someone has set another processor meanwhile; it stays
            attention.processor = attention.processor.original
        del attention.inner_attention

    def switch(self, model: nn.Module, on: bool, dense_steps: tuple[float, float] | None = None) -> None:
        assert self.noise_level is not None
        layers = [layer for layer in self.layers(model) if hasattr(layer.attention, "inner_attention")]
        note_calls(model, BeforeCall(*(dense_steps or (0.0, 0.0)), self.noise_level, layers) if on else None)


class BeforeCall(DenseSteps):
    """Before each call of a patched transformer, also looks whether another processor has been set in a layer.

    diffusers sets processors when projections are fused and image-prompt adapters loaded; what can be sparse is.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__call__(module, args, kwargs)
        if torch.compiler.is_compiling():
            return
        for _, attention, place in self.layers:
            if not isinstance(attention.processor, SparseProcessor):
                reason = unsupported(attention.processor)
                if reason is None:
                    attention.processor = sparse_processor(attention.processor, place)
                elif attention.inner_attention.mode != "dense":
                    count_dense_call(f"after the patch a layer was given another processor, and {reason}")
