"""The families of diffusers that the tests go through: a row each, around the tiny models of modify_model.cli."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modify_model.cli.tiny import TEXT, TINY

# Arguments of a forward that have no batch dimension.
SHARED = ("image_rotary_emb", "img_ids", "txt_ids", "num_frames", "height", "width", "rope_interpolation_scale")


def _no_more(batch: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        tiny: name of its tiny model.
        layers: paths of its self-attention layers, in order; ``plain`` are those without text.
        tokens: number of tokens that attend to each other (in layers with text).
        text: (start, stop) of the text among them, or None.
        timestep: what the model receives at a noise level (1 = pure noise).
        config: changes of the tiny model's config.
        wider, deeper, finer: changes that give it other heads, other layers, or another head dim.
        more: further arguments of its forward, for a batch size.
        by_sample: its processor calls attention once for each sample.
    """

    tiny: str
    layers: tuple[str, ...]
    tokens: int
    text: tuple[int, int] | None = None
    plain: tuple[str, ...] = ()
    timestep: Callable[[float], float] = lambda level: 1000 * level
    config: dict[str, Any] = field(default_factory=dict)
    wider: dict[str, Any] = field(default_factory=lambda: {"num_attention_heads": 4})
    deeper: dict[str, Any] = field(default_factory=lambda: {"num_layers": 6})
    finer: dict[str, Any] = field(default_factory=lambda: {"attention_head_dim": 32})
    more: Callable[[int], dict[str, Any]] = _no_more
    by_sample: bool = False

    def model(self, **changes: Any) -> nn.Module:
        """A model with random weights, the same every time."""
        return TINY[self.tiny].transformer(**(self.config | changes))

    def inputs(self, batch: int = 1, level: float = 0.5) -> dict[str, Any]:
        """Arguments of its forward at a noise level."""
        timestep = torch.full((batch,), self.timestep(level))
        return {**_inputs(self.tiny, batch), "timestep": timestep, **self.more(batch)}

    def row(self, inputs: dict[str, Any], index: int) -> dict[str, Any]:
        """One sample of a batch, as a batch of one."""
        return {name: value if name in SHARED else value[index : index + 1] for name, value in inputs.items()}

    def text_of(self, layer: str) -> tuple[int, int] | None:
        """(start, stop) of the text in a layer."""
        return None if layer in self.plain else self.text


@functools.cache
def _inputs(tiny: str, batch: int) -> dict[str, Any]:
    return TINY[tiny].inputs(batch)


def _image_prompt(batch: int) -> dict[str, Any]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    return {
        "encoder_hidden_states": randn(batch, 512, TEXT),
        "encoder_hidden_states_image": randn(batch, 20, TEXT),
    }


_WAN = ("blocks.0.attn1", "blocks.1.attn1")
_BOTH = ("transformer_blocks.0.attn", "transformer_blocks.1.attn")
_BOTH1 = ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1")
_DUAL = ("transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn")
_SINGLE = ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
_DIT = tuple(f"blocks.{i}.attn1" for i in range(4))

CASES = {
    "CogVideoX": Case("CogVideoX", _BOTH1, 32 + 768, text=(0, 32)),
    "Flux": Case("Flux", _SINGLE, 64 + 576, text=(0, 64), timestep=lambda level: level),
    "HunyuanVideo": Case("HunyuanVideo", _SINGLE, 512 + 64, text=(512, 576)),
    "HunyuanDiT": Case(
        "HunyuanDiT",
        _DIT,
        576,
        wider={"num_attention_heads": 4, "hidden_size": 256},
        finer={"attention_head_dim": 32, "hidden_size": 64},
    ),
    "LTX-Video": Case("LTX-Video", _BOTH1, 672),
    "Mochi": Case(
        "Mochi", _BOTH1, 768 + 32, text=(768, 800), timestep=lambda level: 1000 - 1000 * level, by_sample=True
    ),
    "QwenImage": Case("QwenImage", _BOTH, 64 + 576, text=(0, 64), timestep=lambda level: level),
    "SD3": Case(
        "SD3",
        _BOTH,
        576 + 32,
        text=(576, 608),
        wider={"num_attention_heads": 4, "caption_projection_dim": 256},
        finer={"attention_head_dim": 32, "caption_projection_dim": 64},
    ),
    "SD3.5": Case(
        "SD3.5",
        _DUAL,
        576 + 32,
        text=(576, 608),
        plain=("transformer_blocks.0.attn2",),
        wider={"num_attention_heads": 4, "caption_projection_dim": 256},
        finer={"attention_head_dim": 32, "caption_projection_dim": 64},
    ),
    "Wan": Case("Wan", _WAN, 588),
    "Wan I2V": Case("Wan", _WAN, 588, config={"image_dim": TEXT, "added_kv_proj_dim": 128}, more=_image_prompt),
}


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The output tensor of a model."""
    return model(**inputs, return_dict=False)[0]
