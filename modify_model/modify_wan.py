"""Wan 2.1 and 2.2 (diffusers), text-to-video and image-to-video: self-attention over the video.

Text and image enter through cross-attention, which stays as it is. Wan 2.2 has two transformers: patch the pipeline.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .patching import patch_family, register
from .processors import SparseProcessor, processor_family


class SparseWanProcessor(SparseProcessor):
    """In place of WanAttnProcessor, in self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


FAMILY = register(
    processor_family(
        "Wan",
        model_classes=("WanTransformer3DModel",),
        blocks={"WanTransformerBlock": "attn1"},
        processor=SparseWanProcessor,
    )
)


def set_spas_sage_attn_wan(
    transformer: nn.Module,
    l1: float | None = None,
    pv_l1: float | None = None,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
) -> nn.Module:
    """Patch a Wan transformer in place; arguments and errors as in :func:`modify_model.patch`."""
    return patch_family(transformer, (FAMILY,), l1=l1, pv_l1=pv_l1, layer_range=layer_range, verbose=verbose)
