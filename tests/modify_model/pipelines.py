"""Real pipelines of diffusers around the small models, without text encoders and VAEs."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusion_models import CASES
from torch import Tensor


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan(two: bool = False) -> Any:
    """WanPipeline; ``two`` = as Wan 2.2, with a second transformer for the low noise levels."""
    second = CASES["Wan"].model() if two else None
    if second is not None:
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(1.01)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _quiet(
        diffusers.WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=scheduler,
            transformer=CASES["Wan"].model(),
            transformer_2=second,
            boundary_ratio=0.875 if two else None,
        )
    )


def cogvideo() -> Any:
    """CogVideoXPipeline; classifier-free guidance doubles its batch."""
    return _quiet(
        diffusers.CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=diffusers.CogVideoXDDIMScheduler(),
            transformer=CASES["CogVideoX"].model(),
        )
    )


def flux() -> Any:
    """FluxPipeline, with the shift of its timesteps that depends on the size."""
    return _quiet(
        diffusers.FluxPipeline(
            tokenizer=None,
            text_encoder=None,
            tokenizer_2=None,
            text_encoder_2=None,
            vae=None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            transformer=CASES["Flux"].model(),
        )
    )


def generate(pipe: Any, steps: int = 4, *, seed: int = 0, batch: int = 1) -> Tensor:
    """Latents of a prompt made from the seed, with classifier-free guidance where the pipeline has it."""
    generator = torch.Generator().manual_seed(seed)
    common = dict(num_inference_steps=steps, output_type="latent", generator=generator)
    if type(pipe).__name__ == "FluxPipeline":
        prompt = dict(prompt_embeds=_randn(batch, 64, 32, seed=seed), pooled_prompt_embeds=_randn(batch, 32, seed=seed))
        return pipe(**prompt, height=384, width=384, **common).images
    prompt = dict(prompt_embeds=_randn(batch, 32, 32, seed=seed), negative_prompt_embeds=_randn(batch, 32, 32, seed=99))
    size = 224 if type(pipe).__name__ == "WanPipeline" else 256
    return pipe(**prompt, height=size, width=size, num_frames=9, guidance_scale=3.0, **common).frames


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
