"""Backend `flex`: FlexAttention, compiled for a CPU and uncompiled, against `reference`; refusals."""

from __future__ import annotations

import pytest
import torch
from cases import BF16, CASES, F32, HALF, Case
from made_up_gpu import FakeGpu
from torch.nn.attention.flex_attention import flex_attention

from spas_attn import backends
from spas_attn.backends import flex, reference
from spas_attn.metrics import relative_l1

PLAIN = [case for case in CASES if case.density is not None and case.window is None and case.padding is None]
SMALL = [case for case in PLAIN if case.q_len * case.k_len * case.heads <= 300_000]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_mask_means_the_same_uncompiled(case: Case) -> None:
    """Uncompiled FlexAttention ignores the lists of blocks and goes by the function for tokens alone."""
    call = case.call()
    assert call.mask is not None
    block_mask = flex.flex_mask(call.mask, case.is_causal)
    out = flex_attention(call.q, call.k, call.v, block_mask=block_mask, scale=call.scale, enable_gqa=call.group > 1)
    assert relative_l1(out, reference.run(call)) < (1e-5 if case.dtype == F32 else 0.003)


@pytest.mark.slow
def test_compiled_for_a_cpu() -> None:
    call = Case(300, 500, heads=4, k_heads=2, is_causal=True, block_q=64).call()
    assert relative_l1(flex.run(call), reference.run(call)) < 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
def test_most_blocks_are_full(is_causal: bool) -> None:
    """Only full blocks are spared the token mask."""
    mask = Case(1000, 1000, density=1.0, is_causal=is_causal).call().mask
    assert mask is not None
    block_mask = flex.flex_mask(mask, is_causal)
    full, partial = block_mask.full_kv_num_blocks[0, 0].tolist(), block_mask.kv_num_blocks[0, 0].tolist()
    assert full == (list(range(8)) if is_causal else [7] * 8)
    assert partial == [1] * 8


REFUSED = [
    (Case(200, 200, density=None), {}, "block mask"),
    (Case(200, 200, padding="left"), {}, "attention masks"),
    (Case(200, 200, is_causal=True, window=50), {}, "windows"),
    (Case(200, 200), {}, "cpu"),
]


@pytest.mark.parametrize(("case", "changes", "reason"), REFUSED, ids=str)
def test_refusals(case: Case, changes: dict[str, object], reason: str) -> None:
    assert reason in str(flex.declines(case.call(**changes)))


def test_missing(gpu_like: FakeGpu) -> None:
    assert backends.get("flex").missing() == "no CUDA GPU"
    gpu_like.is_there = True
    assert backends.get("flex").missing() is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(2000, 2000, dim=128, dtype=BF16, density=0.3),
        Case(2000, 2000, dim=64, dtype=HALF, heads=8, k_heads=2, density=0.3, is_causal=True),
        Case(1000, 3001, dim=128, dtype=BF16, density=0.3, is_causal=True, block_q=64, block_k=64),
    ],
    ids=str,
)
def test_on_a_gpu(case: Case) -> None:
    call = case.call(device="cuda")
    assert flex.declines(call) is None
    assert relative_l1(flex.run(call), reference.run(call)) < 0.003
    torch.testing.assert_close(flex.run_with_lse(call)[1], reference.run_with_lse(call)[1], rtol=1e-3, atol=1e-3)
