"""LTX-Video (diffusers): self-attention over the video; the text is in cross-attention, which stays as it is."""

from .modify_diffusers import diffusers_family

FAMILY = diffusers_family("LTX-Video", "LTXVideoTransformer3DModel", {"LTXVideoTransformerBlock.attn1": None})
