"""Real pipelines of diffusers around the tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modify_model.cli.tiny import TINY


def generate(pipe: Any, name: str, steps: int = 4, *, seed: int = 0, batch: int = 1) -> Tensor:
    """Latents of a prompt made from the seed, with classifier-free guidance where the pipeline has it."""
    tiny = TINY[name]
    call = tiny.arguments(str(seed), batch=batch) | tiny.size
    generator = torch.Generator().manual_seed(seed)
    return pipe(**call, num_inference_steps=steps, guidance_scale=3.0, output_type="latent", generator=generator)[0]
