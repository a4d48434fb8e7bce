"""Mixture of experts of the 2.1 model: the two best of eight for each token, and one that serves all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Widen(nn.Module):
    """First layer of an expert, with an exact GELU."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class Expert(nn.Module):
    """Two layers; parameters ``net.0.proj`` and ``net.2``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Widen(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Experts(nn.Module):
    """Experts by token: ``shared(x) + Σ p_e · expert_e(x)`` over the ``top_k`` most probable experts e.

    The probabilities are those of the softmax over all experts, not made to add up to 1 again; no token is dropped.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.experts = nn.ModuleList(Expert(dim) for _ in range(num_experts))
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.shared_experts = Expert(dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L, dim]``; reads on the host, once, how many tokens each expert gets."""
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k, dim=-1)  # [N, k]
        order = chosen.flatten().argsort(stable=True)  # places (token, choice), by expert
        counts: Any = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = flat[order // self.top_k].split(counts)
        made = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        back = torch.empty_like(made)
        back[order] = made  # a permutation: the same sum, in the same order, every time
        out = (back.unflatten(0, (-1, self.top_k)) * weights[..., None]).sum(1)
        return self.shared_experts(x) + out.unflatten(0, x.shape[:2])
