"""HunyuanVideo and HunyuanDiT (diffusers).

HunyuanVideo attends jointly over the video, which comes first, and the text, with a key-padding mask that is there
even when nothing is padded. HunyuanDiT has self-attention over the image, and the text in cross-attention. Token
refiners and cross-attention stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .patching import patch_family, register
from .processors import SparseProcessor, processor_family


class SparseHunyuanVideoProcessor(SparseProcessor):
    """In place of HunyuanVideoAttnProcessor2_0, in dual-stream and single-stream blocks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        video = hidden_states.shape[1]
        text = () if encoder_hidden_states is None else ((video, video + encoder_hidden_states.shape[1]),)
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, text=text)


class SparseHunyuanDiTProcessor(SparseProcessor):
    """In place of HunyuanAttnProcessor2_0 (or the fused one), in self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return self.run(attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb)


VIDEO = register(
    processor_family(
        "HunyuanVideo",
        model_classes=("HunyuanVideoTransformer3DModel",),
        blocks={
            "HunyuanVideoTransformerBlock": "attn",
            "HunyuanVideoSingleTransformerBlock": "attn",
            "HunyuanVideoTokenReplaceTransformerBlock": "attn",  # image-to-video
            "HunyuanVideoTokenReplaceSingleTransformerBlock": "attn",
        },
        processor=SparseHunyuanVideoProcessor,
    )
)
DIT = register(
    processor_family(
        "HunyuanDiT",
        model_classes=("HunyuanDiT2DModel",),
        blocks={"HunyuanDiTBlock": "attn1"},
        processor=SparseHunyuanDiTProcessor,
    )
)


def set_spas_sage_attn_hunyuan(
    transformer: nn.Module,
    l1: float | None = None,
    pv_l1: float | None = None,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
) -> nn.Module:
    """Patch a HunyuanVideo or HunyuanDiT transformer in place; arguments and errors as in :func:`modify_model.patch`.

    ``layer_range`` counts HunyuanVideo's dual-stream layers first, then the single-stream ones.
    """
    return patch_family(transformer, (VIDEO, DIT), l1=l1, pv_l1=pv_l1, layer_range=layer_range, verbose=verbose)
