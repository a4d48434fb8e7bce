"""Hunyuan3DDiT: the denoiser of the shape models 2.0, 2mini, 2mv, fast and turbo (arXiv 2501.12202).

Double-stream blocks with weights of their own for condition and latents, then single-stream blocks over both; one
joint attention without any position, condition first. Written from the published facts; names of parameters are those
of the published weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Engine, attend, chosen_engine, joined, report_ignored
from .condition import Condition, Denoiser, Group
from .embeddings import TimeMLP
from .inner import joint_attention

EPS = 1e-6
# Options of published configuration files that say nothing to the network.
SILENT = ("input_size", "use_pe", "force_norm_fp32", "ckpt_path")


class HeadNorm(nn.Module):
    """RMS norm over the head dim, in float32 or wider, then in the input's dtype times a learnt scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=EPS) * self.scale  # in float32 inside, one kernel on a GPU


class QKNorm(nn.Module):
    """Norms of queries and keys, cast to the dtype of the values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = HeadNorm(dim), HeadNorm(dim)

    def forward(self, qkv: Tensor, heads: int) -> list[Tensor]:
        """``[V, R, 3 * H * D]``, all queries first, then all keys and all values, to three of ``[V * R, H, D]``."""
        q, k, v = qkv.flatten(0, 1).unflatten(-1, (3, heads, -1)).unbind(1)
        return [self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype), v]


class Modulation(nn.Module):
    """Shift, scale and gate, ``count`` triples of ``[B, 1, hidden_size]``, from the vector of time and guidance."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.count = 3 * count
        self.lin = nn.Linear(hidden_size, self.count * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.count, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scaled and shifted."""
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself runs over both."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)


class Part(NamedTuple):
    """Samples whose tokens stand together among the rows of a batch.

    Rows of all parts follow each other: of the condition ``samples * length``, of the latents ``samples * latents``.
    """

    samples: int
    length: int
    latents: int
    repeats: int


def attend_part(layer: nn.Module, rows: Sequence[Tensor], part: Part, engine: Engine) -> Tensor:
    """Attention of one part; q, k, v are ``[samples, tokens, H, D]``, the result ``[samples, tokens, H * D]``."""
    q, k, v = (x.transpose(1, 2) for x in rows)
    return joined(joint_attention(layer, attend, q, k, v, engine, part.repeats))


def together(rows: Sequence[Tensor]) -> Tensor:
    """Rows of all parts."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


class DoubleStreamBlock(nn.Module):
    """Joint attention of condition and latents, each with projections, modulation and MLP of its own."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, int(hidden_size * mlp_ratio)
        for name in ("img", "txt"):
            self.add_module(f"{name}_mod", Modulation(hidden_size, 2))
            self.add_module(f"{name}_attn", SelfAttention(hidden_size, num_heads, qkv_bias))
            layers = nn.Linear(hidden_size, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, hidden_size)
            self.add_module(f"{name}_mlp", nn.Sequential(*layers))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, parts: Sequence[Part], engine: Engine = "sdpa"
    ) -> tuple[Tensor, Tensor]:
        """Latents and condition, each ``[V, rows, hidden_size]`` for the V rows of ``vec``, ``[V, hidden_size]``."""
        own: dict[str, Any] = dict(self.named_children())
        mods = {name: own[f"{name}_mod"](vec) for name in ("txt", "img")}
        made = {}
        for name, x in (("txt", txt), ("img", img)):
            stream = own[f"{name}_attn"]
            made[name] = stream.norm(stream.qkv(modulated(x, *mods[name][:2])), self.num_heads)
        attended = self._attend(made["txt"], made["img"], parts, engine)
        streams = []
        for name, x in (("img", img), ("txt", txt)):
            _, _, gate, shift, scale, last_gate = mods[name]
            x = x + gate * own[f"{name}_attn"].proj(attended[name].view(x.shape))
            streams.append(x + last_gate * own[f"{name}_mlp"](modulated(x, shift, scale)))
        return streams[0], streams[1]

    def _attend(
        self, txt: Sequence[Tensor], img: Sequence[Tensor], parts: Sequence[Part], engine: Engine
    ) -> dict[str, Tensor]:
        """Rows of q, k and v ``[rows, H, D]`` of each stream to its rows ``[rows, H * D]``; the condition is first."""
        conditions = [x.split([part.samples * part.length for part in parts]) for x in txt]
        latents = [x.split([part.samples * part.latents for part in parts]) for x in img]
        found: dict[str, list[Tensor]] = {"txt": [], "img": []}
        for index, part in enumerate(parts):
            rows = [
                torch.cat([c[index].unflatten(0, (part.samples, -1)), x[index].unflatten(0, (part.samples, -1))], dim=1)
                for c, x in zip(conditions, latents, strict=True)
            ]
            out = attend_part(self, rows, part, engine)
            found["txt"].append(out[:, : part.length].flatten(0, 1))
            found["img"].append(out[:, part.length :].flatten(0, 1))
        return {name: together(rows) for name, rows in found.items()}


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side over condition and latents."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = num_heads, hidden_size
        inner = int(hidden_size * mlp_ratio)
        self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + inner)
        self.linear2 = nn.Linear(hidden_size + inner, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.modulation = Modulation(hidden_size, 1)

    def forward(self, x: Tensor, vec: Tensor, parts: Sequence[Part], engine: Engine = "sdpa") -> Tensor:
        """``[V, rows, hidden_size]``; the rows of a sample are its condition and its latents."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulated(x, shift, scale)).tensor_split([3 * self.hidden_size], dim=-1)
        sizes = [part.samples * (part.length + part.latents) for part in parts]
        by_part = zip(*(rows.split(sizes) for rows in self.norm(qkv, self.num_heads)), strict=True)
        attended = together(
            [
                attend_part(self, [x.unflatten(0, (part.samples, -1)) for x in rows], part, engine).flatten(0, 1)
                for rows, part in zip(by_part, parts, strict=True)
            ]
        ).view(*x.shape[:2], -1)
        return x + gate * self.linear2(torch.cat([attended, F.gelu(mlp, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    """Modulated norm and projection to the channels of the latents."""

    def __init__(self, hidden_size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


class Hunyuan3DDiT(Denoiser):
    """The denoiser of Hunyuan3D 2.0, 2mini, 2mv, and their fast and turbo versions.

    Args:
        in_channels: of the latents, 64.
        context_in_dim: of the image tokens, 1536 (DINOv2-giant).
        hidden_size, mlp_ratio, num_heads: 1024, 4.0 and 16.
        depth, depth_single_blocks: double- and single-stream blocks, 16 and 32; 8 and 16 in 2mini.
        axes_dim, theta: of rotary embeddings that the network does not have; ``axes_dim`` must add up to the head dim,
            as the published configurations do (default: that).
        qkv_bias: of the double-stream blocks.
        time_factor: what times and guidance are multiplied by, and the longest period of their embedding.
        guidance_embed: takes the guidance scale as an input (fast and turbo).
        engine: "sdpa" (exact), "sage" or "int8" (8 bits); None reads ``USE_SAGEATTN``.
        merge_constant: one token in place of equal condition tokens, see :class:`Denoiser`.
        ignored: options of published configurations that say nothing to the network; unknown ones are logged.

    Raises:
        ValueError: on sizes that do not fit together, naming them.
        ImportError: for "sage" without its package.
    """

    def __init__(
        self,
        in_channels: int = 64,
        context_in_dim: int = 1536,
        hidden_size: int = 1024,
        mlp_ratio: float = 4.0,
        num_heads: int = 16,
        depth: int = 16,
        depth_single_blocks: int = 32,
        axes_dim: Sequence[int] | None = None,
        theta: int = 10_000,
        qkv_bias: bool = True,
        time_factor: float = 1000,
        guidance_embed: bool = False,
        *,
        engine: str | None = None,
        merge_constant: bool = True,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads ({num_heads}), got {hidden_size}")
        if axes_dim is not None and sum(axes_dim) != hidden_size // num_heads:
            raise ValueError(f"axes_dim must add up to the head dim {hidden_size // num_heads}, got {list(axes_dim)}")
        report_ignored("Hunyuan3DDiT", ignored, SILENT)
        self.in_channels = self.out_channels = in_channels
        self.context_dim, self.hidden_size, self.num_heads = context_in_dim, hidden_size, num_heads
        self.guidance_embed, self.merge_constant = guidance_embed, merge_constant
        self.engine = chosen_engine(engine)
        self.latent_in = nn.Linear(in_channels, hidden_size)
        self.time_in = TimeMLP(hidden_size, time_factor)
        if guidance_embed:
            self.guidance_in = TimeMLP(hidden_size, time_factor)
        self.cond_in = nn.Linear(context_in_dim, hidden_size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden_size, num_heads, mlp_ratio, qkv_bias) for _ in range(depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth_single_blocks)
        )
        self.final_layer = LastLayer(hidden_size, in_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        contexts: Mapping[str, Tensor] | Condition,
        guidance: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Velocity of the latents.

        Args:
            x: latents ``[B, L, in_channels]``, an unordered set: the result is equivariant under their permutation.
            t: ``[B]``, 0 = noise, 1 = data; or ``[1]`` for all samples, which lets those with a constant condition run
                beside the others instead of after them.
            contexts: ``{"main": [B, Lc, context_in_dim]}``, or what :meth:`prepare` made of it.
            guidance: ``[B]`` or ``[1]``, the guidance scale, for models with ``guidance_embed`` (else it is not read).
            unused: further arguments of pipelines, which the network does not read.

        Returns:
            ``[B, L, in_channels]``.

        Raises:
            TypeError, ValueError: on other shapes, or without the guidance that the model needs.
        """
        if self.guidance_embed and guidance is None:
            raise ValueError("guidance must be [B], the guidance scales: this model has guidance_embed, got None")
        return self.grouped(x, t, contexts, guidance if self.guidance_embed else None, self.in_channels)

    def prepare_tokens(self, tokens: Tensor, repeats: int) -> Tensor:
        return self.cond_in(tokens.to(self.cond_in.weight.dtype))

    def denoise(self, x: Tensor, t: Tensor, groups: Sequence[Group], guidance: Tensor | None, engine: Engine) -> Tensor:
        shared = len(t) == 1 and (guidance is None or len(guidance) == 1)
        if len(groups) > 1 and not shared:  # rows of one modulation must be of one length: each group on its own
            counts = [group.count for group in groups]
            times, scales = (y if y is None else y.expand(len(x)).split(counts) for y in (t, guidance))
            assert times is not None
            some = scales or [None] * len(groups)
            pieces = zip(x.split(counts), times, groups, some, strict=True)
            return torch.cat([self.denoise(one, time, [group], s, engine) for one, time, group, s in pieces])
        vec = self.time_in(t)
        if guidance is not None:
            vec = vec + self.guidance_in(guidance)
        samples = len(vec)  # V: 1 where all share one time, and all rows are one sample's
        parts = [Part(group.count, group.prepared.shape[1], x.shape[1], group.repeats) for group in groups]
        latents = self.latent_in(x).reshape(samples, -1, self.hidden_size)
        cond = together([group.prepared.flatten(0, 1) for group in groups]).view(samples, -1, self.hidden_size)
        for block in self.double_blocks:
            latents, cond = block(latents, cond, vec, parts, engine)
        joint = _interleave(cond.flatten(0, 1), latents.flatten(0, 1), parts).view(samples, -1, self.hidden_size)
        for block in self.single_blocks:
            joint = block(joint, vec, parts, engine)
        rows = joint.flatten(0, 1).split([part.samples * (part.length + part.latents) for part in parts])
        last = [y.unflatten(0, (part.samples, -1))[:, part.length :] for y, part in zip(rows, parts, strict=True)]
        return self.final_layer(together(last), vec)


def _interleave(cond: Tensor, latents: Tensor, parts: Sequence[Part]) -> Tensor:
    """Rows of condition and latents to rows of samples, each with its condition first."""
    conditions = cond.split([part.samples * part.length for part in parts])
    others = latents.split([part.samples * part.latents for part in parts])
    rows = [
        torch.cat([c.unflatten(0, (part.samples, -1)), x.unflatten(0, (part.samples, -1))], dim=1).flatten(0, 1)
        for c, x, part in zip(conditions, others, parts, strict=True)
    ]
    return together(rows)
