"""HunYuanDiTPlain: the denoiser of Hunyuan3D 2.1: self-attention, cross-attention to the image, MLP or experts.

A U of plain blocks with long skips and no modulation: the time is one more token. Written from the published facts;
names of parameters are those of the published weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Engine, attend, chosen_engine, joined, report_ignored
from .condition import Condition, Denoiser, Group
from .embeddings import TimeToken
from .inner import joint_attention
from .moe import Experts

EPS = 1e-6
# Options that must have one value: another would be another network. The published configuration has these.
FIXED = {"qk_norm": True, "use_attention_pooling": False, "with_decoupled_ca": False, "use_pos_emb": False}
SILENT = ("input_size", "text_len", "qk_norm_type", "norm_type", "ckpt_path", "additional_cond_hidden_state")


class Attention(nn.Module):
    """Projections and norms of self- or cross-attention.

    Heads are interleaved over the projections: what the projections give is put side by side, ``[q | k | v]`` (in
    cross-attention ``[k | v]``), and cut anew into ``num_heads`` slices, of which each holds q, k and v of one head.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=EPS)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=EPS)
        self.out_proj = nn.Linear(dim, dim)

    def interleaved(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Tensors ``[B, L, dim]`` side by side, cut into heads: as many of ``[B, H, L, D]``."""
        together = torch.cat(parts, dim=-1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return together.chunk(len(parts), dim=-1)


class SelfAttention(Attention):
    """``[B, L, dim]`` to ``[B, L, dim]``."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__(dim, dim, num_heads, qkv_bias)

    def forward(self, x: Tensor, engine: Engine = "sdpa") -> Tensor:
        q, k, v = self.interleaved(self.to_q(x), self.to_k(x), self.to_v(x))
        q, k = self.q_norm(q), self.k_norm(k)
        return self.out_proj(joined(joint_attention(self, attend, q, k, v, engine, 1)))


class CrossAttention(Attention):
    """``[B, L, dim]``, of keys and values that :meth:`prepare` made of the condition, to ``[B, L, dim]``."""

    def prepare(self, context: Tensor, repeats: int) -> tuple[Tensor, Tensor] | Tensor:
        """Keys and values ``[B, H, Lc, D]`` of a condition ``[B, Lc, context_dim]``.

        Of equal tokens (``repeats`` above 1) the result of the whole layer, ``[B, 1, dim]``: whatever a query looks
        for, the mean of equal values is that value. Of zeros it is the bias of ``out_proj``.
        """
        k, v = self.interleaved(self.to_k(context), self.to_v(context))
        return (self.k_norm(k), v) if repeats == 1 else self.out_proj(joined(v))

    def forward(self, x: Tensor, prepared: tuple[Tensor, Tensor] | Tensor, engine: Engine = "sdpa") -> Tensor:
        if isinstance(prepared, Tensor):  # nothing depends on the query
            return prepared
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.out_proj(joined(attend(self.q_norm(q), *prepared, engine)))


class MLP(nn.Module):
    """Two layers with an exact GELU between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP or experts, after the join with an earlier block where there is one."""

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, qkv_bias: bool, skip: bool, experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=EPS) for _ in range(3))
        self.attn1 = SelfAttention(dim, num_heads, qkv_bias)
        self.attn2 = CrossAttention(dim, context_dim, num_heads, qkv_bias)
        self.moe = Experts(dim, experts, top_k) if experts else None
        self.mlp = None if experts else MLP(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.skip_norm = nn.LayerNorm(dim, eps=EPS) if skip else None

    def forward(self, x: Tensor, prepared: Sequence[tuple[int, Any]], earlier: Tensor | None, engine: Engine) -> Tensor:
        """``[B, L, dim]``; ``prepared`` is, for groups of samples, their number and what :meth:`CrossAttention.prepare`
        made; ``earlier`` is the result of the block at the other side of the U.
        """
        if self.skip_linear is not None and self.skip_norm is not None:
            assert earlier is not None
            x = self.skip_norm(self.skip_linear(torch.cat([earlier, x], dim=-1)))
        x = x + self.attn1(self.norm1(x), engine)
        parts = x.split([count for count, _ in prepared])
        crossed = [p + self.attn2(self.norm2(p), made, engine) for p, (_, made) in zip(parts, prepared, strict=True)]
        x = crossed[0] if len(crossed) == 1 else torch.cat(crossed)
        feed: Any = self.moe if self.mlp is None else self.mlp
        return x + feed(self.norm3(x))


class LastLayer(nn.Module):
    """Norm and projection of the latents; the time token is dropped."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=EPS)
        self.linear = nn.Linear(dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x[:, 1:]))


class HunYuanDiTPlain(Denoiser):
    """The denoiser of Hunyuan3D 2.1.

    Args:
        in_channels, hidden_size, context_dim: 64, 2048, and 1024 (DINOv2-large).
        depth, num_heads: 21 blocks, 16 heads.
        qkv_bias: of the projections of attention.
        num_moe_layers, num_experts, moe_top_k: the last 6 blocks have 8 experts, of which a token goes to 2.
        engine, merge_constant: as in Hunyuan3DDiT.
        options: ``qk_norm``, ``use_attention_pooling``, ``with_decoupled_ca`` and ``use_pos_emb`` must be as in the
            published configuration; what says nothing to the network is ignored, unknown options are logged.

    Raises:
        ValueError: on sizes that do not fit together and options of another network.
        ImportError: for "sage" without its package.
    """

    def __init__(
        self,
        in_channels: int = 64,
        hidden_size: int = 2048,
        context_dim: int = 1024,
        depth: int = 21,
        num_heads: int = 16,
        qkv_bias: bool = False,
        num_moe_layers: int = 6,
        num_experts: int = 8,
        moe_top_k: int = 2,
        *,
        engine: str | None = None,
        merge_constant: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads ({num_heads}), got {hidden_size}")
        if not 0 <= num_moe_layers <= depth:
            raise ValueError(f"num_moe_layers must be from 0 to depth ({depth}), got {num_moe_layers}")
        if not 1 <= moe_top_k <= num_experts:
            raise ValueError(f"moe_top_k must be from 1 to num_experts ({num_experts}), got {moe_top_k}")
        for name, value in FIXED.items():
            if options.get(name, value) != value:
                raise ValueError(f"{name} must be {value}, as in the published model, got {options[name]!r}")
        report_ignored("HunYuanDiTPlain", options, (*SILENT, *FIXED))
        self.in_channels = self.out_channels = in_channels
        self.context_dim, self.hidden_size, self.num_heads = context_dim, hidden_size, num_heads
        self.guidance_embed, self.merge_constant, self.depth = False, merge_constant, depth
        self.engine = chosen_engine(engine)
        self.x_embedder = nn.Linear(in_channels, hidden_size)
        self.t_embedder = TimeToken(hidden_size)
        self.blocks = nn.ModuleList(
            Block(
                hidden_size, context_dim, num_heads, qkv_bias, skip=index > depth // 2,
                experts=num_experts if depth - index <= num_moe_layers else 0, top_k=moe_top_k,
            )
            for index in range(depth)
        )  # fmt: skip
        self.final_layer = LastLayer(hidden_size, in_channels)

    def forward(self, x: Tensor, t: Tensor, contexts: Mapping[str, Tensor] | Condition, **unused: Any) -> Tensor:
        """Velocity of the latents; arguments and errors as of :meth:`Hunyuan3DDiT.forward`, without guidance."""
        return self.grouped(x, t, contexts, None, self.in_channels)

    def prepare_tokens(self, tokens: Tensor, repeats: int) -> list[Any]:
        """Keys and values of every cross-attention."""
        blocks: Any = self.blocks
        return [block.attn2.prepare(tokens.to(self.x_embedder.weight.dtype), repeats) for block in blocks]

    def denoise(self, x: Tensor, t: Tensor, groups: Sequence[Group], guidance: Tensor | None, engine: Engine) -> Tensor:
        x = torch.cat([self.t_embedder(t).expand(len(x), -1, -1), self.x_embedder(x)], dim=1)
        kept: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            earlier = kept.pop() if index > self.depth // 2 else None
            x = block(x, [(group.count, group.prepared[index]) for group in groups], earlier, engine)
            if index < self.depth // 2:
                kept.append(x)
        return self.final_layer(x)
