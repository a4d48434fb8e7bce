"""LTX-Video (diffusers): self-attention over the video; the text is in cross-attention, which stays as it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .patching import register
from .processors import SparseProcessor, processor_family


class SparseLTXProcessor(SparseProcessor):
    """In place of LTXVideoAttnProcessor, in self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


FAMILY = register(
    processor_family(
        "LTX-Video",
        model_classes=("LTXVideoTransformer3DModel",),
        blocks={"LTXVideoTransformerBlock": "attn1"},
        processor=SparseLTXProcessor,
    )
)
