"""QwenImage (diffusers): joint attention over the text, which comes first, and the image; padded text is masked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .patching import register
from .processors import SparseProcessor, processor_family
from .schedule import unchanged


class SparseQwenImageProcessor(SparseProcessor):
    """In place of QwenDoubleStreamAttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text = ((0, encoder_hidden_states.shape[1]),)
        arguments = (encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb)
        return self.run(attn, hidden_states, *arguments, text=text)


FAMILY = register(
    processor_family(
        "QwenImage",
        model_classes=("QwenImageTransformer2DModel",),
        blocks={"QwenImageTransformerBlock": "attn"},
        processor=SparseQwenImageProcessor,
        noise_level=unchanged,  # the pipeline divides by 1000
    )
)
