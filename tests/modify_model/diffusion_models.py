"""Small random-weight models of diffusers, with inputs long enough for several blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_3d_rotary_pos_embed
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One family: how to make a model and its inputs.

    Attributes:
        model: makes a model; keyword arguments change its config.
        inputs: makes the arguments of its forward for a batch size.
        layers: paths of its self-attention layers, in order.
        text: (start, stop) of the text among the attention's tokens, or None.
        tokens: number of tokens that attend to each other.
        full_noise: the timestep of pure noise.
        wider, deeper, finer: changes of the config that give it other heads, other layers, or another head dim.
        shared: names of inputs that have no batch dimension.
    """

    model: Callable[..., nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    layers: tuple[str, ...]
    text: tuple[int, int] | None
    tokens: int
    full_noise: float = 1000.0
    wider: dict[str, int] = field(default_factory=lambda: {"num_attention_heads": 4})
    deeper: dict[str, int] = field(default_factory=lambda: {"num_layers": 6})
    finer: dict[str, int] = field(default_factory=lambda: {"attention_head_dim": 32})
    shared: tuple[str, ...] = ("image_rotary_emb", "img_ids", "txt_ids", "num_frames", "height", "width")

    def row(self, inputs: dict[str, Any], index: int) -> dict[str, Any]:
        """One sample of a batch, as a batch of one."""
        return {name: value if name in self.shared else value[index : index + 1] for name, value in inputs.items()}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _maker(name: str, **config: Any) -> Callable[..., nn.Module]:
    def make(**changes: Any) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**(config | changes)).eval()
        with torch.no_grad():  # peaked attention, so that blocks matter
            for path, parameter in model.named_parameters():
                if path.endswith(("to_q.weight", "to_k.weight", "norm_q.weight", "add_q_proj.weight")):
                    parameter.mul_(3)
                elif "proj_out" in path or "norm_out" in path:
                    parameter.normal_(0, 0.1)  # some models start with zeros at the end
        return model

    return make


def _cogvideo(batch: int) -> dict[str, Any]:
    rope = get_3d_rotary_pos_embed(
        embed_dim=64, crops_coords=((0, 0), (16, 16)), grid_size=(16, 16), temporal_size=3, device="cpu"
    )
    return dict(
        hidden_states=_randn(batch, 3, 4, 32, 32),
        encoder_hidden_states=_randn(batch, 32, 32),
        timestep=torch.full((batch,), 500),
        image_rotary_emb=rope,
    )


def _flux(batch: int) -> dict[str, Any]:
    ids = torch.zeros(24, 24, 3)
    ids[..., 1], ids[..., 2] = torch.arange(24)[:, None], torch.arange(24)[None]
    return dict(
        hidden_states=_randn(batch, 576, 16),
        encoder_hidden_states=_randn(batch, 64, 32),
        pooled_projections=_randn(batch, 32),
        timestep=torch.full((batch,), 0.5),
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(64, 3),
    )


def _hunyuan_video(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 64)
    mask[0, 48:] = 0
    return dict(
        hidden_states=_randn(batch, 4, 2, 32, 32),
        encoder_hidden_states=_randn(batch, 64, 32),
        pooled_projections=_randn(batch, 16),
        timestep=torch.full((batch,), 500),
        encoder_attention_mask=mask,
        guidance=torch.full((batch,), 6000.0),
    )


def _hunyuan_dit(batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=_randn(batch, 4, 48, 48),
        encoder_hidden_states=_randn(batch, 32, 32),
        text_embedding_mask=torch.ones(batch, 32),
        encoder_hidden_states_t5=_randn(batch, 32, 32) * 0.5,
        text_embedding_mask_t5=torch.ones(batch, 32),
        timestep=torch.full((batch,), 500.0),
        image_meta_size=torch.tensor([[1024.0, 1024.0, 1024.0, 1024.0, 0.0, 0.0]] * batch),
        style=torch.zeros(batch, dtype=torch.long),
        image_rotary_emb=get_2d_rotary_pos_embed(64, ((0, 0), (24, 24)), (24, 24), output_type="pt"),
    )


def _wan(batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=_randn(batch, 4, 3, 28, 28),
        encoder_hidden_states=_randn(batch, 32, 32),
        timestep=torch.full((batch,), 500),
    )


def _wan_image(batch: int) -> dict[str, Any]:
    return _wan(batch) | dict(
        encoder_hidden_states=_randn(batch, 512, 32), encoder_hidden_states_image=_randn(batch, 20, 32)
    )


def _ltx(batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=_randn(batch, 3 * 14 * 16, 8),
        encoder_hidden_states=_randn(batch, 32, 32),
        timestep=torch.full((batch,), 500),
        encoder_attention_mask=torch.ones(batch, 32),
        num_frames=3,
        height=14,
        width=16,
    )


def _qwen_image(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 64, dtype=torch.bool)
    mask[0, 48:] = False
    return dict(
        hidden_states=_randn(batch, 576, 16),
        encoder_hidden_states=_randn(batch, 64, 32),
        encoder_hidden_states_mask=mask,
        timestep=torch.full((batch,), 0.5),
        img_shapes=[[(1, 24, 24)]] * batch,
    )


_WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=64,
    in_channels=4,
    out_channels=4,
    text_dim=32,
    freq_dim=256,
    ffn_dim=128,
    num_layers=2,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    rope_max_seq_len=64,
)

CASES = {
    "CogVideoX": Case(
        _maker(
            "CogVideoXTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=64,
            in_channels=4,
            out_channels=4,
            time_embed_dim=32,
            text_embed_dim=32,
            num_layers=2,
            sample_width=32,
            sample_height=32,
            sample_frames=9,
            patch_size=2,
            patch_size_t=None,
            temporal_compression_ratio=4,
            max_text_seq_length=32,
            use_rotary_positional_embeddings=True,
        ),
        _cogvideo,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        text=(0, 32),
        tokens=32 + 768,
    ),
    "Flux": Case(
        _maker(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        ),
        _flux,
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        text=(0, 64),
        tokens=64 + 576,
        full_noise=1.0,
    ),
    "HunyuanVideo": Case(
        _maker(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=64,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=32,
            pooled_projection_dim=16,
            rope_axes_dim=(16, 24, 24),
        ),
        _hunyuan_video,
        ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
        text=(512, 576),
        tokens=512 + 64,
    ),
    "HunyuanDiT": Case(
        _maker(
            "HunyuanDiT2DModel",
            sample_size=48,
            patch_size=2,
            in_channels=4,
            num_layers=4,
            attention_head_dim=64,
            num_attention_heads=2,
            hidden_size=128,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=32,
            text_len=32,
            text_len_t5=32,
            activation_fn="gelu-approximate",
        ),
        _hunyuan_dit,
        tuple(f"blocks.{i}.attn1" for i in range(4)),
        text=None,
        tokens=576,
        wider={"num_attention_heads": 4, "hidden_size": 256},
        finer={"attention_head_dim": 32, "hidden_size": 64},
    ),
    "LTX-Video": Case(
        _maker(
            "LTXVideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=64,
            cross_attention_dim=128,
            num_layers=2,
            caption_channels=32,
        ),
        _ltx,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        text=None,
        tokens=672,
    ),
    "QwenImage": Case(
        _maker(
            "QwenImageTransformer2DModel",
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(16, 24, 24),
        ),
        _qwen_image,
        ("transformer_blocks.0.attn", "transformer_blocks.1.attn"),
        text=(0, 64),
        tokens=64 + 576,
        full_noise=1.0,
    ),
    "Wan": Case(
        _maker("WanTransformer3DModel", **_WAN), _wan, ("blocks.0.attn1", "blocks.1.attn1"), text=None, tokens=588
    ),
    "Wan I2V": Case(
        _maker("WanTransformer3DModel", **_WAN, image_dim=32, added_kv_proj_dim=128),
        _wan_image,
        ("blocks.0.attn1", "blocks.1.attn1"),
        text=None,
        tokens=588,
    ),
}
