"""The transformers of benchmark_steps.py: published configurations, random weights, and inputs of real size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What one sample is made of: latent ``frames`` x ``height`` x ``width`` with ``channels``, and ``text`` tokens."""

    frames: int
    height: int
    width: int
    channels: int
    text: int


@dataclass(frozen=True)
class StepModel:
    """One transformer.

    Attributes:
        name: as the table shows it, with the resolution.
        class_name: of diffusers.
        config: as published (config.json of the transformer on the hub); what it leaves out is the class's default.
        shape: of one sample.
        inputs: makes the arguments of a call.
        fewer: numbers of layers that are benchmarked by default, where all of them would take too long.
        tiny: changes to the configuration, and the shape, for a trial on a processor.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    shape: Shape
    inputs: Callable[[StepModel, Callable[..., Tensor]], Inputs]
    fewer: dict[str, int]
    tiny: tuple[dict[str, Any], Shape]

    def small(self) -> StepModel:
        """The same with a small configuration and a short sequence."""
        config, shape = self.tiny
        return replace(self, name=f"{self.name.split()[0]} tiny", config=self.config | config, shape=shape, fewer={})

    def layers(self, everything: bool) -> dict[str, int]:
        """Numbers of layers by their names in the configuration."""
        counts: dict[str, int] = {
            name: self.config[name] for name in ("num_layers", "num_single_layers") if name in self.config
        }
        return counts if everything else counts | self.fewer

    def make(self, device: torch.device, dtype: torch.dtype, everything: bool) -> nn.Module:
        """The model with random weights, made on the device; what its class keeps in float32 is float32."""
        with default_dtype(dtype), device:
            model = getattr(diffusers, self.class_name)(**(self.config | self.layers(everything))).eval()
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model

    def call(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Random arguments of one call, a batch of one sample."""
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        return self.inputs(self, randn)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new parameters of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _cogvideox(model: StepModel, randn: Callable[..., Tensor]) -> Inputs:
    s = model.shape
    hidden = randn(1, s.frames, s.channels, s.height, s.width)
    text = randn(1, s.text, model.config["text_embed_dim"])
    timestep = torch.full((1,), 500, device=hidden.device)
    return dict(hidden_states=hidden, encoder_hidden_states=text, timestep=timestep)


def _flux(model: StepModel, randn: Callable[..., Tensor]) -> Inputs:
    s = model.shape
    hidden = randn(1, s.height * s.width, s.channels)
    ids = torch.zeros(s.height, s.width, 3, device=hidden.device)
    ids[..., 1] = torch.arange(s.height, device=hidden.device)[:, None]
    ids[..., 2] = torch.arange(s.width, device=hidden.device)
    return dict(
        hidden_states=hidden,
        encoder_hidden_states=randn(1, s.text, model.config["joint_attention_dim"]),
        pooled_projections=randn(1, model.config["pooled_projection_dim"]),
        timestep=torch.full((1,), 0.5, device=hidden.device, dtype=hidden.dtype),
        guidance=torch.full((1,), 3.5, device=hidden.device),
        img_ids=ids.reshape(-1, 3).to(hidden.dtype),
        txt_ids=torch.zeros(s.text, 3, device=hidden.device, dtype=hidden.dtype),
    )


def _hunyuan_video(model: StepModel, randn: Callable[..., Tensor]) -> Inputs:
    s = model.shape
    hidden = randn(1, s.channels, s.frames, s.height, s.width)
    mask = torch.ones(1, s.text, device=hidden.device)
    mask[:, s.text // 4 :] = 0  # a prompt is shorter than what the model pads it to
    return dict(
        hidden_states=hidden,
        timestep=torch.full((1,), 500, device=hidden.device),
        encoder_hidden_states=randn(1, s.text, model.config["text_embed_dim"]),
        encoder_attention_mask=mask,
        pooled_projections=randn(1, model.config["pooled_projection_dim"]),
        guidance=torch.full((1,), 6000.0, device=hidden.device, dtype=hidden.dtype),
    )


def _wan(model: StepModel, randn: Callable[..., Tensor]) -> Inputs:
    s = model.shape
    hidden = randn(1, s.channels, s.frames, s.height, s.width)
    text = randn(1, s.text, model.config["text_dim"])
    return dict(hidden_states=hidden, timestep=torch.full((1,), 500, device=hidden.device), encoder_hidden_states=text)


def _wan_config(heads: int, ffn: int, layers: int) -> dict[str, Any]:
    return dict(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=4096, freq_dim=256, ffn_dim=ffn, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    )  # fmt: skip


_TINY_WAN = (
    dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=128, num_layers=2, text_dim=32),
    Shape(3, 28, 28, 16, 32),
)

MODELS = {
    "CogVideoX-2B": StepModel(
        "CogVideoX-2B 480x720x49", "CogVideoXTransformer3DModel",
        dict(
            num_attention_heads=30, attention_head_dim=64, in_channels=16, out_channels=16, time_embed_dim=512,
            text_embed_dim=4096, num_layers=30, sample_width=90, sample_height=60, sample_frames=49, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=226, activation_fn="gelu-approximate",
            spatial_interpolation_scale=1.875, temporal_interpolation_scale=1.0,
            use_rotary_positional_embeddings=False,
        ),
        Shape(13, 60, 90, 16, 226), _cogvideox, {},
        (
            dict(num_attention_heads=2, num_layers=2, time_embed_dim=32, text_embed_dim=32, sample_width=32,
                 sample_height=32, sample_frames=9, max_text_seq_length=32),
            Shape(3, 32, 32, 16, 32),
        ),
    ),
    "Wan2.1-1.3B": StepModel(
        "Wan2.1-1.3B 480x832x81", "WanTransformer3DModel", _wan_config(12, 8960, 30), Shape(21, 60, 104, 16, 512),
        _wan, {}, _TINY_WAN,
    ),
    "Wan2.1-14B": StepModel(
        "Wan2.1-14B 720x1280x81", "WanTransformer3DModel", _wan_config(40, 13824, 40), Shape(21, 90, 160, 16, 512),
        _wan, {"num_layers": 6}, _TINY_WAN,
    ),
    "FLUX.1-dev": StepModel(
        "FLUX.1-dev 1024x1024", "FluxTransformer2DModel",
        dict(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        Shape(1, 64, 64, 64, 512), _flux, {},
        (
            dict(num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
                 joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 28, 28)),
            Shape(1, 24, 24, 64, 64),
        ),
    ),
    "HunyuanVideo": StepModel(
        "HunyuanVideo 720x1280x129", "HunyuanVideoTransformer3DModel",
        dict(
            in_channels=16, out_channels=16, num_attention_heads=24, attention_head_dim=128, num_layers=20,
            num_single_layers=40, num_refiner_layers=2, mlp_ratio=4.0, patch_size=2, patch_size_t=1,
            qk_norm="rms_norm", guidance_embeds=True, text_embed_dim=4096, pooled_projection_dim=768, rope_theta=256.0,
            rope_axes_dim=(16, 56, 56),
        ),
        Shape(33, 90, 160, 16, 256), _hunyuan_video, {"num_layers": 2, "num_single_layers": 4},
        (
            dict(num_attention_heads=2, attention_head_dim=64, num_layers=1, num_single_layers=1,
                 num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(16, 24, 24)),
            Shape(2, 32, 32, 16, 64),
        ),
    ),
}  # fmt: skip
