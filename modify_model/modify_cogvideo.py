"""CogVideoX (diffusers): joint attention over the text, which comes first, and the video."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .patching import patch_family, register
from .processors import SparseProcessor, processor_family


class SparseCogVideoXProcessor(SparseProcessor):
    """In place of CogVideoXAttnProcessor2_0 (or the fused one)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text = ((0, encoder_hidden_states.shape[1]),)
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, text=text)


FAMILY = register(
    processor_family(
        "CogVideoX",
        model_classes=("CogVideoXTransformer3DModel",),
        blocks={"CogVideoXBlock": "attn1"},
        processor=SparseCogVideoXProcessor,
    )
)


def set_spas_sage_attn_cogvideox(
    transformer: nn.Module,
    l1: float | None = None,
    pv_l1: float | None = None,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
) -> nn.Module:
    """Patch a CogVideoX transformer in place; arguments and errors as in :func:`modify_model.patch`."""
    return patch_family(transformer, (FAMILY,), l1=l1, pv_l1=pv_l1, layer_range=layer_range, verbose=verbose)
