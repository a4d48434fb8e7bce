"""QwenImage (diffusers): joint attention over the text, which comes first, and the image; padded text is masked."""

from .modify_diffusers import diffusers_family
from .schedule import unchanged

FAMILY = diffusers_family(
    "QwenImage",
    "QwenImageTransformer2DModel",
    {"QwenImageTransformerBlock.attn": "text first"},
    noise_level=unchanged,  # the pipeline divides by 1000
)
