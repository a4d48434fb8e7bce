"""Small diffusion pipelines with random weights: `--model_name tiny:<family>` tries a script without a download.

They are the real pipelines and transformers of diffusers, with a few hundred tokens; text encoders and VAEs are left
out: prompts become random embeddings, and what is shown are latents. The pictures are noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

# diffusers.<name> imports a model when it is first used; naming all of them here would import all of them.
TEXT = 32  # width of the text embeddings
Embeddings = dict[str, Tensor]


@dataclass(frozen=True)
class Tiny:
    """One small pipeline.

    Attributes:
        make: makes the pipeline.
        size: arguments of its call: height, width and for videos num_frames.
        embed: the arguments that stand for a prompt, made from a random number generator.
        frames: the latents that it returns, as ``[F, h, w, C]``.
    """

    make: Callable[[], Any]
    size: dict[str, int]
    embed: Callable[[torch.Generator], Embeddings]
    frames: Callable[[Tensor], Tensor]

    def arguments(self, prompt: str, dtype: torch.dtype = torch.float32) -> Embeddings:
        """What the pipeline's call gets for a prompt; the same prompt gives the same."""
        found = self.embed(torch.Generator().manual_seed(zlib.crc32(prompt.encode())))
        return {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in found.items()}

    def show(self, latents: Tensor) -> Tensor:
        """Three channels of latents as frames ``[F, h, w, 3]`` in 0..1."""
        return torch.sigmoid(self.frames(latents)[..., :3].float().cpu())


def _weights(model: nn.Module) -> nn.Module:
    """Peaked attention, so that blocks matter, and no zeros at the end, where some models start with them."""
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("to_q.weight", "to_k.weight", "norm_q.weight", "add_q_proj.weight")):
                parameter.mul_(3)
            elif "proj_out" in path or "norm_out" in path:
                parameter.normal_(0, 0.1)
    return model.eval()


def _cogvideox() -> Any:
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=32,
        text_embed_dim=TEXT, num_layers=2, sample_width=32, sample_height=32, sample_frames=9, patch_size=2,
        patch_size_t=None, temporal_compression_ratio=4, max_text_seq_length=32, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(None, None, None, _weights(model), diffusers.CogVideoXDDIMScheduler())


def _flux() -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, guidance_embeds=True, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, _weights(model)
    )


def _hunyuan_video() -> Any:
    torch.manual_seed(0)
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=TEXT,
        pooled_projection_dim=TEXT, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        None, None, _weights(model), None, diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), None, None
    )


def _hunyuan_dit() -> Any:
    torch.manual_seed(0)
    model = diffusers.HunyuanDiT2DModel(
        sample_size=48, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=64, num_attention_heads=2,
        hidden_size=128, cross_attention_dim=TEXT, cross_attention_dim_t5=TEXT, pooled_projection_dim=TEXT,
        text_len=32, text_len_t5=32, activation_fn="gelu-approximate",
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        None, None, None, _weights(model), diffusers.DDPMScheduler(), None, None, requires_safety_checker=False
    )


def _ltx() -> Any:
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128,
        num_layers=2, caption_channels=TEXT,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.LTXPipeline(scheduler, None, None, None, _weights(model))


def _qwen_image() -> Any:
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=TEXT, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.QwenImagePipeline(scheduler, None, None, None, _weights(model))


def _wan(two: bool = False) -> Any:
    torch.manual_seed(0)
    models = [
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16,
            text_dim=TEXT, freq_dim=256, ffn_dim=128, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        )
        for _ in range(1 + two)
    ]  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    first, second = _weights(models[0]), _weights(models[-1]) if two else None
    return diffusers.WanPipeline(
        None, None, None, scheduler, transformer=first, transformer_2=second, boundary_ratio=0.875 if two else None
    )


def _text(generator: torch.Generator, *names: str, tokens: int = 32) -> Embeddings:
    return {name: torch.randn(1, tokens, TEXT, generator=generator) for name in names}


def _flux_text(generator: torch.Generator) -> Embeddings:
    pooled = torch.randn(1, TEXT, generator=generator)
    return {**_text(generator, "prompt_embeds", tokens=64), "pooled_prompt_embeds": pooled}


def _hunyuan_video_text(generator: torch.Generator) -> Embeddings:
    mask = torch.ones(1, 64)
    mask[:, 48:] = 0
    return {**_flux_text(generator), "prompt_attention_mask": mask}


def _hunyuan_dit_text(generator: torch.Generator) -> Embeddings:
    names = ("prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds", "negative_prompt_embeds_2")
    masks = {name.replace("embeds", "attention_mask"): torch.ones(1, 32) for name in names}
    return {**_text(generator, *names), **masks, "use_resolution_binning": False}  # type: ignore[dict-item]


def _ltx_text(generator: torch.Generator) -> Embeddings:
    masks = {f"{kind}prompt_attention_mask": torch.ones(1, 32, dtype=torch.bool) for kind in ("", "negative_")}
    return {**_pair(generator), **masks}


def _qwen_image_text(generator: torch.Generator) -> Embeddings:
    return {**_text(generator, "prompt_embeds"), "prompt_embeds_mask": torch.ones(1, 32, dtype=torch.long)}


def _pair(generator: torch.Generator) -> Embeddings:
    return _text(generator, "prompt_embeds", "negative_prompt_embeds")


def _video(latents: Tensor) -> Tensor:
    return latents[0].permute(1, 2, 3, 0)  # from [B, C, F, h, w]


TINY = {
    "CogVideoX": Tiny(_cogvideox, dict(height=256, width=256, num_frames=9), _pair, lambda x: x[0].permute(0, 2, 3, 1)),
    "Flux": Tiny(_flux, dict(height=384, width=384), _flux_text, lambda x: x.unflatten(1, (24, 24))),
    "HunyuanVideo": Tiny(_hunyuan_video, dict(height=256, width=256, num_frames=5), _hunyuan_video_text, _video),
    "HunyuanDiT": Tiny(_hunyuan_dit, dict(height=384, width=384), _hunyuan_dit_text, lambda x: x.permute(0, 2, 3, 1)),
    "LTX-Video": Tiny(
        _ltx, dict(height=384, width=384, num_frames=33), _ltx_text, lambda x: x[0].unflatten(0, (5, 12, 12))
    ),
    "QwenImage": Tiny(_qwen_image, dict(height=384, width=384), _qwen_image_text, lambda x: x.unflatten(1, (24, 24))),
    "Wan": Tiny(_wan, dict(height=224, width=224, num_frames=9), _pair, _video),
    "Wan2.2": Tiny(lambda: _wan(two=True), dict(height=224, width=224, num_frames=9), _pair, _video),
}
