"""HunyuanVideo and HunyuanDiT (diffusers).

HunyuanVideo attends jointly over the video, which comes first, and the text, with a key-padding mask that is there
even when nothing is padded; ``layer_range`` counts its dual-stream layers first, then the single-stream ones.
HunyuanDiT has self-attention over the image, and the text in cross-attention. Token refiners and cross-attention stay
as they are.
"""

from .modify_diffusers import diffusers_family
from .patching import patch_function

VIDEO = diffusers_family(
    "HunyuanVideo",
    "HunyuanVideoTransformer3DModel",
    {
        "HunyuanVideoTransformerBlock.attn": "text last",
        "HunyuanVideoSingleTransformerBlock.attn": "text last",
        "HunyuanVideoTokenReplaceTransformerBlock.attn": "text last",  # image-to-video
        "HunyuanVideoTokenReplaceSingleTransformerBlock.attn": "text last",
    },
)
DIT = diffusers_family("HunyuanDiT", "HunyuanDiT2DModel", {"HunyuanDiTBlock.attn1": None})

set_spas_sage_attn_hunyuan = patch_function("set_spas_sage_attn_hunyuan", VIDEO, DIT)
