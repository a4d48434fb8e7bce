"""A dozen awkward calls for compute-sanitizer, which finds accesses beyond a tensor; wrong results exit with 1.

    compute-sanitizer --tool memcheck python tests/spas_attn/memcheck_cases.py

Every tensor is an allocation of its own here. With torch's caching allocator they would lie in one, and an access
beyond one tensor would fall into the next, unnoticed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cases import BF16, F32, HALF, Case

from spas_attn import Call, backends
from spas_attn.backends import reference, triton
from spas_attn.fused import run_fused
from spas_attn.gradients import compute
from spas_attn.kernels import config
from spas_attn.metrics import relative_l1
from spas_attn.select import parts_of
from spas_attn.selectors import (
    ExactKeys,
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    Selector,
    Tokens,
    TopK,
    XAttention,
)

# Lengths end inside a block and inside a tile. Of the head dims, 36 and 72 cannot be loaded by the copy engine.
ATTENTION = [
    (Case(1, 129, dim=80, dtype=BF16), "native"),
    (Case(65, 300, dim=36, heads=4, k_heads=1, is_causal=True, layout="strided", dtype=HALF), "native"),
    (Case(129, 257, dim=96, heads=4, k_heads=2, batch=2, padding="holes", block_k=64, dtype=HALF), "native"),
    (Case(127, 127, dim=24, is_causal=True, density=None, layout="NHD", dtype=F32), "native"),
    (Case(200, 333, dim=256, is_causal=True, window=100, dtype=BF16), "native"),
    (Case(130, 201, dim=40, heads=4, k_heads=1, is_causal=True, dtype=HALF), "int8_bf16"),
    (Case(63, 190, dim=128, batch=2, padding="left", block_q=64, block_k=64, dtype=BF16), "int8_bf16"),
    (Case(130, 201, dim=72, heads=4, k_heads=2, is_causal=True, layout="NHD", dtype=BF16), "int8_fp8"),
    (Case(129, 333, dim=128, is_causal=True, window=70, padding="right", dtype=HALF), "int8_fp8"),
]
GRADIENTS = [
    *[case for case, precision in ATTENTION if precision == "native" and case.density is not None],
    Case(130, 201, dim=64, heads=4, k_heads=2, is_causal=True, block_q=64, block_k=64, dtype=BF16),
    Case(3000, 3000, dim=32, heads=4, k_heads=1, is_causal=True, block_q=64, block_k=64, density=0.03, dtype=HALF),
]
TOKENS = Tokens(((3, 9),), block_q=64, block_k=64)
SELECTION: list[tuple[Case, Selector]] = [
    (Case(201, 333, dim=40, heads=4, k_heads=1, batch=2, padding="holes", dtype=BF16), MeanSimilarity(0.6, 0.3)),
    (Case(130, 261, dim=80, heads=4, k_heads=2, is_causal=True, window=90, dtype=HALF), MeanSimilarity(0.5, 0.3)),
    (Case(65, 300, dim=72, layout="strided", dtype=HALF), TopK(0.4) | Tokens(((3, 9),))),
    (Case(130, 261, dim=80, heads=6, k_heads=2, is_causal=True, window=90, dtype=HALF), ExactKeys(0.5)),
    (Case(201, 333, dim=40, heads=4, k_heads=1, batch=2, padding="holes", dtype=BF16), ExactKeys(0.6, 16, "sample")),
    (Case(65, 300, dim=72, layout="strided", dtype=F32), ExactKeys(0.4, block_q=64, block_k=64) | TOKENS),
    (Case(130, 261, dim=80, heads=4, k_heads=2, is_causal=True, window=90, dtype=HALF), XAttention(0.6)),
    (Case(201, 333, dim=40, heads=4, k_heads=1, batch=2, padding="holes", dtype=BF16), XAttention(0.7, 8)),
    (Case(130, 333, dim=72, heads=4, k_heads=2, is_causal=True, layout="NHD", dtype=BF16), FlashPrefill(0.4)),
    (Case(129, 333, dim=56, heads=4, k_heads=2, is_causal=True, dtype=HALF), FlexPrefill(0.7, 0.5, 128, 256)),
    (Case(200, 333, dim=96, heads=4, k_heads=1, is_causal=True, dtype=BF16), MInference(adaptive_budget=0.3)),
]
LIMIT = {"native": 0.003, "int8_bf16": 0.02, "int8_fp8": 0.05}


def wrong(call: Call) -> str | None:
    """What is wrong with the kernels' result for a call, else None."""
    out = triton.run(call)
    error = relative_l1(out, reference.run(call)).item()
    return None if error <= LIMIT[call.precision] else f"relative L1 {error:.2e}"


def wrong_lse(call: Call) -> str | None:
    got, expected = triton.run_with_lse(call)[1], reference.run_with_lse(call)[1]
    seen = expected > -torch.inf
    return None if (got - expected)[seen].abs().max() <= 0.1 else "the log of the sum of the exponentials"


def wrong_gradients(case: Case) -> str | None:
    """Gradients that differ from those of float32 autograd."""
    call = case.call(device="cuda")
    leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
    truths = [x.detach().float().requires_grad_() for x in leaves]
    out, expected = (
        compute(backends.get(name), call.replace(**dict(zip("qkv", inputs, strict=True))))
        for name, inputs in (("triton", leaves), ("reference", truths))
    )
    weight = torch.randn_like(expected)
    mine, truth = torch.autograd.grad(out, leaves, weight.to(out.dtype)), torch.autograd.grad(expected, truths, weight)
    error = max(relative_l1(a.float(), b).item() for a, b in zip(mine, truth, strict=True))
    return None if error <= 0.02 else f"relative L1 {error:.2e}"


def wrong_selection(case: Case, selector: Selector) -> str | None:
    """Blocks that differ from the torch code's, but for one tie, or a wrong result from them and the int8 keys."""
    call, here = case.call(device="cuda", mask=None), case.call(mask=None)
    call = call.replace(precision="int8_fp8")
    mask, made = run_fused(parts_of(selector, call), call, quantise=True)
    differ = int((mask.to("cpu").to_dense() != selector.kept(here)).sum())
    return f"{differ} blocks" if differ > 1 else wrong(call.replace(mask=mask, keys=made.keys, values=made.values))


def main() -> int:
    failures = 0
    results = [
        (f"{case} {precision}", wrong(case.call(device="cuda", precision=precision))) for case, precision in ATTENTION
    ]
    for case, precision in (ATTENTION[2], ATTENTION[7]):
        results.append((f"{case} {precision} lse", wrong_lse(case.call(device="cuda", precision=precision))))
    results += [(f"{case} gradients", wrong_gradients(case)) for case in GRADIENTS]
    config.skip_pays = lambda *facts: True  # also where this GPU would leave PV skip out
    skipping = Case(130, 333, dim=56, heads=4, k_heads=2, is_causal=True, dtype=HALF, density=0.9)
    results.append(
        (f"{skipping} pv skip", wrong(skipping.call(device="cuda", pv_threshold=torch.full((4,), 1.0).cuda())))
    )
    results += [(f"{case} {selector}", wrong_selection(case, selector)) for case, selector in SELECTION]
    for name, fault in results:
        print("ok   " if fault is None else "WRONG", name, fault or "")
        failures += fault is not None
    torch.cuda.synchronize()
    return failures


if __name__ == "__main__":
    sys.exit(min(1, main()))
