"""Triton kernels against the reference: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from cases import BF16, CASES, F32, HALF, Case
from torch import Tensor

from spas_attn import Call, sparse_attention
from spas_attn.backends import reference
from spas_attn.backends import triton as backend
from spas_attn.block_mask import BlockMask
from spas_attn.metrics import relative_l1
from spas_attn.selectors import Tokens, TopK

pytest.importorskip("triton")
select_module = importlib.import_module("spas_attn.select")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {HALF: 0.003, BF16: 0.003, F32: 1e-5}  # relative L1 to the reference on the same inputs
EIGHT_BITS = {"int8_bf16": 0.015, "int8_fp8": 0.042}  # for scores of standard deviation 1; it grows with them


def limit(call: Call) -> float:
    if call.precision == "native":
        return EXACT[call.q.dtype]
    return EIGHT_BITS[call.precision] * max(1.0, call.scale * call.q.shape[-1] ** 0.5)


def assert_close(out: Tensor, call: Call, expected: Tensor | None = None, strength: float = 1.0) -> None:
    expected = reference.run(call) if expected is None else expected
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert out.isfinite().all()
    empty = (expected == 0).all(-1)
    assert (out[empty] == 0).all()
    if not empty.all():
        error, allowed = relative_l1(out, expected).item(), limit(call) * strength
        assert error <= allowed, f"relative L1 {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, precision: str) -> None:
    call = case.call(device=DEVICE, precision=precision)
    # Every row is written, whatever was there before.
    out = torch.full_like(call.q, 1e4)
    out[..., ::2, :] = float("nan")
    assert backend.run(call, out=out) is out
    assert_close(out, call)


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("case", [CASES[7], CASES[5], CASES[16]], ids=str)
def test_same_bits_twice(case: Case, precision: str) -> None:
    call = case.call(device=DEVICE, precision=precision)
    assert torch.equal(backend.run(call), backend.run(call))


@pytest.mark.parametrize("precision", backend.PRECISIONS)
def test_inputs_stay_untouched(precision: str) -> None:
    case = Case(129, 200, batch=2, padding="holes", layout="NHD", is_causal=True, dtype=BF16)
    call = case.call(device=DEVICE, precision=precision, pv_threshold=torch.tensor([3.0, 50.0], device=DEVICE))
    assert call.mask is not None
    assert call.attn_mask is not None
    tensors = [call.q, call.k, call.v, call.attn_mask, call.mask.counts, call.mask.indices, call.pv_threshold]
    before = [x.clone() for x in tensors if x is not None]
    backend.run(call)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True) if b is not None)


CAUSAL = [
    Case(300, 300, is_causal=True, heads=4, k_heads=1, dtype=HALF),
    Case(200, 500, is_causal=True, dtype=F32, block_q=64, block_k=64),
    Case(300, 300, is_causal=True, window=100, dtype=BF16, layout="NHD"),
    Case(257, 257, is_causal=True, density=None, dtype=HALF, padding="left"),
]


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_later_tokens_do_not_matter(case: Case, precision: str) -> None:
    call = case.call(device=DEVICE, precision=precision)
    keys = 140  # the boundary lies inside a diagonal block
    rows = max(0, keys - (case.k_len - case.q_len))
    other = case.call(seed=1, device=DEVICE)
    factor = 100 if precision == "native" else 1
    changed = [x.clone() for x in (call.q, call.k, call.v)]
    for x, y, first in zip(changed, (other.q, other.k, other.v), (rows, keys, keys), strict=True):
        x[:, :, first:] = y[:, :, first:] * factor
    before = backend.run(call)[:, :, :rows]
    after = backend.run(call.replace(q=changed[0], k=changed[1], v=changed[2]))[:, :, :rows]
    if precision == "native":
        assert torch.equal(before, after)
    elif rows:
        assert relative_l1(after, before) <= 2 * EIGHT_BITS[precision]


STRENGTH = 1.5  # of the strong keys below
SKIPPING = [
    Case(300, 300, heads=4, k_heads=2, dtype=HALF, density=0.9),
    Case(300, 400, is_causal=True, dtype=HALF, dim=128, block_q=64, density=0.9),
    Case(200, 500, is_causal=True, dtype=F32, block_k=64, density=0.9, padding="holes"),
    Case(300, 300, dtype=BF16, block_q=64, block_k=64, dim=80, density=0.9),
    Case(300, 300, is_causal=True, window=150, dtype=HALF, density=1.0, block_q=64, block_k=64),
]


@pytest.fixture
def skip_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """PV skip is carried out also where this GPU would rather leave it out."""
    from spas_attn.kernels import config

    monkeypatch.setattr(config, "skip_pays", lambda *arguments: True)


def peaked(case: Case, precision: str) -> Call:
    """A call in which blocks of strong and of weak keys alternate, so that a threshold near 1 skips weak ones."""
    call = case.call(device=DEVICE, precision=precision)
    weak = torch.arange(case.k_len, device=DEVICE) // 128 % 2 > 0
    return call.replace(k=torch.where(weak[:, None], call.k * 0.05, call.k * STRENGTH))


@pytest.mark.usefixtures("skip_pays")
@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("case", SKIPPING, ids=str)
def test_pv_skip(case: Case, precision: str) -> None:
    call = peaked(case, precision)
    threshold = torch.linspace(1.0, 1.6, case.heads, device=DEVICE)
    skipping = call.replace(pv_threshold=threshold)
    expected, exact = reference.run(skipping), reference.run(call)
    least = (2 if precision == "int8_fp8" else 4) * STRENGTH * limit(call)
    assert relative_l1(expected, exact) > least, "these thresholds skip nothing"
    assert backend.pv_skip_left_out(skipping) is None
    assert_close(backend.run(skipping), call, expected, STRENGTH)
    assert_close(backend.run(call.replace(pv_threshold=torch.full_like(threshold, 50.0))), call, exact, STRENGTH)


@pytest.mark.usefixtures("skip_pays")
def test_pv_skip_is_per_head_and_may_skip_everything() -> None:
    call = peaked(SKIPPING[0], "native").replace(pv_threshold=torch.tensor([0.0, 50.0, 0.0, 50.0], device=DEVICE))
    out = backend.run(call)
    assert (out[:, ::2] == 0).all()
    assert_close(out[:, 1::2], call, reference.run(call.replace(pv_threshold=None))[:, 1::2])


def test_pv_skip_is_left_out_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    from spas_attn.kernels import config

    monkeypatch.setattr(config, "skip_pays", lambda *arguments: False)
    call = peaked(SKIPPING[0], "int8_bf16")
    asked = call.replace(pv_threshold=torch.zeros(4, device=DEVICE))
    assert "more time than" in (backend.pv_skip_left_out(asked) or "")
    assert torch.equal(backend.run(asked), backend.run(call))


@pytest.mark.usefixtures("skip_pays")
def test_pv_skip_is_left_out_where_whole_blocks_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from spas_attn.kernels import config

    monkeypatch.setattr(config, "shared_memory_limit", lambda device: 101_376)
    call = Case(129, 200, dim=256, dtype=HALF).call(device=DEVICE)
    asked = call.replace(pv_threshold=torch.tensor([0.0, 0.0], device=DEVICE))
    reason = backend.pv_skip_left_out(asked)
    assert reason is not None
    assert "128 x 128" in reason
    assert "256" in reason
    assert torch.equal(backend.run(asked), backend.run(call))


def test_pv_threshold_without_a_mask_skips_nothing() -> None:
    call = Case(129, 200, density=None).call(device=DEVICE)
    asked = call.replace(pv_threshold=torch.zeros(2, device=DEVICE))
    assert backend.pv_skip_left_out(asked) == "there is no block mask"
    assert_close(backend.run(asked), asked)


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("padding", [None, "right"])
def test_outlier_key_channels(padding: str | None, precision: str) -> None:
    """Three channels of K around 50: what smoothing is for. Padded keys hold garbage, which must not enter the mean."""
    call = Case(200, 300, dim=128, dtype=HALF, padding=padding).call(device=DEVICE, precision=precision)
    k = call.k.clone()
    k[..., [3, 70, 101]] += torch.tensor([50.0, -50.0, 50.0], dtype=HALF, device=DEVICE)
    if call.attn_mask is not None:
        k[(~call.attn_mask)[:, None].expand(k.shape[:3])] = 6e4
    call = call.replace(k=k)
    assert_close(backend.run(call), call)


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("dtype", [HALF, BF16, F32], ids=str)
def test_constant_rows(dtype: torch.dtype, precision: str) -> None:
    call = Case(130, 140, dim=32, dtype=dtype, is_causal=True).call(device=DEVICE, precision=precision)
    call = call.replace(q=torch.ones_like(call.q), k=torch.full_like(call.k, 3.0))
    assert_close(backend.run(call), call)
    zeros = call.replace(q=torch.zeros_like(call.q), k=torch.zeros_like(call.k))
    assert_close(backend.run(zeros), zeros)


@pytest.mark.parametrize("precision", backend.PRECISIONS)
def test_values_near_the_end_of_fp16(precision: str) -> None:
    call = Case(150, 200, dim=64, dtype=HALF, density=None).call(device=DEVICE, precision=precision)
    big = torch.finfo(HALF).max
    same = call.replace(v=torch.full_like(call.v, big))
    # In fp8 the weights are rounded, but not their sum.
    assert (backend.run(same) / big - 1).abs().max() <= (0.03 if precision == "int8_fp8" else 0)
    for q, k in ((call.q.sign() * big, call.k.sign() * big), (call.q, call.k.sign() * big)):
        out = backend.run(call.replace(q=q, k=k, v=call.v.sign() * big))
        assert out.isfinite().all()


@pytest.mark.parametrize("block_k", [64, 128])
def test_values_whose_blocks_differ_in_size(block_k: int) -> None:
    """The scale of a block of fp8 values rides on the weights: neither the output nor the log-sum-exp may show it."""
    case = Case(70, 380, dim=32, dtype=HALF, block_k=block_k, padding="right")
    call = case.call(device=DEVICE, precision="int8_fp8")
    size = torch.tensor([1.0, 1e-3, 0.0, 30.0, 0.02, 0.0], device=DEVICE, dtype=HALF).repeat_interleave(64)[:380]
    call = call.replace(v=call.v * size[:, None])
    out, lse = backend.run_with_lse(call)
    assert_close(out, call)
    assert (lse - reference.run_with_lse(call)[1]).abs().max() < 0.05
    silent = call.replace(v=torch.zeros_like(call.v))
    out, lse = backend.run_with_lse(silent)
    assert (out == 0).all()
    assert (lse - reference.run_with_lse(silent)[1]).abs().max() < 0.05


def test_zero_stride_and_transposed_inputs() -> None:
    case = Case(130, 200, heads=4, k_heads=2, dtype=HALF)
    call = case.call(device=DEVICE)
    assert call.mask is not None
    shared = BlockMask(call.mask.counts[:, :1], call.mask.indices[:, :1], 128, 128, 130, 200)
    call = call.replace(
        k=call.k[:, :1].expand(-1, 2, -1, -1), v=call.v.transpose(2, 3).contiguous().transpose(2, 3), mask=shared
    )
    expanded = BlockMask(shared.counts.expand(-1, 4, -1), shared.indices.expand(-1, 4, -1, -1), 128, 128, 130, 200)
    assert_close(backend.run(call), call, reference.run(call.replace(mask=expanded)))


def test_kept_blocks_that_nobody_sees() -> None:
    """Rows whose kept blocks are all in the future or empty give 0."""
    case = Case(300, 300, is_causal=True, density=0.0, dtype=HALF)
    call = case.call(device=DEVICE)
    kept = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
    kept[:, 0, 0, 2] = True  # the future
    kept[:, 0, 2, 1] = True
    call = call.replace(mask=BlockMask.from_dense(kept, 300, 300).to(DEVICE))
    out = backend.run(call)
    assert (out[:, 0, :256] == 0).all()
    assert (out[:, 1] == 0).all()
    assert_close(out, call)


GPUS = [
    ("A100", (8, 0), 166_912),
    ("RTX 3090", (8, 6), 101_376),
    ("RTX 4090", (8, 9), 101_376),
    ("H200", (9, 0), 232_448),
    ("B200", (10, 0), 232_448),
    ("RTX 5090", (12, 0), 101_376),
]


@pytest.mark.parametrize(("architecture", "shared_memory"), [gpu[1:] for gpu in GPUS], ids=[gpu[0] for gpu in GPUS])
@pytest.mark.parametrize("kind", ["half", "int8", "fp8", "float"])
def test_configurations_fit(kind: str, architecture: tuple[int, int], shared_memory: int) -> None:
    from spas_attn.kernels import config

    for dim in (16, 32, 64, 128, 256):
        for blocks in ((128, 128), (64, 128), (128, 64), (64, 64), None):
            chosen = config.choose(kind, dim, shared_memory, blocks, architecture)
            assert chosen.shared_memory(kind, dim) < shared_memory
            if blocks is not None:
                assert blocks[0] % chosen.block_m == 0
                assert blocks[1] % chosen.block_n == 0
                whole = config.choose_whole_blocks(kind, dim, shared_memory, blocks)
                assert whole is None or (whole.block_m, whole.block_n) == blocks
    assert config.choose_whole_blocks("half", 128, shared_memory, (128, 128)) is not None


DECLINED = [
    ({"attn_mask": torch.ones(1, 1, 129, 200, dtype=torch.bool)}, "4-D"),
    ({"precision": "fp8"}, "fp8"),
]


@pytest.mark.parametrize(("changes", "reason"), DECLINED, ids=lambda x: x if isinstance(x, str) else "")
def test_declines(changes: dict[str, object], reason: str) -> None:
    declined = backend._declines(Case(129, 200).call(device=DEVICE, **changes))
    assert declined is not None
    assert reason in declined


def test_declines_types_and_dims() -> None:
    call = Case(129, 200).call(device=DEVICE)
    assert backend._declines(call) is None
    assert "float64" in str(backend._declines(call.replace(q=call.q.double())))
    assert "320" in str(backend._declines(Case(64, 64, dim=320).call(device=DEVICE)))


def test_missing_and_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend._missing() is None
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in str(backend._missing())
    assert "cpu" in str(backend._declines(Case(129, 200).call()))
    monkeypatch.setattr(backend, "_INSTALLED", False)
    assert "not installed" in str(backend._missing())


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("dim", [24, 40, 56, 88, 104, 120, 136])
def test_head_dims_that_are_no_multiple_of_16(dim: int, precision: str) -> None:
    """On an H200, Q of such head dims was once quantised to zeros."""
    call = Case(130, 200, heads=4, k_heads=2, dim=dim, dtype=HALF).call(device=DEVICE, precision=precision)
    assert_close(backend.run(call), call)


LSE_CASES = [
    Case(200, 300, heads=4, k_heads=2, dtype=HALF),
    Case(200, 300, dtype=F32, is_causal=True, padding="holes"),
    Case(129, 200, batch=2, padding="one row empty", dtype=HALF),
]


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("case", LSE_CASES, ids=str)
def test_log_sum_exp(case: Case, precision: str) -> None:
    """Also where K is smoothed, which lowers every score of a row by the same."""
    call = case.call(device=DEVICE, precision=precision)
    call = call.replace(k=call.k + 2.0)
    out, lse = backend.run_with_lse(call)
    expected_out, expected = reference.run_with_lse(call)
    assert torch.equal(lse == -torch.inf, expected == -torch.inf)
    seen = expected > -torch.inf
    assert (lse[seen] - expected[seen]).abs().max() <= (1e-3 if precision == "native" else 0.1)
    assert_close(out, call, expected_out)


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("case", [LSE_CASES[0], CASES[18]], ids=str)
def test_compiles_without_a_graph_break(case: Case, precision: str) -> None:
    call = case.call(device=DEVICE)
    selector = TopK(0.5) | Tokens(((0, 10),))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(
            q, k, v, selector, is_causal=call.is_causal, window=call.window, precision=precision, backend="triton"
        )

    expected = attend(call.q, call.k, call.v)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call.q, call.k, call.v), expected)


def test_autocast_changes_nothing() -> None:
    q, k, v = (x.to(DEVICE) for x in torch.randn(3, 1, 2, 70, 32))
    expected = sparse_attention(q, k, v, TopK(0.5), backend="triton", strict=True)
    with torch.autocast(DEVICE, dtype=BF16):
        out = sparse_attention(q, k, v, TopK(0.5), backend="triton", strict=True)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("precision", backend.PRECISIONS)
def test_custom_operators_keep_their_promises(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Case(130, 200, heads=4, k_heads=2, dtype=HALF, padding="right").call(device=DEVICE)
    mask = call.mask
    assert mask is not None
    torch.library.opcheck(
        torch.ops.spas_attn.triton_attention.default,
        (call.q, call.k, call.v, mask.counts, mask.indices, 128, 128, call.attn_mask, *[None] * 6, 0.1, True, 50)
        + (precision, True),
    )
    given: list[tuple[Any, ...]] = []
    operator = select_module._fused_op
    monkeypatch.setattr(select_module, "_fused_op", lambda *args: given.append(args) or operator(*args))
    selector = TopK(0.5, local=0) | Tokens(((0, 70),))
    call = call.replace(precision=precision)
    select_module._fused_traced(select_module.parts_of(selector, call), call, precision != "native")
    torch.library.opcheck(torch.ops.spas_attn.select_blocks.default, given[0])
