"""Cases of a denoising step: diffusion transformers as published, with random weights and inputs of real size."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import diffusers
import torch
from registry import CASES, Case
from steps import StepModel, StepSetup
from torch import Tensor, nn

from spas_attn.selectors import TopK

Inputs = dict[str, Any]
LAYERS = ("num_layers", "num_single_layers")


class Shape(NamedTuple):
    """What one sample is made of: latent ``frames`` x ``height`` x ``width`` with ``channels``, and ``text`` tokens."""

    frames: int
    height: int
    width: int
    channels: int
    text: int


@dataclass(frozen=True)
class StepCase(Case):
    """One transformer.

    Attributes:
        name, size: as the table shows them.
        class_name: of diffusers; its defaults are a published configuration.
        shape: of one sample.
        inputs: makes the arguments of a call.
        small: changes to the configuration, and the shape, for a trial on a CPU.
        changes: to the class's defaults, for another published configuration.
        fewer: numbers of layers that are benchmarked by default, where all of them would take too long.
        compiled: the model runs under torch.compile.
    """

    name: str
    size: str
    class_name: str
    shape: Shape
    inputs: Callable[[StepCase, Callable[..., Tensor]], Inputs]
    small: tuple[dict[str, Any], Shape]
    changes: dict[str, Any] = field(default_factory=dict)
    fewer: dict[str, int] = field(default_factory=dict)
    compiled: bool = False

    @property
    def title(self) -> str:
        return f"{self.name} {self.size}" + ", compiled" * self.compiled

    @property
    def config(self) -> dict[str, Any]:
        parameters = inspect.signature(getattr(diffusers, self.class_name).__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty} | self.changes

    def tiny(self) -> StepCase:
        changes, shape = self.small
        return replace(self, size="tiny", changes=self.changes | changes, shape=shape, fewer={})

    def layers(self, every_layer: bool) -> dict[str, int]:
        """Numbers of layers by their names in the configuration."""
        counts = {name: count for name, count in self.config.items() if name in LAYERS}
        return counts if every_layer else counts | self.fewer

    def layers_text(self, every_layer: bool) -> str:
        """Numbers of layers run, and of all where that is more: "2+4 of 20+40"."""
        run, every = ("+".join(map(str, self.layers(flag).values())) for flag in (every_layer, True))
        return run if run == every else f"{run} of {every}"

    def make(self, device: torch.device, dtype: torch.dtype, every_layer: bool) -> nn.Module:
        """The model with random weights, made on the device; what its class keeps in float32 is float32."""
        with contextlib.ExitStack() as stack, device:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            model = getattr(diffusers, self.class_name)(**(self.changes | self.layers(every_layer))).eval()
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

    def setups(self, device: torch.device, dtype: torch.dtype, options: Namespace) -> Iterator[StepSetup]:
        made = self.make(device, dtype, options.all_layers)
        model = StepModel(made, self.call(device, dtype), device, compiled=self.compiled)
        for blocks, density in itertools.product(options.blocks, options.densities):
            block_q, block_k = (int(size) for size in blocks.split("x"))
            selector = TopK(density, pool=min(options.pool, block_q, block_k), block_q=block_q, block_k=block_k)
            yield StepSetup(model, self.layers_text(options.all_layers), dtype, selector)


def _cogvideox(case: StepCase, randn: Callable[..., Tensor]) -> Inputs:
    s = case.shape
    hidden = randn(1, s.frames, s.channels, s.height, s.width)
    text = randn(1, s.text, case.config["text_embed_dim"])
    timestep = torch.full((1,), 500, device=hidden.device)
    return dict(hidden_states=hidden, encoder_hidden_states=text, timestep=timestep)


def _flux(case: StepCase, randn: Callable[..., Tensor]) -> Inputs:
    s = case.shape
    hidden = randn(1, s.height * s.width, s.channels)
    ids = torch.zeros(s.height, s.width, 3, device=hidden.device)
    ids[..., 1] = torch.arange(s.height, device=hidden.device)[:, None]
    ids[..., 2] = torch.arange(s.width, device=hidden.device)
    return dict(
        hidden_states=hidden,
        encoder_hidden_states=randn(1, s.text, case.config["joint_attention_dim"]),
        pooled_projections=randn(1, case.config["pooled_projection_dim"]),
        timestep=torch.full((1,), 0.5, device=hidden.device, dtype=hidden.dtype),
        guidance=torch.full((1,), 3.5, device=hidden.device),
        img_ids=ids.reshape(-1, 3).to(hidden.dtype),
        txt_ids=torch.zeros(s.text, 3, device=hidden.device, dtype=hidden.dtype),
    )


def _hunyuan_video(case: StepCase, randn: Callable[..., Tensor]) -> Inputs:
    s = case.shape
    hidden = randn(1, s.channels, s.frames, s.height, s.width)
    mask = torch.ones(1, s.text, device=hidden.device)
    mask[:, s.text // 4 :] = 0  # a prompt is shorter than what the model pads it to
    return dict(
        hidden_states=hidden,
        timestep=torch.full((1,), 500, device=hidden.device),
        encoder_hidden_states=randn(1, s.text, case.config["text_embed_dim"]),
        encoder_attention_mask=mask,
        pooled_projections=randn(1, case.config["pooled_projection_dim"]),
        guidance=torch.full((1,), 6000.0, device=hidden.device, dtype=hidden.dtype),
    )


def _wan(case: StepCase, randn: Callable[..., Tensor]) -> Inputs:
    s = case.shape
    hidden = randn(1, s.channels, s.frames, s.height, s.width)
    text = randn(1, s.text, case.config["text_dim"])
    return dict(hidden_states=hidden, timestep=torch.full((1,), 500, device=hidden.device), encoder_hidden_states=text)


_TINY_WAN = (
    dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=128, num_layers=2, text_dim=32),
    Shape(3, 28, 28, 16, 32),
)
MODELS = (
    StepCase(
        "CogVideoX-2B", "480x720x49", "CogVideoXTransformer3DModel", Shape(13, 60, 90, 16, 226), _cogvideox,
        (
            dict(num_attention_heads=2, num_layers=2, time_embed_dim=32, text_embed_dim=32, sample_width=32,
                 sample_height=32, sample_frames=9, max_text_seq_length=32),
            Shape(3, 32, 32, 16, 32),
        ),
    ),
    StepCase(
        "Wan2.1-1.3B", "480x832x81", "WanTransformer3DModel", Shape(21, 60, 104, 16, 512), _wan, _TINY_WAN,
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30),
    ),
    StepCase(
        "Wan2.1-14B", "720x1280x81", "WanTransformer3DModel", Shape(21, 90, 160, 16, 512), _wan, _TINY_WAN,
        fewer={"num_layers": 6},
    ),
    StepCase(
        "FLUX.1-dev", "1024x1024", "FluxTransformer2DModel", Shape(1, 64, 64, 64, 512), _flux,
        (
            dict(num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
                 joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 28, 28)),
            Shape(1, 24, 24, 64, 64),
        ),
        dict(guidance_embeds=True),
    ),
    StepCase(
        "HunyuanVideo", "720x1280x129", "HunyuanVideoTransformer3DModel", Shape(33, 90, 160, 16, 256), _hunyuan_video,
        (
            dict(num_attention_heads=2, attention_head_dim=64, num_layers=1, num_single_layers=1,
                 num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=(16, 24, 24)),
            Shape(2, 32, 32, 16, 64),
        ),
        fewer={"num_layers": 2, "num_single_layers": 4},
    ),
)  # fmt: skip
CASES["steps"].update({case.name: case for case in MODELS})
