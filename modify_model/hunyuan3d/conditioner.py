"""Image tokens: the DINOv2 encoder that lies in a shape model's file, run by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "main_image_encoder.model."
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained with


class ImageConditioner(nn.Module):
    """DINOv2 over pictures on a white ground; at 518 pixels it gives 1370 tokens."""

    def __init__(self, encoder: nn.Module, size: int) -> None:
        super().__init__()
        self.encoder, self.size = encoder, size

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures ``[B, 3 or 4, h, w]`` in 0..1 (the fourth channel is opacity) to tokens ``[B, Lc, context_dim]``."""
        if pictures.dim() != 4 or pictures.shape[1] not in (3, 4):
            raise ValueError(f"pictures must be [B, 3 or 4, h, w], got {list(pictures.shape)}")
        weight = next(self.encoder.parameters())
        x = pictures.to(weight.device, torch.float32)
        if x.shape[1] == 4:
            x = x[:, :3] * x[:, 3:] + (1 - x[:, 3:])
        side = max(x.shape[-2:])
        across, down = side - x.shape[-1], side - x.shape[-2]
        x = nn.functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2), value=1.0)
        x = nn.functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
        return self.encoder(((x - mean) / std).to(weight.dtype)).last_hidden_state


def conditioner_of(state: Mapping[str, Tensor]) -> ImageConditioner:
    """The conditioner of its weights, whose names are those of transformers' Dinov2Model.

    Raises:
        ImportError: without transformers.
        ValueError: on weights of another encoder.
    """
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise ImportError("the image encoder needs transformers: pip install transformers") from error
    weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    positions = weights.get("embeddings.position_embeddings")
    patches = weights.get("embeddings.patch_embeddings.projection.weight")
    if positions is None or patches is None:
        raise ValueError(f"the conditioner is no DINOv2 encoder: no {PREFIX}embeddings in it")
    hidden, patch = positions.shape[-1], patches.shape[-1]
    size = patch * round((positions.shape[1] - 1) ** 0.5)
    gated = "encoder.layer.0.mlp.weights_in.weight" in weights
    options: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layer.")),
        "image_size": size,
        "patch_size": patch,
        "use_swiglu_ffn": gated,
    }
    encoder = Dinov2Model(Dinov2Config(**options))
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the conditioner's weights do not fit a DINOv2 encoder: {error}") from error
    return ImageConditioner(encoder, size)
