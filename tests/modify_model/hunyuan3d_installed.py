"""Stand-ins for the denoisers of a user's own installation: the documented structure, in other words than ours.

Attention is reached as there: a name of the module's own for PyTorch's function, inside a helper (2.0), and
``F.scaled_dot_product_attention`` in the forward (2.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

scaled_dot_product_attention = nn.functional.scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ScaleNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.scale


class Norms(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = ScaleNorm(dim), ScaleNorm(dim)


class Stream(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.norm, self.proj = (
            nn.Linear(hidden, 3 * hidden),
            Norms(hidden // heads),
            nn.Linear(hidden, hidden),
        )


class Lin(nn.Module):
    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden, count * hidden)


def split(qkv: Tensor, norm: Norms, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q), norm.key_norm(k), v


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DoubleStreamBlock(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.img_mod, self.txt_mod = Lin(hidden, 6), Lin(hidden, 6)
        self.img_attn, self.txt_attn = Stream(hidden, heads), Stream(hidden, heads)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden))
            for _ in range(2)
        )

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        a = self.img_mod.lin(F.silu(vec))[:, None].chunk(6, -1)
        b = self.txt_mod.lin(F.silu(vec))[:, None].chunk(6, -1)
        iq, ik, iv = split(self.img_attn.qkv(modulate(img, a[0], a[1])), self.img_attn.norm, self.heads)
        tq, tk, tv = split(self.txt_attn.qkv(modulate(txt, b[0], b[1])), self.txt_attn.norm, self.heads)
        out = attention(torch.cat((tq, iq), 2), torch.cat((tk, ik), 2), torch.cat((tv, iv), 2))
        img = img + a[2] * self.img_attn.proj(out[:, txt.shape[1] :])
        txt_out = txt + b[2] * self.txt_attn.proj(out[:, : txt.shape[1]])
        img = img + a[5] * self.img_mlp(modulate(img, a[3], a[4]))
        return img, txt_out + b[5] * self.txt_mlp(modulate(txt_out, b[3], b[4]))


class SingleStreamBlock(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.linear1, self.linear2 = nn.Linear(hidden, 7 * hidden), nn.Linear(5 * hidden, hidden)
        self.norm, self.modulation = Norms(hidden // heads), Lin(hidden, 3)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale, gate = self.modulation.lin(F.silu(vec))[:, None].chunk(3, -1)
        wide = self.linear1(modulate(x, shift, scale))
        out = attention(*split(wide[..., : 3 * self.hidden], self.norm, self.heads))
        return x + gate * self.linear2(torch.cat((out, F.gelu(wide[..., 3 * self.hidden :], approximate="tanh")), -1))


class Embedder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(256, hidden), nn.Linear(hidden, hidden)

    def forward(self, t: Tensor) -> Tensor:
        args = 1000 * t[:, None] * torch.exp(-math.log(1000) * torch.arange(128).to(t) / 128)
        return self.out_layer(F.silu(self.in_layer(torch.cat((args.cos(), args.sin()), -1))))


class Last(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 64)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(modulate(x, shift, scale))


class Hunyuan3DDiT(nn.Module):
    """As hy3dgen's: forward(x, t, contexts)."""

    def __init__(self, context: int = 24, hidden: int = 64, heads: int = 2, depth: int = 1, singles: int = 2) -> None:
        super().__init__()
        self.latent_in, self.cond_in = nn.Linear(64, hidden), nn.Linear(context, hidden)
        self.time_in = Embedder(hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(hidden, heads) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(hidden, heads) for _ in range(singles))
        self.final_layer = Last(hidden)

    def forward(self, x: Tensor, t: Tensor, contexts: dict[str, Tensor], **kwargs: Any) -> Tensor:
        img, txt, vec = self.latent_in(x), self.cond_in(contexts["main"]), self.time_in(t)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec=vec)
        return self.final_layer(x[:, txt.shape[1] :], vec)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (nn.RMSNorm(hidden // heads, eps=1e-6) for _ in range(2))
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((self.to_q(x), self.to_k(x), self.to_v(x)), -1)
        q, k, v = both.view(*x.shape[:2], self.heads, -1).transpose(1, 2).chunk(3, -1)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape))


class PlainBlock(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(hidden, heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn1(x)


class HunYuanDiTPlain(nn.Module):
    """As hy3dshape's, with self-attention alone: forward(x, t, contexts)."""

    def __init__(self, hidden: int = 64, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(64, hidden)
        self.blocks = nn.ModuleList(PlainBlock(hidden, heads) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, contexts: dict[str, Tensor]) -> Tensor:
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x)
        return x


class Pipeline:
    """As hy3dgen's: no module, and the denoiser is called ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
