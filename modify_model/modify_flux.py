"""Flux (diffusers): joint attention over the text, which comes first, and the image.

The dual-stream blocks (``transformer_blocks.<n>.attn``) and the single-stream blocks
(``single_transformer_blocks.<n>.attn``, which get text and image as one sequence) have entries of their own in a tuned
file. ``layer_range`` counts the dual-stream layers first, then the single-stream ones.
"""

from .modify_diffusers import diffusers_family
from .patching import patch_function
from .schedule import unchanged

FAMILY = diffusers_family(
    "Flux",
    "FluxTransformer2DModel",
    {"FluxTransformerBlock.attn": "text first", "FluxSingleTransformerBlock.attn": "text first"},
    noise_level=unchanged,  # the pipeline divides by 1000
)

set_spas_sage_attn_flux = patch_function("set_spas_sage_attn_flux", FAMILY)
