"""Small models with random weights: ``--model_name tiny:<family>`` tries a command without a download; tests use them.

They are the real transformers and pipelines of diffusers (and a LLaMA of transformers) with a few hundred tokens. Text
encoders and VAEs are left out: prompts become random embeddings, and what is shown are latents. The pictures are noise.
"""

from __future__ import annotations

import contextlib
import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "tiny:"
LLAMA = "Llama"
TEXT = 32  # width of the text embeddings
_HEADS = dict(num_attention_heads=2, attention_head_dim=64)
_PEAKED = ("to_q.weight", "to_k.weight", "norm_q.weight", "add_q_proj.weight")


class _Caught(Exception):
    """The pipeline has called its transformer; nothing more is needed."""


@dataclass(frozen=True)
class Tiny:
    """One small family.

    Attributes:
        model, pipeline: names of the classes in diffusers.
        config: of the model, beside two heads of 64.
        scheduler: name and options of the pipeline's scheduler.
        size: arguments of the pipeline's call: height, width and for videos num_frames.
        text: arguments of the call that stand for a prompt; masks and pooled embeddings are known by their names.
        frames: turns the latents that the pipeline returns into ``[F, h, w, C]``.
        tokens: of the text; ``padded`` of them are padding in the first row where there is a mask.
        mask: dtype of the masks.
        options: further arguments of the pipeline class, ``call`` of its call.
        second: whether there is a ``transformer_2``.
    """

    model: str
    pipeline: str
    config: dict[str, Any]
    scheduler: tuple[str, dict[str, Any]]
    size: dict[str, int]
    text: tuple[str, ...]
    frames: Callable[[Tensor], Tensor]
    tokens: int = 32
    padded: int = 0
    mask: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    second: bool = False

    def transformer(self, seed: int = 0, **changes: Any) -> nn.Module:
        """The model with random weights; keyword arguments change its config."""
        torch.manual_seed(seed)
        model = getattr(_diffusers(), self.model)(**(_HEADS | self.config | changes)).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith(_PEAKED):  # peaked attention, so that blocks matter
                    parameter.mul_(3)
                elif "proj_out" in path or "norm_out" in path:
                    parameter.normal_(0, 0.1)  # some models start with zeros at the end
        return model

    def make(self, dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline, without progress bar, with weights of a dtype where ``from_pretrained`` would have it."""
        kind = getattr(_diffusers(), self.pipeline)
        name, options = self.scheduler
        parts = dict(transformer=self.transformer(), scheduler=getattr(_diffusers(), name)(**options), **self.options)
        if self.second:
            parts["transformer_2"] = self.transformer(seed=1)
        needed = [p.name for p in inspect.signature(kind.__init__).parameters.values() if p.default is p.empty]
        pipe = kind(**(dict.fromkeys(needed[1:]) | parts))
        pipe.set_progress_bar_config(disable=True)
        for part in [pipe.transformer, pipe.transformer_2] if self.second else [pipe.transformer]:
            for path, parameter in part.named_parameters():
                if {*(part._keep_in_fp32_modules or ())}.isdisjoint(path.split(".")):
                    parameter.data = parameter.data.to(dtype)
        return pipe

    def arguments(self, prompt: str, dtype: torch.dtype = torch.float32, batch: int = 1) -> dict[str, Any]:
        """What the pipeline's call gets for a prompt; the same prompt gives the same."""
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        found: dict[str, Any] = dict(self.call)
        for name in self.text:
            if "mask" in name:
                found[name] = torch.ones(batch, self.tokens, dtype=self.mask)
                found[name][0, self.tokens - self.padded :] = 0
            else:
                shape = (batch, TEXT) if "pooled" in name else (batch, self.tokens, TEXT)
                found[name] = torch.randn(shape, generator=generator).to(dtype)
        return found

    def inputs(self, batch: int = 1) -> dict[str, Any]:
        """Arguments of the transformer's forward: those of the first call of the pipeline, without guidance."""
        pipe = self.make()
        caught: dict[str, Any] = {}

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.update(zip(inspect.signature(pipe.transformer.forward).parameters, args, strict=False), **kwargs)
            raise _Caught

        pipe.transformer.register_forward_pre_hook(catch, with_kwargs=True)
        text = {name: x for name, x in self.arguments("inputs", batch=batch).items() if not name.startswith("negative")}
        generator = torch.Generator().manual_seed(0)
        with contextlib.suppress(_Caught), torch.no_grad():
            pipe(**text, **self.size, num_inference_steps=4, guidance_scale=1.0, generator=generator)
        return {
            name: x
            for name, x in caught.items()
            if x is not None and not name.endswith(("return_dict", "attention_kwargs"))
        }

    def show(self, latents: Tensor) -> Tensor:
        """Three channels of latents as frames ``[F, h, w, 3]`` in 0..1."""
        return torch.sigmoid(self.frames(latents)[..., :3].float().cpu())


def _diffusers() -> Any:
    import diffusers  # here, so that a tiny LLaMA does not need it

    return diffusers


def llama(attention: str = "sdpa", **changes: Any) -> Any:
    """A LLaMA of transformers with 2 layers, 4 query heads of 32 and 2 key/value heads, that reads bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(_LLAMA | changes))
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def tokenizer() -> Any:
    """The tokenizer of the tiny LLaMA: one token for each byte."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=0)


# Weights far larger than usual, so that attention is peaked and tokens depend on it.
_LLAMA = dict(
    hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=259, max_position_embeddings=4096, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    pad_token_id=0,
)  # fmt: skip
_PAIR = ("prompt_embeds", "negative_prompt_embeds")
_POOLED = (*_PAIR, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")
_FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
_MOVING = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})
_UNIPC = ("UniPCMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
_SD3 = dict(
    sample_size=48, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=TEXT,
    caption_projection_dim=128, pooled_projection_dim=TEXT, pos_embed_max_size=24,
)  # fmt: skip
_WAN = dict(
    patch_size=(1, 2, 2), in_channels=16, out_channels=16, text_dim=TEXT, freq_dim=256, ffn_dim=128, num_layers=2,
    cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
)  # fmt: skip


def _picture(latents: Tensor) -> Tensor:
    return latents.permute(0, 2, 3, 1)  # from [B, C, h, w]


def _square(latents: Tensor) -> Tensor:
    return latents.unflatten(1, (24, 24))  # from [B, h · w, C]


def _video(latents: Tensor) -> Tensor:
    return latents[0].permute(1, 2, 3, 0)  # from [B, C, F, h, w]


TINY = {
    "CogVideoX": Tiny(
        "CogVideoXTransformer3DModel", "CogVideoXPipeline",
        dict(in_channels=4, out_channels=4, time_embed_dim=32, text_embed_dim=TEXT, num_layers=2, sample_width=32,
             sample_height=32, sample_frames=9, patch_size=2, patch_size_t=None, temporal_compression_ratio=4,
             max_text_seq_length=32, use_rotary_positional_embeddings=True),
        ("CogVideoXDDIMScheduler", {}), dict(height=256, width=256, num_frames=9), _PAIR,
        lambda latents: latents[0].permute(0, 2, 3, 1),
    ),
    "Flux": Tiny(
        "FluxTransformer2DModel", "FluxPipeline",
        dict(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=TEXT,
             pooled_projection_dim=TEXT, guidance_embeds=True, axes_dims_rope=(8, 28, 28)),
        _MOVING, dict(height=384, width=384), ("prompt_embeds", "pooled_prompt_embeds"), _square, tokens=64,
    ),
    "HunyuanDiT": Tiny(
        "HunyuanDiT2DModel", "HunyuanDiTPipeline",
        dict(sample_size=48, patch_size=2, in_channels=4, num_layers=4, hidden_size=128, cross_attention_dim=TEXT,
             cross_attention_dim_t5=TEXT, pooled_projection_dim=TEXT, text_len=32, text_len_t5=32,
             activation_fn="gelu-approximate"),
        ("DDPMScheduler", {}), dict(height=384, width=384),
        (*_PAIR, *_MASKS, *(f"{name}_2" for name in (*_PAIR, *_MASKS))), _picture,
        options={"requires_safety_checker": False}, call={"use_resolution_binning": False},
    ),
    "HunyuanVideo": Tiny(
        "HunyuanVideoTransformer3DModel", "HunyuanVideoPipeline",
        dict(in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2,
             patch_size_t=1, guidance_embeds=True, text_embed_dim=TEXT, pooled_projection_dim=TEXT,
             rope_axes_dim=(16, 24, 24)),
        _FLOW, dict(height=256, width=256, num_frames=5),
        ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"), _video, tokens=64, padded=16,
    ),
    "LTX-Video": Tiny(
        "LTXVideoTransformer3DModel", "LTXPipeline",
        dict(in_channels=8, out_channels=8, cross_attention_dim=128, num_layers=2, caption_channels=TEXT),
        _FLOW, dict(height=448, width=512, num_frames=17), (*_PAIR, *_MASKS),
        lambda latents: latents[0].unflatten(0, (3, 14, 16)), mask=torch.bool,
    ),
    "Mochi": Tiny(
        "MochiTransformer3DModel", "MochiPipeline",
        dict(patch_size=2, num_layers=2, pooled_projection_dim=64, in_channels=4, text_embed_dim=TEXT,
             time_embed_dim=32, max_sequence_length=32),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}), dict(height=256, width=256, num_frames=13),
        (*_PAIR, *_MASKS), _video, padded=8, mask=torch.bool,
    ),
    "QwenImage": Tiny(
        "QwenImageTransformer2DModel", "QwenImagePipeline",
        dict(patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=TEXT,
             axes_dims_rope=(16, 24, 24)),
        _FLOW, dict(height=384, width=384), ("prompt_embeds", "prompt_embeds_mask"), _square, tokens=64, padded=16,
        mask=torch.bool,
    ),
    "SD3": Tiny(
        "SD3Transformer2DModel", "StableDiffusion3Pipeline", _SD3, _FLOW, dict(height=384, width=384), _POOLED, _picture
    ),
    "SD3.5": Tiny(
        "SD3Transformer2DModel", "StableDiffusion3Pipeline",
        _SD3 | dict(dual_attention_layers=(0,), qk_norm="rms_norm"), _FLOW, dict(height=384, width=384), _POOLED,
        _picture,
    ),
    "Wan": Tiny(
        "WanTransformer3DModel", "WanPipeline", _WAN, _UNIPC, dict(height=224, width=224, num_frames=9), _PAIR, _video
    ),
    "Wan2.2": Tiny(
        "WanTransformer3DModel", "WanPipeline", _WAN, _UNIPC, dict(height=224, width=224, num_frames=9), _PAIR, _video,
        options={"boundary_ratio": 0.875}, second=True,
    ),
}  # fmt: skip
