"""Small shape models with random weights, for tries and tests: whole in their parts, meaningless in their shapes."""

from __future__ import annotations

from typing import Any

import torch

from .dit import Hunyuan3DDiT
from .pipeline import ShapePipeline
from .plain import HunYuanDiTPlain
from .vae import ShapeVAE
from .volume import decode_volume

LATENTS, TOKENS, CONTEXT = 256, 40, 32
NAMES = ("2.0", "turbo", "2.1")


def tiny(name: str = "2.0", engine: str | None = None) -> ShapePipeline:
    """A pipeline of 256 latents and 40 condition tokens of 32 channels; the same weights every time.

    Args:
        name: "2.0", "turbo" (embedded guidance, consistency sampler) or "2.1".
        engine: of the attention.
    """
    if name not in NAMES:
        raise ValueError(f"a tiny model is one of {', '.join(NAMES)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(hidden_size=64, num_heads=2)
        model: Hunyuan3DDiT | HunYuanDiTPlain
        if name == "2.1":
            model = HunYuanDiTPlain(
                context_dim=CONTEXT, depth=3, num_moe_layers=1, num_experts=4, engine=engine, **sizes
            )
        else:
            blocks: dict[str, Any] = dict(context_in_dim=CONTEXT, depth=1, depth_single_blocks=2)
            model = Hunyuan3DDiT(guidance_embed=name == "turbo", engine=engine, **blocks, **sizes)
        vae = ShapeVAE(LATENTS, width=64, heads=2, num_decoder_layers=1, num_freqs=2, engine=engine)
        for part in (model, vae):
            part.eval().requires_grad_(False)
        # So that the field has a surface: half of it is inside.
        field = decode_volume(vae, torch.randn(1, LATENTS, 64), 8)
        vae.geo_decoder.output_proj.bias.sub_(field.median())
    return ShapePipeline(model, vae, LATENTS, "consistency" if name == "turbo" else "flow")
