"""Cases of benchmark_attention.py: shapes by name, their inputs, and what is exact, computed in float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spas_attn import BlockMask
from spas_attn.backends import Call
from spas_attn.metrics import relative_l1
from spas_attn.selectors import TopK

SAMPLED_BLOCKS = 4  # query blocks of every head whose output is compared with float32


@dataclass(frozen=True)
class Case:
    """The shape of one attention call."""

    name: str
    heads: int
    k_heads: int
    length: int
    dim: int
    is_causal: bool = False
    batch: int = 1

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.k_heads else f"{self.heads}/{self.k_heads}"
        causal = ", causal" if self.is_causal else ""
        return f"{self.name} [{self.batch}, {heads}, {self.length}, {self.dim}]{causal}"

    def tflops(self, ms: float) -> float:
        """Effective TFLOP/s: the operations of dense (causal) attention over the time, whatever was left out."""
        operations = 4 * self.batch * self.heads * self.length**2 * self.dim / (2 if self.is_causal else 1)
        return operations / ms * 1e-9

    def causal(self) -> Case:
        """The same case under causality."""
        return self if self.is_causal else replace(self, name=f"{self.name}-causal", is_causal=True)

    def draw(self, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random normal q, k, v."""
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v = (
            torch.randn(self.batch, heads, self.length, self.dim, generator=generator, device=device, dtype=dtype)
            for heads in (self.heads, self.k_heads, self.k_heads)
        )
        return q, k, v


A, B = Case("A", 24, 24, 16384, 128), Case("B", 24, 24, 32768, 64)
CASES = {
    case.name: case
    for case in (
        A,
        A.causal(),
        B,
        B.causal(),
        Case("CogVideoX-2B", 30, 30, 17776, 64),
        Case("Mochi", 24, 24, 22528, 128),
        Case("Wan-14B", 40, 40, 75600, 128),
        Case("Flux", 24, 24, 4608, 128),
        *(Case(f"Llama-3.1-8B-{n}K", 32, 8, n * 1024, 128, is_causal=True) for n in (8, 32, 128)),
        Case("cpu", 4, 4, 1024, 64),
        Case("cpu-causal", 4, 4, 1024, 64, is_causal=True),
    )
}


@dataclass(frozen=True, eq=False)
class Setup:
    """One case with inputs, at one density.

    Attributes:
        selector: keeps the asked share of blocks, those with the best scores.
        mask: what it selects here; given to providers that select nothing themselves.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    selector: TopK
    mask: BlockMask
    density: float

    @classmethod
    def of(cls, case: Case, inputs: tuple[Tensor, Tensor, Tensor], density: float, pool: int) -> Setup:
        """Select the best ``density`` of the blocks of a case."""
        q, k, v = inputs
        selector = TopK(keep=density, pool=pool)
        return cls(case, q, k, v, selector, selector.select(q, k, is_causal=case.is_causal), density)

    def call(self, precision: str = "bf16") -> Call:
        """The call with its mask, as backends take it."""
        return Call(
            self.q, self.k, self.v, self.mask, self.case.is_causal, self.case.dim**-0.5, precision=precision,
            expected_density=self.density,
        )  # fmt: skip

    def rows(self) -> list[slice]:
        """The sampled query blocks: the first, the last, and some between."""
        blocks = self.mask.counts.shape[2]
        chosen = sorted({round(i * (blocks - 1) / (SAMPLED_BLOCKS - 1)) for i in range(SAMPLED_BLOCKS)})
        size = self.mask.block_q
        return [slice(i * size, min((i + 1) * size, self.case.length)) for i in chosen]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - with and without the mask, of the setup in use
    def truth(self, masked: bool) -> list[Tensor]:
        """Exact attention in float32 on the sampled rows, ``[B, Hq, rows, D]`` each.

        Args:
            masked: over the blocks of the mask, else over all.
        """
        call = self.call() if masked else self.call().replace(mask=None)
        group, scale = call.group, call.scale
        exact = []
        for rows in self.rows():
            seen = call.token_mask(rows.start, rows.stop)
            out = torch.empty_like(self.q[:, :, rows], dtype=torch.float32)
            for b in range(self.case.batch):
                for h in range(self.case.k_heads):
                    heads = slice(h * group, (h + 1) * group)
                    scores = self.q[b, heads, rows].float() @ self.k[b, h].float().T * scale
                    if seen is not None:
                        visible = seen.expand(self.case.batch, self.case.heads, -1, -1)[b, heads]
                        scores = scores.masked_fill_(~visible, -torch.inf)
                    out[b, heads] = scores.softmax(-1) @ self.v[b, h].float()
            exact.append(out)
        return exact

    def error(self, out: Tensor, masked: bool) -> float:
        """Relative L1 of an output ``[B, Hq, L, D]`` against float32, on the sampled rows."""
        if out.shape != self.q.shape:
            raise ValueError(f"the output has shape {tuple(out.shape)}, q has {tuple(self.q.shape)}")
        sampled = torch.cat([out[:, :, rows].float() for rows in self.rows()], dim=2)
        return float(relative_l1(sampled, torch.cat(self.truth(masked), dim=2)))
