"""What only a GPU can show of the Triton kernels; where there is one, the cases of test_triton.py run on it too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import BF16, F32, HALF, Case

from spas_attn import Call
from spas_attn.backends import reference
from spas_attn.backends import triton as backend
from spas_attn.block_mask import BlockMask, cdiv
from spas_attn.kernels import config
from spas_attn.metrics import relative_l1

pytestmark = pytest.mark.gpu
LIMIT = {"native": 0.003, "int8_bf16": 0.015, "int8_fp8": 0.042}
SIZES = [(16384, 128), (32768, 64)]


def full_size(length: int, dim: int, **more: object) -> Call:
    """Random inputs ``[1, 24, length, dim]`` drawn on the GPU."""
    changes = {name: more.pop(name) for name in ("precision", "pv_threshold") if name in more}
    case = Case(length, length, dim=dim, **{"heads": 24, "k_heads": 24, "density": 0.5, "dtype": BF16, **more})  # type: ignore[arg-type]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, length, dim, generator=generator, device="cuda", dtype=case.dtype)

    mask = None
    if case.density is not None:
        blocks = cdiv(length, 128)
        kept = torch.rand(1, case.heads, blocks, blocks, generator=generator, device="cuda") < case.density
        kept |= torch.eye(blocks, dtype=torch.bool, device="cuda")
        mask = BlockMask.from_dense(kept, length, length)
    call = Call(draw(case.heads), draw(case.k_heads), draw(case.k_heads), case.is_causal, dim**-0.5)
    return call.replace(**changes, mask=mask)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(("length", "dim"), SIZES)
def test_full_size(length: int, dim: int, is_causal: bool, precision: str, dtype: torch.dtype) -> None:
    call = full_size(length, dim, is_causal=is_causal, precision=precision, dtype=dtype)
    out = torch.full_like(call.q, float("nan"))
    backend.run(call, out=out)
    assert out.isfinite().all()
    error = relative_l1(out, reference.run(call)).item()
    assert error <= LIMIT[precision], f"relative L1 {error:.2e}"
    assert torch.equal(backend.run(call), out)


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize(("length", "dim"), SIZES)
def test_full_size_without_a_mask(length: int, dim: int, precision: str) -> None:
    call = full_size(length, dim, heads=8, k_heads=2, density=None, is_causal=True, precision=precision)
    error = relative_l1(backend.run(call), reference.run(call)).item()
    assert error <= LIMIT[precision], f"relative L1 {error:.2e}"


def test_full_size_fp32() -> None:
    call = full_size(8192, 64, heads=2, k_heads=1, is_causal=True, dtype=F32)
    assert relative_l1(backend.run(call), reference.run(call)) <= 1e-5


@pytest.mark.parametrize("precision", backend.PRECISIONS)
@pytest.mark.parametrize(("length", "dim"), SIZES)
def test_full_size_pv_skip(length: int, dim: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "skip_pays", lambda *arguments: True)
    threshold = torch.linspace(1.0, 1.6, 24, device="cuda")
    call = full_size(length, dim, precision=precision, pv_threshold=threshold)
    weak = torch.arange(length, device="cuda") // 128 % 2 > 0
    call = call.replace(k=torch.where(weak[:, None], call.k * 0.05, call.k))
    expected = reference.run(call)
    assert relative_l1(expected, reference.run(call.replace(pv_threshold=None))) > 2 * LIMIT[precision]
    assert relative_l1(backend.run(call), expected) <= LIMIT[precision]


CALLS: dict[str, Callable[[], Call]] = {
    "sparse": lambda: Case(1000, 1000, heads=4, k_heads=1, is_causal=True, dtype=BF16).call(device="cuda"),
    "padded": lambda: Case(300, 300, batch=2, padding="holes", dtype=HALF).call(device="cuda"),
    "int8": lambda: Case(300, 300, batch=2, padding="left", dtype=BF16).call(device="cuda", precision="int8_bf16"),
    "pv": lambda: Case(300, 300, dtype=HALF).call(device="cuda", pv_threshold=torch.ones(2, device="cuda")),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_host_synchronisation(name: str) -> None:
    call = CALLS[name]()
    expected = backend.run(call)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.run(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.run(call)
    graph.replay()
    assert torch.equal(captured, expected)


def test_grouped_heads_are_not_repeated_in_memory() -> None:
    call = full_size(16384, 128, heads=32, k_heads=1, is_causal=True)
    backend.run(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = backend.run(call)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * out.numel() * out.element_size()


def test_offsets_beyond_two_to_the_31() -> None:
    length, heads = 1_100_000, 16  # [1, length, heads, 128] has 2.25e9 elements
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    q = torch.randn(1, 128, heads, 128, dtype=BF16, device="cuda").transpose(1, 2)
    k = torch.zeros(1, length, heads, 128, dtype=BF16, device="cuda").transpose(1, 2)
    v = torch.zeros_like(k)
    blocks, tail = cdiv(length, 128), 128 * 3 + length % 128
    k[:, :, -tail:].normal_()
    v[:, :, -tail:].normal_()
    kept = torch.arange(blocks, device="cuda") >= blocks - 4
    mask = BlockMask.from_dense(kept.expand(1, heads, 1, -1), 128, length)
    call = Call(q, k, v, True, 128**-0.5).replace(mask=mask)
    small = Call(q, k[:, :, -tail:], v[:, :, -tail:], True, 128**-0.5)
    assert relative_l1(backend.run(call), reference.run(small)) <= LIMIT["native"]


def test_other_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = Case(300, 300, is_causal=True, dtype=HALF).call(device="cuda:1")
    assert relative_l1(backend.run(call), reference.run(call)) <= LIMIT["native"]
