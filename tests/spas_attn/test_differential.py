"""Every backend that runs here against float64 arithmetic of this file's own, on hundreds of random small calls.

The truth is written from the definitions alone: dense scores in float64, one mask of tokens, one softmax. Of the
library it takes only which blocks were selected; that they are what they should be is tested elsewhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from spas_attn import BlockMask, backends, block_sparse_attention, sparse_attention
from spas_attn.selectors import Dense, FlashPrefill, MeanSimilarity, PeakMass, Selector, Streaming, Tokens, TopK

CASES, PER_TEST = 320, 20
NAMES = ["cpu", "sdpa", "reference"]
# Relative L1 that rounding the result to the inputs' dtype, and P too on some backends, may bring.
LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 5e-3}


@dataclass
class Drawn:
    """A random call: inputs in layout "HND", options of the public functions, a selector or a mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    selector: Selector
    given: bool
    shown: str

    def run(self, backend: str) -> tuple[Tensor, BlockMask | None]:
        """The output in layout "HND", and the blocks that it was computed over."""
        options = self.options | {"backend": backend, "strict": True}
        tensors = self.q, self.k, self.v
        nhd = options["layout"] == "NHD"
        tensors = tuple(x.transpose(1, 2) for x in tensors) if nhd else tensors
        if not self.given:
            out, stats = sparse_attention(*tensors, self.selector, return_stats=True, **options)
            return (out.transpose(1, 2) if nhd else out), stats.mask
        mask = self.mask().to(self.q.device)
        packed = {"cu_seqlens_q", "cu_seqlens_k"}
        out = block_sparse_attention(*tensors, mask, **{key: x for key, x in options.items() if key not in packed})
        return (out.transpose(1, 2) if nhd else out), mask

    def mask(self) -> BlockMask:
        """A random mask of one's own, which may keep nothing of a row."""
        generator = torch.Generator().manual_seed(self.q.shape[2])
        parts = []
        for (a, b), (c, d) in self.spans():
            grid = -(-(b - a) // self.selector.block_q), -(-(d - c) // self.selector.block_k)
            kept = torch.rand(*self.q.shape[:2], *grid, generator=generator) < 0.6
            parts.append(BlockMask.from_dense(kept, b - a, d - c, self.selector.block_q, self.selector.block_k))
        cu = self.options["cu_seqlens_q"], self.options["cu_seqlens_k"]
        return parts[0] if cu[0] is None else BlockMask.pack(parts, *cu)

    def spans(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(start, stop) of the queries and of the keys of every sequence."""
        if self.options["cu_seqlens_q"] is None:
            return [((0, self.q.shape[2]), (0, self.k.shape[2]))]
        q, k = self.options["cu_seqlens_q"].tolist(), self.options["cu_seqlens_k"].tolist()
        return list(zip(zip(q, q[1:]), zip(k, k[1:]), strict=True))  # noqa: B905


def draw(seed: int) -> Drawn:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    is_causal, packed = chance.random() < 0.5, chance.random() < 0.2
    batch, k_heads, group = 1 if packed else chance.choice([1, 2]), chance.choice([1, 2]), chance.choice([1, 2, 3])
    dim = chance.choice([16, 24, 32, 40])
    lengths = []
    for _ in range(chance.randint(2, 3) if packed else 1):
        k_len = chance.choice([1, 63, 64, 65, 128, chance.randint(1, 300), chance.randint(1, 300)])
        lengths.append((chance.randint(1, k_len) if is_causal else chance.choice([1, chance.randint(1, 300)]), k_len))
    q_len, k_len = (sum(x) for x in zip(*lengths, strict=True))
    window = chance.choice([None, chance.randint(1, 150)]) if is_causal else None
    padding = None if packed else chance.choice([None, None, "left", "right", "holes", "nothing left"])
    dtype = chance.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    sizes: dict[str, Any] = {"block_q": chance.choice([64, 128]), "block_k": chance.choice([64, 128])}
    more = sizes | {"local": chance.choice([0, 100]), "sink": chance.random() < 0.7}
    heads = k_heads * group
    per_head = torch.rand(heads, generator=generator).clamp(min=0.1)
    selector = chance.choice(
        [
            Dense(**sizes),
            TopK(chance.uniform(0.1, 1.0), pool=chance.choice([8, 16, 64]), **more),
            TopK(per_head, **more),
            MeanSimilarity(chance.uniform(0, 1), chance.choice([-1.0, 0.1, 0.3]), chance.choice([8, 64]), **more),
            MeanSimilarity(per_head, 0.2 * per_head, **more),
            PeakMass(chance.uniform(0.2, 1), **more),
            FlashPrefill(chance.uniform(0, 1), **more),
            Streaming(chance.choice([0, 50]), chance.choice([0, 80]), **more),
            Tokens(((5, 20), (-30, -2)), queries=chance.random() < 0.5, **more),
            TopK(0.3, **sizes) | Tokens(((100, 130),), **sizes),
        ]
    )
    valid = torch.ones(batch, k_len, dtype=torch.bool)
    if padding == "left":
        valid[0, : k_len // 2] = False
    elif padding == "right":
        valid[-1, k_len - k_len // 2 :] = False
    elif padding == "holes":
        valid = torch.rand(batch, k_len, generator=generator) < chance.choice([0.02, 0.5])
    elif padding == "nothing left":
        valid[0] = False
    cu = [
        torch.tensor([0, *torch.tensor(column).cumsum(0).tolist()], dtype=torch.int32)
        for column in zip(*lengths, strict=True)
    ]
    strided = chance.random() < 0.3

    def tensor(count: int, length: int, strength: float = 1.0) -> Tensor:
        x = strength * torch.randn(batch, count, length * (1 + strided), dim, generator=generator)
        return x.to(dtype)[:, :, :: 1 + strided]

    options = {
        "is_causal": is_causal,
        "window": window,
        "scale": chance.choice([None, None, 0.02, 1.0]),
        "attn_mask": None if padding is None else chance.choice([valid, valid[:, None, None]]),
        "layout": chance.choice(["HND", "NHD"]),
        "cu_seqlens_q": cu[0] if packed else None,
        "cu_seqlens_k": cu[1] if packed else None,
    }
    q, k, v = tensor(heads, q_len, 2.0), tensor(k_heads, k_len), tensor(k_heads, k_len)
    shown = f"seed {seed}: {lengths}, {tuple(q.shape)}, {dtype}, {padding}, {options}, {selector}"
    return Drawn(q, k, v, options, selector, chance.random() < 0.3, shown)


def truth(drawn: Drawn, mask: BlockMask | None) -> Tensor:
    """Attention over the kept blocks in float64, ``[B, Hq, Lq, D]``."""
    out = torch.zeros(drawn.q.shape, dtype=torch.float64)
    group = drawn.q.shape[1] // drawn.k.shape[1]
    scale = drawn.options["scale"] or drawn.q.shape[-1] ** -0.5
    parts = [None] if mask is None else mask.split()
    spans = drawn.spans()
    for (a, b), (c, d), part in zip(*zip(*spans, strict=True), parts * (len(spans) // len(parts)), strict=True):
        q = drawn.q[:, :, a:b].double()
        k, v = (x[:, :, c:d].double().repeat_interleave(group, 1) for x in (drawn.k, drawn.v))
        i, j = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        seen = torch.ones(*q.shape[:2], b - a, d - c, dtype=torch.bool)
        if drawn.options["is_causal"]:
            seen &= j <= i
        if drawn.options["window"] is not None:
            seen &= j > i - drawn.options["window"]
        if drawn.options["attn_mask"] is not None:
            seen &= drawn.options["attn_mask"].reshape(-1, 1, 1, d - c)
        if part is not None:
            kept = torch.zeros(*part.counts.shape, part.indices.shape[-1], dtype=torch.bool)
            for b_, h, row in torch.cartesian_prod(*(torch.arange(n) for n in part.counts.shape)).tolist():
                kept[b_, h, row, part.indices[b_, h, row, : part.counts[b_, h, row]].long()] = True
            blocks_q, blocks_k = torch.arange(b - a) // part.block_q, torch.arange(d - c) // part.block_k
            seen &= kept[:, :, blocks_q][..., blocks_k]
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
        weights = torch.where(seen.any(-1, keepdim=True), scores, 0.0).softmax(-1) * seen
        out[:, :, a:b] = weights @ v
    return out


@pytest.mark.parametrize("first", range(0, CASES, PER_TEST))
def test_backends_compute_the_truth(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        drawn = draw(seed)
        expected: Tensor | None = None
        for name in NAMES:
            out, mask = drawn.run(name)
            assert (out.shape, out.dtype) == (drawn.q.shape, drawn.q.dtype), f"{name}: {drawn.shown}"
            expected = truth(drawn, mask) if expected is None else expected
            error = (out.double() - expected).abs().sum() / expected.abs().sum().clamp(min=1e-9)
            assert error <= LIMITS[out.dtype], f"{name} is off by {error:.1e}: {drawn.shown}"
            empty = (expected == 0).all(-1)
            assert (out[empty] == 0).all(), f"{name}, a row without a visible key: {drawn.shown}"


def test_the_draws_cover_what_they_should() -> None:
    """Guards the test above: every kind of call is among them, more than once."""
    all_drawn = [draw(seed) for seed in range(CASES)]
    for name, chosen in {
        "causal": lambda d: d.options["is_causal"],
        "window": lambda d: d.options["window"] is not None,
        "padding": lambda d: d.options["attn_mask"] is not None,
        "packed": lambda d: d.options["cu_seqlens_q"] is not None,
        "packed, given": lambda d: d.options["cu_seqlens_q"] is not None and d.given,
        "given": lambda d: d.given,
        "grouped": lambda d: d.q.shape[1] > d.k.shape[1],
        "ragged": lambda d: d.q.shape[2] % d.selector.block_q > 0,
        "longer queries": lambda d: d.q.shape[2] > d.k.shape[2],
        "layout": lambda d: d.options["layout"] == "NHD",
        "strided": lambda d: not d.q.is_contiguous(),
        "unequal blocks": lambda d: d.selector.block_q != d.selector.block_k,
        **{str(dtype): lambda d, dtype=dtype: d.q.dtype == dtype for dtype in LIMITS},
        **{
            kind.__name__: lambda d, kind=kind: isinstance(d.selector, kind)
            for kind in (Dense, TopK, MeanSimilarity, PeakMass, FlashPrefill, Streaming, Tokens)
        },
    }.items():
        assert sum(map(chosen, all_drawn)) >= 10, name
    assert set(NAMES) <= set(backends.names())


@pytest.mark.slow
@pytest.mark.skipif("backends.get('triton').missing() is not None", reason="Triton does not run here")
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_triton_computes_the_truth(first: int) -> None:
    """On a GPU, else under Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in range(first, first + 10):
        drawn = draw(seed)
        moved = draw(seed)
        moved.q, moved.k, moved.v = (x.to(device) for x in (drawn.q, drawn.k, drawn.v))
        if isinstance(mask := drawn.options["attn_mask"], Tensor):
            moved.options["attn_mask"] = mask.to(device)
        out, mask = moved.run("triton")
        expected = truth(drawn, None if mask is None else mask.to("cpu"))
        error = (out.cpu().double() - expected).abs().sum() / expected.abs().sum().clamp(min=1e-9)
        assert error <= LIMITS[out.dtype], f"off by {error:.1e}: {drawn.shown}"
