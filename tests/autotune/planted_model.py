"""A model in which one head is made to retrieve, and nothing else matters: the one that learning has to find."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune import SparseAttention
from spas_attn.selectors import Streaming

WORDS, DIM, LENGTH = 320, 32, 512
LAYERS, KV_HEADS, GROUP = 2, 4, 2
PLANTED = (1, 2)  # layer and KV head


class PlantedModel(nn.Module):
    """Attention layers of random heads but for one, an induction head: at a word it looks for the earlier place behind
    the same word, and passes on what stands there.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = F.normalize(torch.randn(WORDS, DIM, generator=generator), dim=-1)
        heads = KV_HEADS * GROUP
        self.maps = [torch.randn(heads, DIM, DIM, generator=generator) / DIM**0.5 for _ in range(LAYERS)]
        self.layers = nn.ModuleList(SparseAttention(selector=Streaming(block_q=64, block_k=64)) for _ in range(LAYERS))
        for inner in self.layers:
            inner.set_heads(heads)
            inner.kv_heads = KV_HEADS

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[1, L, words]``."""
        words = self.words[ids]
        before = F.pad(words, (0, 0, 1, 0))[:, :-1]
        logits = torch.zeros(())
        for index, (inner, maps) in enumerate(zip(self.layers, self.maps, strict=True)):
            pairs = ((words, maps), (before, maps[::GROUP]), (words, maps[1::GROUP]))
            q, k, v = (torch.einsum("bld,hde->bhle", x, weights) for x, weights in pairs)
            if index == PLANTED[0]:
                head = PLANTED[1]
                q[:, head * GROUP : (head + 1) * GROUP] = 24 * words[:, None]
                k[:, head], v[:, head] = before, words
            out = inner(q, k, v, dense=lambda q=q, k=k, v=v: full(q, k, v), is_causal=True, scale=1.0)
            logits = logits + 12 * out.sum(1) @ self.words.T / GROUP
        return logits

    def loss(self, step: int) -> Tensor:
        """Cross-entropy of words that came before in the same order, four blocks ago."""
        half = torch.randperm(WORDS, generator=torch.Generator().manual_seed(step))[: LENGTH // 2]
        ids = half.repeat(2)[None]
        return F.cross_entropy(self(ids)[0, LENGTH // 2 : -1], ids[0, LENGTH // 2 + 1 :])


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The model's own attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
