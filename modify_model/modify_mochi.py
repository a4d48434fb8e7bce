"""Mochi (diffusers): joint attention over the video, which comes first, and the text.

Its processor calls attention once for each sample, with the padded text left out.
"""

from .modify_diffusers import diffusers_family
from .schedule import rising

FAMILY = diffusers_family(
    "Mochi",
    "MochiTransformer3DModel",
    {"MochiTransformerBlock.attn1": "text last"},
    noise_level=rising,
)
