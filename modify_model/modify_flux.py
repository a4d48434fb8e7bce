"""Flux (diffusers): joint attention over the text, which comes first, and the image.

The dual-stream blocks (``transformer_blocks.<n>.attn``) and the single-stream blocks
(``single_transformer_blocks.<n>.attn``) have entries of their own in a tuned file. A single-stream layer gets text and
image as one sequence, so the length of the text is noted where the transformer is called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .patching import patch_family, register
from .processors import SparseProcessor, processor_family
from .schedule import add_hook, argument, remove_hooks, unchanged


class SparseFluxProcessor(SparseProcessor):
    """In place of FluxAttnProcessor."""

    text_length = 0  # of the transformer's call in progress

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        length = self.text_length if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        text = ((0, length),)
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, text=text)


class NoteTextLength:
    """Forward pre-hook of the transformer: tells the single-stream layers how long the text is."""

    def __init__(self, attentions: list[Any]) -> None:
        self.attentions = attentions

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        length = argument(module, "encoder_hidden_states", args, kwargs).shape[1]
        for attention in self.attentions:
            if isinstance(attention.processor, SparseFluxProcessor):
                attention.processor.text_length = length


def _switch(model: nn.Module, on: bool) -> None:
    remove_hooks(model, NoteTextLength)
    if on:
        single = [attention for path, attention in FAMILY.layers(model) if "single_transformer_blocks." in path]
        add_hook(model, NoteTextLength(single))


FAMILY = register(
    processor_family(
        "Flux",
        model_classes=("FluxTransformer2DModel",),
        blocks={"FluxTransformerBlock": "attn", "FluxSingleTransformerBlock": "attn"},
        processor=SparseFluxProcessor,
        noise_level=unchanged,  # the pipeline divides by 1000
        switch=_switch,
    )
)


def set_spas_sage_attn_flux(
    transformer: nn.Module,
    l1: float | None = None,
    pv_l1: float | None = None,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
) -> nn.Module:
    """Patch a Flux transformer in place; arguments and errors as in :func:`modify_model.patch`.

    ``layer_range`` counts the dual-stream layers first, then the single-stream ones.
    """
    return patch_family(transformer, (FAMILY,), l1=l1, pv_l1=pv_l1, layer_range=layer_range, verbose=verbose)
