"""Wan 2.1 and 2.2 (diffusers), text-to-video and image-to-video: self-attention over the video.

Text and image enter through cross-attention, which stays as it is. Wan 2.2 has two transformers: patch the pipeline.
"""

from .modify_diffusers import diffusers_family
from .patching import patch_function

FAMILY = diffusers_family("Wan", "WanTransformer3DModel", {"WanTransformerBlock.attn1": None})

set_spas_sage_attn_wan = patch_function("set_spas_sage_attn_wan", FAMILY)
