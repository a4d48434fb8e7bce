"""The two denoisers of Hunyuan3D written a second time, as plain functions of a state dict: a reference.

Everything that is easily got wrong is spelt out here: orders, views, factors. Nothing is shared with the modules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def linear(s: State, name: str, x: Tensor) -> Tensor:
    out = x @ s[f"{name}.weight"].T
    return out + s[f"{name}.bias"] if f"{name}.bias" in s else out


def layer_norm(x: Tensor, s: State | None = None, name: str = "", eps: float = 1e-6) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x if s is None else x * s[f"{name}.weight"] + s[f"{name}.bias"]


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head: ``[Lq, D]``, ``[Lk, D]``, ``[Lk, D]``."""
    return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v


def time_vector(s: State, name: str, value: float, hidden: int) -> Tensor:
    """``[1, hidden]``: 256 waves [cos | sin] of 1000 · value, of periods up to 1000."""
    args = [1000 * value * math.exp(-math.log(1000) * i / 128) for i in range(128)]
    waves = torch.tensor([math.cos(a) for a in args] + [math.sin(a) for a in args], dtype=torch.float64)[None]
    return linear(s, f"{name}.out_layer", silu(linear(s, f"{name}.in_layer", waves)))


def qkv_heads(rows: Tensor, heads: int, s: State, norm: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per head (q, k, v): channels are q of all heads, then k of all heads, then v of all heads."""
    hidden = rows.shape[-1] // 3
    dim, found = hidden // heads, []
    for h in range(heads):
        q, k, v = (rows[:, part * hidden + h * dim : part * hidden + (h + 1) * dim] for part in range(3))
        found.append((rms(q, s[f"{norm}.query_norm.scale"]), rms(k, s[f"{norm}.key_norm.scale"]), v))
    return found


def hunyuan3d_dit(s: State, x: Tensor, t: float, cond: Tensor, heads: int, guidance: float | None = None) -> Tensor:
    """One sample: x ``[L, 64]``, cond ``[Lc, context]``; returns ``[L, 64]``."""
    img, txt = linear(s, "latent_in", x), linear(s, "cond_in", cond)
    hidden, length = img.shape[-1], len(cond)
    vec = time_vector(s, "time_in", t, hidden)
    if guidance is not None:
        vec = vec + time_vector(s, "guidance_in", guidance, hidden)
    index = 0
    while f"double_blocks.{index}.img_mod.lin.weight" in s:
        b = f"double_blocks.{index}"
        mod = {name: linear(s, f"{b}.{name}_mod.lin", silu(vec)).split(hidden, dim=-1) for name in ("img", "txt")}
        per_stream = {}
        for name, rows in (("img", img), ("txt", txt)):
            shift, scale = mod[name][0], mod[name][1]
            qkv = linear(s, f"{b}.{name}_attn.qkv", layer_norm(rows) * (1 + scale) + shift)
            per_stream[name] = qkv_heads(qkv, heads, s, f"{b}.{name}_attn.norm")
        outs = []
        for h in range(heads):  # the condition stands first
            q, k, v = (torch.cat([per_stream["txt"][h][i], per_stream["img"][h][i]]) for i in range(3))
            outs.append(softmax_attention(q, k, v))
        out = torch.cat(outs, dim=-1)
        streams = {}
        for name, rows, attended in (("txt", txt, out[:length]), ("img", img, out[length:])):
            _, _, gate, shift2, scale2, gate2 = mod[name]
            rows = rows + gate * linear(s, f"{b}.{name}_attn.proj", attended)
            inner = gelu_tanh(linear(s, f"{b}.{name}_mlp.0", layer_norm(rows) * (1 + scale2) + shift2))
            streams[name] = rows + gate2 * linear(s, f"{b}.{name}_mlp.2", inner)
        img, txt, index = streams["img"], streams["txt"], index + 1
    rows, index = torch.cat([txt, img]), 0
    while f"single_blocks.{index}.linear1.weight" in s:
        b = f"single_blocks.{index}"
        shift, scale, gate = linear(s, f"{b}.modulation.lin", silu(vec)).split(hidden, dim=-1)
        wide = linear(s, f"{b}.linear1", layer_norm(rows) * (1 + scale) + shift)
        per_head = qkv_heads(wide[:, : 3 * hidden], heads, s, f"{b}.norm")
        attended = torch.cat([softmax_attention(*one) for one in per_head], dim=-1)
        both = torch.cat([attended, gelu_tanh(wide[:, 3 * hidden :])], dim=-1)
        rows, index = rows + gate * linear(s, f"{b}.linear2", both), index + 1
    shift, scale = linear(s, "final_layer.adaLN_modulation.1", silu(vec)).split(hidden, dim=-1)
    return linear(s, "final_layer.linear", layer_norm(rows[length:]) * (1 + scale) + shift)


def interleaved(parts: list[Tensor], heads: int) -> list[list[Tensor]]:
    """What the view of the concatenated projections gives each head: consecutive slices of all channels."""
    together = torch.cat(parts, dim=-1)
    wide = together.shape[-1] // heads
    return [list(together[:, h * wide : (h + 1) * wide].split(wide // len(parts), dim=-1)) for h in range(heads)]


def moe(s: State, name: str, x: Tensor) -> Tensor:
    """Token by token: the two most probable experts, with their probabilities as they are, and the shared one."""

    def expert(prefix: str, row: Tensor) -> Tensor:
        return linear(s, f"{prefix}.net.2", gelu(linear(s, f"{prefix}.net.0.proj", row)))

    out = torch.zeros_like(x)
    for i, row in enumerate(x):
        p = torch.softmax(s[f"{name}.gate.weight"] @ row, dim=0)
        best = sorted(range(len(p)), key=lambda e: -float(p[e]))[:2]
        out[i] = expert(f"{name}.shared_experts", row) + sum(p[e] * expert(f"{name}.experts.{e}", row) for e in best)
    return out


def hunyuan_dit_plain(s: State, x: Tensor, t: float, cond: Tensor, heads: int) -> Tensor:
    """One sample: x ``[L, 64]``, cond ``[Lc, context]``; returns ``[L, 64]``."""
    rows = linear(s, "x_embedder", x)
    hidden = rows.shape[-1]
    half = hidden // 2
    args = [t * math.exp(-math.log(10000) * i / half) for i in range(half)]  # t as it is, not times 1000
    waves = torch.tensor([math.sin(a) for a in args] + [math.cos(a) for a in args], dtype=torch.float64)[None]
    token = linear(s, "t_embedder.mlp.2", gelu(linear(s, "t_embedder.mlp.0", waves)))
    rows = torch.cat([token, rows])
    depth = 1 + max(int(key.split(".")[1]) for key in s if key.startswith("blocks."))
    stack: list[Tensor] = []
    for i in range(depth):
        b = f"blocks.{i}"
        if i > depth // 2:
            joined = linear(s, f"{b}.skip_linear", torch.cat([stack.pop(), rows], dim=-1))
            rows = layer_norm(joined, s, f"{b}.skip_norm")
        y = layer_norm(rows, s, f"{b}.norm1")
        outs = []
        for q, k, v in interleaved([linear(s, f"{b}.attn1.to_{n}", y) for n in "qkv"], heads):
            q, k = rms(q, s[f"{b}.attn1.q_norm.weight"]), rms(k, s[f"{b}.attn1.k_norm.weight"])
            outs.append(softmax_attention(q, k, v))
        rows = rows + linear(s, f"{b}.attn1.out_proj", torch.cat(outs, dim=-1))
        y = layer_norm(rows, s, f"{b}.norm2")
        queries = linear(s, f"{b}.attn2.to_q", y).split(hidden // heads, dim=-1)
        outs = []
        for q, (k, v) in zip(
            queries, interleaved([linear(s, f"{b}.attn2.to_{n}", cond) for n in "kv"], heads), strict=True
        ):
            q, k = rms(q, s[f"{b}.attn2.q_norm.weight"]), rms(k, s[f"{b}.attn2.k_norm.weight"])
            outs.append(softmax_attention(q, k, v))
        rows = rows + linear(s, f"{b}.attn2.out_proj", torch.cat(outs, dim=-1))
        y = layer_norm(rows, s, f"{b}.norm3")
        if f"{b}.moe.gate.weight" in s:
            rows = rows + moe(s, f"{b}.moe", y)
        else:
            rows = rows + linear(s, f"{b}.mlp.fc2", gelu(linear(s, f"{b}.mlp.fc1", y)))
        if i < depth // 2:
            stack.append(rows)
    last = layer_norm(rows, s, "final_layer.norm_final")
    return linear(s, "final_layer.linear", last)[1:]
