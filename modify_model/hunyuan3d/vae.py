"""ShapeVAE: from latents of the denoiser to a field whose zero level is the surface; the decoder only.

Self-attention over the latents, then cross-attention from points in space. Written from the published facts; names of
parameters are those of the published weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CROSS_SWITCH, Checked, Engine, attend, chosen_engine, joined, report_ignored
from .embeddings import fourier

EPS = 1e-6


class HeadNorms(nn.Module):
    """Layer norms of queries and keys over the head dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)


class SelfAttention(nn.Module):
    """``[B, L, width]`` to the same; the projection holds q, k and v of head 0, and so on."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = HeadNorms(width // heads)

    def forward(self, x: Tensor, engine: Engine) -> Tensor:
        q, k, v = self.c_qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        return self.c_proj(joined(attend(self.attention.q_norm(q), self.attention.k_norm(k), v, engine)))


class CrossAttention(nn.Module):
    """Attention from points to latents; ``c_kv`` holds k and v of head 0, then of head 1, and so on."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_q = nn.Linear(width, width, bias=qkv_bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = HeadNorms(width // heads)

    def keys(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, L, D]`` of latents ``[B, L, width]``."""
        k, v = self.c_kv(data).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(2, dim=-1)
        return self.attention.k_norm(k), v

    def queries(self, x: Tensor) -> Tensor:
        """Queries ``[B, H, N, D]`` of points ``[B, N, width]``."""
        return self.attention.q_norm(self.c_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2))


class MLP(nn.Module):
    """Two layers with an exact GELU between."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualBlock(nn.Module):
    """Self-attention and MLP over the latents."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, qkv_bias)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, engine: Engine) -> Tensor:
        x = x + self.attn(self.ln_1(x), engine)
        return x + self.mlp(self.ln_2(x))


class ResidualCrossBlock(nn.Module):
    """Cross-attention from points to latents, and MLP."""

    def __init__(self, width: int, heads: int, qkv_bias: bool, mlp_ratio: int) -> None:
        super().__init__()
        self.attn = CrossAttention(width, heads, qkv_bias)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(width, eps=EPS) for _ in range(3))
        self.mlp = MLP(width, mlp_ratio)


class Transformer(nn.Module):
    """The self-attention blocks."""

    def __init__(self, width: int, heads: int, layers: int, qkv_bias: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads, qkv_bias) for _ in range(layers))


class GeometryDecoder(nn.Module):
    """The field at points in space, from decoded latents; in three parts, so that keys are computed once."""

    def __init__(self, width: int, heads: int, num_freqs: int, qkv_bias: bool, mlp_ratio: int, ln_post: bool) -> None:
        super().__init__()
        self.num_freqs = num_freqs
        self.query_proj = nn.Linear(3 + 6 * num_freqs, width)
        self.cross_attn_decoder = ResidualCrossBlock(width, heads, qkv_bias, mlp_ratio)
        self.ln_post = nn.LayerNorm(width) if ln_post else None
        self.output_proj = nn.Linear(width, 1)

    def keys(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, L, D]`` of decoded latents ``[B, L, width]``."""
        block = self.cross_attn_decoder
        return block.attn.keys(block.ln_2(latents))

    def queries(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points ``[B, N, 3]`` embedded, ``[B, N, width]``, and their queries ``[B, H, N, D]``."""
        block = self.cross_attn_decoder
        # Embedded in float32: neighbouring points of a fine grid are one number in half precision.
        x = self.query_proj(fourier(points, self.num_freqs).to(self.query_proj.weight.dtype))
        return x, block.attn.queries(block.ln_1(x))

    def field(self, x: Tensor, attended: Tensor) -> Tensor:
        """The field ``[B, N]`` from embedded points and their attention ``[B, H, N, D]``; positive inside."""
        block = self.cross_attn_decoder
        x = x + block.attn.c_proj(joined(attended))
        x = x + block.mlp(block.ln_3(x))
        return self.output_proj(x if self.ln_post is None else self.ln_post(x))[..., 0]


class ShapeVAE(Checked):
    """Decoder of the shape models' autoencoder.

    Args:
        num_latents, embed_dim: latents of a shape and their channels, 3072 and 64.
        width, heads, num_decoder_layers: 1024, 16 and 16.
        num_freqs: frequencies of the points' embedding, 8.
        qkv_bias: of the projections of attention.
        geo_decoder_mlp_expand_ratio, geo_decoder_ln_post: of the cross-attention from points.
        scale_factor: latents are divided by it before they are decoded.
        engine, cross_engine: "sdpa", "sage" or "int8" for the self-attention and the cross-attention from points; None
            reads ``USE_SAGEATTN`` and ``CA_USE_SAGEATTN``.
        ignored: further options of published configurations (of the encoder); unknown ones are logged.
    """

    def __init__(
        self,
        num_latents: int = 3072,
        embed_dim: int = 64,
        width: int = 1024,
        heads: int = 16,
        num_decoder_layers: int = 16,
        num_freqs: int = 8,
        qkv_bias: bool = False,
        geo_decoder_mlp_expand_ratio: int = 4,
        geo_decoder_ln_post: bool = True,
        scale_factor: float = 1.0,
        *,
        engine: str | None = None,
        cross_engine: str | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads ({heads}), got {width}")
        if ignored.get("qk_norm", True) is not True or ignored.get("include_pi", False) is not False:
            raise ValueError("qk_norm must be True and include_pi False, as in the published models")
        report_ignored("ShapeVAE", ignored, ("qk_norm", "include_pi", "label_type", "drop_path_rate", "ckpt_path"))
        self.num_latents, self.embed_dim, self.scale_factor = num_latents, embed_dim, scale_factor
        self.engine, self.cross_engine = chosen_engine(engine), chosen_engine(cross_engine, CROSS_SWITCH)
        self.post_kl = nn.Linear(embed_dim, width)
        self.transformer = Transformer(width, heads, num_decoder_layers, qkv_bias)
        self.geo_decoder = GeometryDecoder(
            width, heads, num_freqs, qkv_bias, geo_decoder_mlp_expand_ratio, geo_decoder_ln_post
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Decoded latents ``[B, L, width]`` from those of the denoiser ``[B, L, embed_dim]``."""
        if latents.dim() != 3 or latents.shape[-1] != self.post_kl.in_features:
            raise ValueError(f"latents must be [B, L, {self.post_kl.in_features}], got {list(latents.shape)}")
        first = self.post_kl((latents / self.scale_factor).to(self.post_kl.weight.dtype))

        def run(engine: Engine) -> Tensor:
            x = first
            for block in self.transformer.resblocks:
                x = block(x, engine)
            return x

        return self.checked(run)


def grid_axis(resolution: int, bounds: float, device: torch.device | str) -> Tensor:
    """The ``resolution + 1`` coordinates of a volume's grid along one axis, float32."""
    return torch.linspace(-bounds, bounds, resolution + 1, device=device)
