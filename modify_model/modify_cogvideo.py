"""CogVideoX (diffusers): joint attention over the text, which comes first, and the video."""

from .modify_diffusers import diffusers_family
from .patching import patch_function

FAMILY = diffusers_family("CogVideoX", "CogVideoXTransformer3DModel", {"CogVideoXBlock.attn1": "text first"})

set_spas_sage_attn_cogvideox = patch_function("set_spas_sage_attn_cogvideox", FAMILY)
