"""Cases of a single attention call: shapes by name, their inputs, and what is exact, computed in float32."""

from __future__ import annotations

import contextlib
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from registry import CASES, Case, Declined, Runs, Setup
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spas_attn import BlockMask, backends, sparse_attention
from spas_attn.backends import flex
from spas_attn.block_mask import cdiv, visible_blocks
from spas_attn.call import Call
from spas_attn.metrics import relative_l1
from spas_attn.plan import plan
from spas_attn.select import select
from spas_attn.selectors import ExactKeys, Selector, TopK

SAMPLED_BLOCKS = 4  # query blocks of every head whose output is compared with float32


@dataclass(frozen=True)
class AttentionCase(Case):
    """The shape of one attention call."""

    name: str
    heads: int
    k_heads: int
    length: int
    dim: int
    is_causal: bool = False
    batch: int = 1
    window: int | None = None

    def causal(self) -> AttentionCase:
        """The same case under causality."""
        return replace(self, name=f"{self.name}-causal", is_causal=True)

    def tiny(self) -> AttentionCase:
        window = None if self.window is None else 256
        return replace(self, heads=2 * self.heads // self.k_heads, k_heads=2, length=1024, dim=64, window=window)

    def draw(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Random normal q, k, v."""
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(self.batch, heads, self.length, self.dim, generator=generator, device=device, dtype=dtype)
            for heads in (self.heads, self.k_heads, self.k_heads)
        ]

    def setups(self, device: torch.device, dtype: torch.dtype, options: Namespace) -> Iterator[AttentionSetup]:
        # FlexAttention specialises on the first shapes that it meets; with others before it would compile for any.
        torch.compiler.reset()
        flex._compiled.cache_clear()
        inputs = self.draw(dtype, device)
        for blocks, density in itertools.product(options.blocks, options.densities):
            block_q, block_k = (int(size) for size in blocks.split("x"))
            pool = min(options.pool, block_q, block_k)
            selector: Selector = TopK(density, pool=pool, block_q=block_q, block_k=block_k)
            if options.scores == "exact":
                selector = ExactKeys(pool=pool, block_q=block_q, block_k=block_k)
            yield AttentionSetup(self, inputs, selector, density, options.ragged)


class AttentionSetup(Setup):
    """One attention call with inputs, at one density.

    Attributes:
        selector: keeps the asked share of blocks, those with the best scores (ExactKeys by a threshold that does);
            None when the mask is given.
        mask: what it selects here, for providers that select nothing themselves; with ``ragged`` a random one.
    """

    def __init__(
        self, case: AttentionCase, inputs: list[Tensor], selector: Selector, density: float, ragged: bool = False
    ) -> None:
        self.case, self.selector = case, None if ragged else selector
        (self.q, self.k, self.v), self.dtype = inputs, inputs[0].dtype
        self.density, self.block_q, self.block_k = density, selector.block_q, selector.block_k
        if isinstance(selector, ExactKeys):
            self.selector = selector = self._keeping(selector)
        if ragged:
            self.mask = ragged_mask(case, selector.block_q, selector.block_k, self.density).to(self.q.device)
        else:
            self.mask = select(selector, self.call(None)).mask
        self.kept = float(self.mask.density(case.is_causal, case.window).mean())
        self._truth: dict[bool, Tensor] = {}

    def _keeping(self, selector: ExactKeys) -> ExactKeys:
        """The selector with the threshold that keeps the asked share of blocks, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(12):
            selector = replace(selector, cdf_threshold=(low + high) / 2)
            mask = select(selector, self.call(None)).mask
            more = float(mask.density(self.case.is_causal, self.case.window).mean()) < self.density
            low, high = ((low + high) / 2, high) if more else (low, (low + high) / 2)
        return replace(selector, cdf_threshold=high)

    def call(self, mask: BlockMask | None, precision: str = "native") -> Call:
        """The checked call, with a mask as backends take it."""
        return Call.make(
            self.q, self.k, self.v, is_causal=self.case.is_causal, window=self.case.window, precision=precision,
            mask=mask, expected_density=self.density,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {"tokens": self.case.length, "heads": self.case.heads, "head_dim": self.case.dim, "layers": ""}

    def tflops(self, ms: float) -> float:
        """Effective TFLOP/s: the operations of dense (causal) attention over the time, whatever was left out."""
        case = self.case
        pairs = case.length**2 / (2 if case.is_causal else 1)
        if case.window is not None:
            pairs = case.window * (case.length - case.window / 2)
        return 4 * case.batch * case.heads * pairs * case.dim / ms * 1e-9

    def ours(self, backend: str, precision: str) -> Runs:
        """The whole call, and its parts: selection, quantisation where there is one, and the kernel by itself.

        Of "auto" the whole call alone: it may run dense attention, and select nothing.
        """
        masked, selector, case = self.call(self.mask, precision), self.selector, self.case
        declined = None if backend == "auto" else backends.get(backend).declines(masked)
        if declined is not None:
            raise Declined(declined)
        parts = {} if backend == "auto" else _parts(masked, backend)
        if selector is None:
            return Runs(parts["ms_kernel"], parts)

        def total() -> Tensor:
            return sparse_attention(
                self.q, self.k, self.v, selector, is_causal=case.is_causal, window=case.window, precision=precision,
                backend=backend, strict=True, expected_density=self.density,
            )  # fmt: skip

        if backend == "auto":
            return Runs(total, {"ms_total": total})
        unmasked = self.call(None, precision)
        return Runs(total, {"ms_total": total, "ms_select": lambda: select(selector, unmasked), **parts})

    def dense_by_choice(self, precision: str) -> str | None:
        """The dense backend that "auto" takes for a call of this setup; None where it runs sparse."""
        chosen = plan(self.call(None, precision), self.selector)
        return chosen.backend if chosen.instead_of is not None else None

    def sdpa(self, kernel: SDPBackend | None) -> Runs:
        options: dict[str, Any] = {"is_causal": self.case.is_causal, "enable_gqa": self.case.heads != self.case.k_heads}
        if self.case.window is not None:  # as transformers calls it
            options |= {"is_causal": False, "attn_mask": self.call(None).token_mask(0, self.case.length)}

        def total() -> Tensor:
            with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(self.q, self.k, self.v, **options)

        try:
            total()
        except RuntimeError as error:
            raise Declined(f"SDPA refuses: {error}") from error
        return Runs(total, {"ms_total": total})

    def rows(self) -> list[slice]:
        """The sampled query blocks: the first, the last, and some between."""
        blocks, size = self.mask.counts.shape[2], self.block_q
        chosen = sorted({round(i * (blocks - 1) / (SAMPLED_BLOCKS - 1)) for i in range(SAMPLED_BLOCKS)})
        return [slice(i * size, min((i + 1) * size, self.case.length)) for i in chosen]

    def error(self, out: Tensor, dense: bool) -> float:
        """Relative L1 of an output ``[B, Hq, L, D]`` against float32, on sampled rows."""
        if out.shape != self.q.shape:
            raise ValueError(f"the output has shape {tuple(out.shape)}, q has {tuple(self.q.shape)}")
        if dense not in self._truth:
            call = self.call(None if dense else self.mask)
            self._truth[dense] = torch.cat([_exact(call, rows) for rows in self.rows()], dim=2)
        return float(
            relative_l1(torch.cat([out[:, :, rows].float() for rows in self.rows()], dim=2), self._truth[dense])
        )


def _exact(call: Call, rows: slice) -> Tensor:
    """Exact attention of some rows, float32 ``[B, Hq, rows, D]``, a KV head at a time."""
    seen = call.token_mask(rows.start, rows.stop)
    seen = None if seen is None else seen.expand(*call.q.shape[:2], -1, -1)
    out = torch.empty_like(call.q[:, :, rows], dtype=torch.float32)
    for b, h in itertools.product(range(call.k.shape[0]), range(call.k.shape[1])):
        heads = slice(h * call.group, (h + 1) * call.group)
        scores = call.q[b, heads, rows].float() @ call.k[b, h].float().T * call.scale
        if seen is not None:
            scores = scores.masked_fill_(~seen[b, heads], -torch.inf)
        out[b, heads] = scores.softmax(-1) @ call.v[b, h].float()
    return out


def _parts(call: Call, backend: str) -> dict[str, Callable[[], Tensor]]:
    """Quantisation where there is one, and the kernel with everything prepared."""
    if backend != "triton" or call.precision == "native":
        return {"ms_kernel": lambda: backends.get(backend).run(call)}
    from spas_attn.kernels.launch import sparse_attention_fwd
    from spas_attn.kernels.prepare import prepare

    mask = call.mask
    assert mask is not None
    block_k, v = mask.block_k, call.v if call.precision == "int8_fp8" else None

    def quant() -> Any:
        return prepare(k=call.k, v=v, block_k=block_k, int8=True)

    made = quant()

    def kernel() -> Tensor:
        return sparse_attention_fwd(
            call.q, call.k, call.v, mask, scale=call.scale, is_causal=call.is_causal, precision=call.precision,
            keys=made.keys, values=made.values,
        )  # fmt: skip

    return {"ms_quant": quant, "ms_kernel": kernel}


def ragged_mask(case: AttentionCase, block_q: int, block_k: int, density: float, seed: int = 0) -> BlockMask:
    """A random mask that keeps ``density`` of the visible blocks of every head, the diagonal among them.

    Query blocks keep different numbers of key blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    nq, nk = cdiv(case.length, block_q), cdiv(case.length, block_k)
    visible = visible_blocks(case.length, case.length, block_q, block_k, is_causal=case.is_causal)
    # Rows differ in how much they like to keep, so that their counts differ.
    liking = torch.rand(case.batch, case.heads, nq, nk, generator=generator)
    liking += torch.rand(case.batch, case.heads, nq, 1, generator=generator)
    starts_q, starts_k = torch.arange(nq)[:, None] * block_q, torch.arange(nk) * block_k
    diagonal = (starts_k < starts_q + block_q) & (starts_q < starts_k + block_k)
    liking = liking.masked_fill(diagonal, 3.0).masked_fill(~visible, -1.0)
    best = liking.flatten(2).topk(round(density * int(visible.sum())), dim=-1).indices
    kept = torch.zeros(case.batch, case.heads, nq * nk, dtype=torch.bool).scatter_(-1, best, True)
    kept = kept.view(case.batch, case.heads, nq, nk) & visible
    return BlockMask.from_dense(kept, case.length, case.length, block_q, block_k)


A, B, CPU = (
    AttentionCase("A", 24, 24, 16384, 128), AttentionCase("B", 24, 24, 32768, 64), AttentionCase("cpu", 8, 8, 4096, 64)
)  # fmt: skip
GROWTH = (4, 8, 16, 32, 64, 128, 256, 512, 1024)  # thousands of tokens
SHAPES = (
    *(A, A.causal(), B, B.causal(), CPU, CPU.causal()),
    AttentionCase("CogVideoX-2B", 30, 30, 17776, 64),
    AttentionCase("Mochi", 24, 24, 22528, 128),
    AttentionCase("Wan-14B", 40, 40, 75600, 128),
    AttentionCase("Flux", 24, 24, 4608, 128),
    *(AttentionCase(f"{n}K", 24, 24, n * 1024, 128) for n in (4, 8)),
    AttentionCase("8K-causal", 24, 24, 8192, 128, is_causal=True),
    AttentionCase("SmolLM2", 9, 3, 8192, 64, is_causal=True),
    AttentionCase("Gemma-3-270M", 4, 1, 8192, 256, is_causal=True),
    AttentionCase("Gemma-3-270M-window", 4, 1, 8192, 256, is_causal=True, window=512),
    *(AttentionCase(f"growth-{n}K", 8, 8, n * 1024, 128, is_causal=True) for n in GROWTH),
    *(AttentionCase(f"Llama-3.1-8B-{n}K", 32, 8, n * 1024, 128, is_causal=True) for n in (8, 32, 128)),
)
CASES["attention"].update({case.name: case for case in SHAPES})
