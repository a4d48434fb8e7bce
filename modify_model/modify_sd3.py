"""Stable Diffusion 3 and 3.5 (diffusers): joint attention over the image, which comes first, and the text.

Some blocks of 3.5 have a second attention, over the image alone.
"""

from .modify_diffusers import diffusers_family

FAMILY = diffusers_family(
    "SD3",
    "SD3Transformer2DModel",
    {"JointTransformerBlock.attn": "text last", "JointTransformerBlock.attn2": None},
)
