"""What weights say about the model that they are of: its class and sizes, from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .dit import Hunyuan3DDiT
from .plain import HunYuanDiTPlain

State = Mapping[str, Tensor]
MODULES = ("model", "vae", "conditioner")  # the first component of the keys of a file
# What frameworks put before the names of the parameters.
_PREFIXES = ("_forward_module.", "module.", "diffusion_model.", "model.")


@dataclass(frozen=True)
class Published:
    """What is published of a model and cannot be read off its weights."""

    num_latents: int
    scale_factor: float


PUBLISHED = {
    "2.0": Published(3072, 0.9990943042622529),
    "2mini": Published(512, 1.0188137142395404),
    "2.1": Published(4096, 1.0039506158752403),
}


def split_modules(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The weights of denoiser, VAE and conditioner of one file, without what stands before their names.

    Args:
        state: flat keys with the module's name in front, the same nested, a training checkpoint (``state_dict``,
            ``_forward_module.``), or the keys of one module alone.

    Returns:
        By name of :data:`MODULES`; what is not there is left out.

    Raises:
        ValueError: when there is neither a denoiser nor a VAE in it.
    """
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": tensor for name, tensor in value.items()}
        elif isinstance(value, Tensor):
            flat[key.removeprefix("_forward_module.")] = value
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        first, _, rest = key.partition(".")
        if first in MODULES and rest:
            found.setdefault(first, {})[_bare(rest) if first == "model" else rest] = value
        else:
            name = (
                "vae"
                if key.startswith(("post_kl.", "geo_decoder.", "transformer.", "encoder.", "pre_kl."))
                else "model"
            )
            found.setdefault(name, {})[_bare(key) if name == "model" else key] = value
    if not ("model" in found and _is_denoiser(found["model"])) and "post_kl.weight" not in found.get("vae", {}):
        raise ValueError(
            "the weights are of no known shape model: neither latent_in.weight and cond_in.weight (Hunyuan3D 2.0), nor "
            f"x_embedder.weight and blocks.0.attn1.to_q.weight (2.1), nor post_kl.weight (a VAE); got {_some(flat)}"
        )
    return found


def denoiser_options(state: State) -> tuple[type[Any], dict[str, Any]]:
    """Class and constructor options of a denoiser, from its weights; a ValueError when they are of another network."""
    if "latent_in.weight" in state and "cond_in.weight" in state:
        hidden, channels = state["latent_in.weight"].shape
        dim = _one(state, "double_blocks.0.img_attn.norm.query_norm.scale").numel()
        return Hunyuan3DDiT, {
            "in_channels": channels,
            "context_in_dim": state["cond_in.weight"].shape[1],
            "hidden_size": hidden,
            "mlp_ratio": _one(state, "double_blocks.0.img_mlp.0.weight").shape[0] / hidden,
            "num_heads": hidden // dim,
            "depth": _count(state, "double_blocks"),
            "depth_single_blocks": _count(state, "single_blocks"),
            "qkv_bias": "double_blocks.0.img_attn.qkv.bias" in state,
            "guidance_embed": "guidance_in.in_layer.weight" in state,
        }
    if "x_embedder.weight" in state and "blocks.0.attn1.to_q.weight" in state:
        hidden, channels = state["x_embedder.weight"].shape
        depth = _count(state, "blocks")
        experts = [index for index in range(depth) if f"blocks.{index}.moe.gate.weight" in state]
        return HunYuanDiTPlain, {
            "in_channels": channels,
            "hidden_size": hidden,
            "context_dim": _one(state, "blocks.0.attn2.to_k.weight").shape[1],
            "depth": depth,
            "num_heads": hidden // _one(state, "blocks.0.attn1.q_norm.weight").numel(),
            "qkv_bias": "blocks.0.attn1.to_q.bias" in state,
            "num_moe_layers": len(experts),
            **({"num_experts": state[f"blocks.{experts[0]}.moe.gate.weight"].shape[0]} if experts else {}),
        }
    raise ValueError(f"the weights are of no known denoiser, got {_some(state)}")


def vae_options(state: State) -> dict[str, Any]:
    """Constructor options of a ShapeVAE, from its weights."""
    width, channels = _one(state, "post_kl.weight").shape
    inputs = _one(state, "geo_decoder.query_proj.weight").shape[1]
    return {
        "embed_dim": channels,
        "width": width,
        "heads": width // _one(state, "transformer.resblocks.0.attn.attention.q_norm.weight").numel(),
        "num_decoder_layers": _count(state, "transformer.resblocks"),
        "num_freqs": (inputs - 3) // 6,
        "qkv_bias": "transformer.resblocks.0.attn.c_qkv.bias" in state,
        "geo_decoder_mlp_expand_ratio": _one(state, "geo_decoder.cross_attn_decoder.mlp.c_fc.weight").shape[0] // width,
        "geo_decoder_ln_post": "geo_decoder.ln_post.weight" in state,
    }


def published(kind: type[Any], options: Mapping[str, Any]) -> Published:
    """What is published of the model whose denoiser has this class and options."""
    if kind is HunYuanDiTPlain:
        return PUBLISHED["2.1"]
    return PUBLISHED["2mini" if options["depth"] == 8 else "2.0"]


def _is_denoiser(state: State) -> bool:
    return "latent_in.weight" in state or "x_embedder.weight" in state


def _bare(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _one(state: State, name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the weights lack {name}, which tells a size of the model")
    return state[name]


def _count(state: State, name: str) -> int:
    """How many blocks there are of a list, by their indices."""
    depth = name.count(".") + 1
    return 1 + max((int(key.split(".")[depth]) for key in state if key.startswith(f"{name}.")), default=-1)


def _some(state: Mapping[str, Any]) -> str:
    return f"{len(state)} tensors" + "".join(f", {key}" for key in list(state)[:3])
