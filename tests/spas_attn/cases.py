"""The awkward attention calls that every backend and kernel is tested with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spas_attn import BlockMask, Call
from spas_attn.block_mask import cdiv


@dataclass(frozen=True)
class Case:
    """One attention call with random inputs and a random ragged block mask."""

    q_len: int
    k_len: int
    dim: int = 64
    heads: int = 2
    k_heads: int = 2
    batch: int = 1
    is_causal: bool = False
    window: int | None = None
    padding: str | None = None  # None, "left", "right", "holes" or "one row empty"
    block_q: int = 128
    block_k: int = 128
    density: float | None = 0.5  # None: no block mask at all
    layout: str = "HND"  # how q, k, v lie in memory: "HND", "NHD", or "strided" (every second row of a larger tensor)
    dtype: torch.dtype = torch.float32
    scale: float | None = None

    def __str__(self) -> str:
        shown = f"{self.q_len}x{self.k_len}-d{self.dim}-h{self.heads}:{self.k_heads}-b{self.batch}"
        extras = [
            "causal" * self.is_causal,
            f"window{self.window}" if self.window else "",
            self.padding or "",
            f"{self.block_q}x{self.block_k}",
            f"density{self.density}",
            self.layout,
            str(self.dtype).removeprefix("torch."),
            f"scale{self.scale}" if self.scale else "",
        ]
        return "-".join([shown, *filter(None, extras)])

    def call(self, seed: int = 0, device: str = "cpu", **changes: object) -> Call:
        """The call, with inputs drawn from ``seed`` (drawn on the CPU, so that every device sees the same)."""
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int, length: int) -> Tensor:
            if self.layout == "NHD":
                x = torch.randn(self.batch, length, heads, self.dim, generator=generator).transpose(1, 2)
            elif self.layout == "strided":
                x = torch.randn(self.batch, heads, 2 * length, self.dim, generator=generator)[:, :, ::2]
            else:
                x = torch.randn(self.batch, heads, length, self.dim, generator=generator)
            return x.to(device, self.dtype)

        q, k, v = draw(self.heads, self.q_len), draw(self.k_heads, self.k_len), draw(self.k_heads, self.k_len)
        mask = None
        if self.density is not None:
            grid = (self.batch, self.heads, cdiv(self.q_len, self.block_q), cdiv(self.k_len, self.block_k))
            kept = torch.rand(grid, generator=generator) < self.density
            kept[..., 0] = True
            mask = BlockMask.from_dense(kept, self.q_len, self.k_len, self.block_q, self.block_k).to(device)
        call = Call(
            q,
            k,
            v,
            is_causal=self.is_causal,
            scale=self.dim**-0.5 if self.scale is None else self.scale,
            attn_mask=self._padding_mask(generator, device),
            window=self.window,
        )
        return call.replace(**({"mask": mask} | changes))

    def _padding_mask(self, generator: torch.Generator, device: str) -> Tensor | None:
        if self.padding is None:
            return None
        mask = torch.ones(self.batch, self.k_len, dtype=torch.bool)
        for b in range(self.batch):
            cut = max(1, self.k_len * (b + 1) // (2 * self.batch + 1))
            if self.padding == "left":
                mask[b, :cut] = False
            elif self.padding == "right":
                mask[b, -cut:] = False
            elif self.padding == "holes":
                mask[b] = torch.rand(self.k_len, generator=generator) < 0.5
            elif self.padding == "one row empty" and b == 0:
                mask[b] = False
        return mask.to(device)


HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

CASES = [
    Case(1, 1),
    Case(1, 129, dim=80),
    Case(63, 63, is_causal=True),
    Case(127, 127, dim=96, heads=4, k_heads=1, is_causal=True),
    Case(129, 129, dim=128, is_causal=True, block_q=64, block_k=64),
    Case(129, 129, dim=16, dtype=HALF),
    Case(129, 257, dim=80, heads=8, k_heads=1, dtype=HALF, block_q=128, block_k=64),
    Case(300, 300, dim=256, heads=2, k_heads=1, is_causal=True, dtype=HALF),
    Case(1000, 1000, heads=4, k_heads=1, is_causal=True, dtype=HALF),
    Case(1000, 1000, dim=128, dtype=BF16, is_causal=True, block_q=64),
    Case(200, 1000, is_causal=True, layout="NHD", dtype=HALF),
    Case(65, 1000, is_causal=True, dim=96, layout="strided", density=0.3),
    Case(129, 63, dim=64, layout="NHD", dtype=HALF),
    Case(500, 300, dim=72, heads=4, k_heads=2, layout="strided", dtype=HALF),
    Case(300, 300, batch=3, padding="left", is_causal=True, dtype=HALF),
    Case(300, 300, batch=2, padding="right", heads=4, k_heads=1, dtype=HALF),
    Case(260, 260, batch=2, padding="holes", layout="NHD", is_causal=True),
    Case(129, 200, batch=2, padding="one row empty", dtype=HALF),
    Case(1000, 1000, is_causal=True, window=200, dtype=HALF, density=0.7),
    Case(200, 500, is_causal=True, window=64, block_q=64, block_k=64, density=0.7),
    Case(300, 300, density=None, heads=4, k_heads=1, dtype=HALF),
    Case(300, 300, density=None, is_causal=True, padding="left", batch=2),
    Case(257, 257, density=0.0, dtype=HALF),
    Case(257, 257, scale=0.5, is_causal=True, dtype=HALF),
    Case(1000, 1000, density=0.2, heads=8, k_heads=2, is_causal=True, block_q=128, block_k=64),
]
