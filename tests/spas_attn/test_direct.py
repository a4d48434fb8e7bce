"""Launches through the CUDA driver: what the driver is handed, on a made-up driver; and on a GPU, that it is right."""

from __future__ import annotations

import ctypes
import inspect
import struct
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spas_attn import replay, sparse_attention
from spas_attn.again import attend_again
from spas_attn.kernels import direct
from spas_attn.kernels.direct import Driver, Parameters, Prepared
from spas_attn.kernels.plans import Leaf
from spas_attn.kernels.recorded import Launch, Place
from spas_attn.selectors import ExactKeys, MeanSimilarity, Selector, Tokens, TopK

LAYOUT = ((2, 4, 8, 16), (512, 128, 16, 1), torch.float16)
META = {"swizzle": 2, "elem_size": 2, "elem_type": 8, "block_size": [1, 1, 8, 16], "fp4_padded": False}
PTX = """
.visible .entry a_kernel(
	.param .u64 .ptr .global .align 1 a_kernel_param_0,
	.param .u32 a_kernel_param_1,
	.param .f32 a_kernel_param_2,
	.param .align 64 .b8 a_kernel_param_3[128],
	.param .u32 p4, .param .u32 p5, .param .u32 p6, .param .u32 p7,
	.param .u64 p8, .param .u64 p9, .param .u64 p10, .param .u64 p11,
	.param .u64 .ptr .global .align 1 a_kernel_param_12{scratch}
)
.reqntid 128
{{ ld.param.u64 %rd1, [a_kernel_param_0]; }}
"""
SCRATCH = ",\n	.param .u64 .ptr .global .align 1 a_kernel_param_{}"


class Library:
    """Stands for libcuda: notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.code = 0

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any) -> int:
            self.calls.append((name, args))
            return self.code

        return called


def a_kernel(x: Any, one: Any, rows: Any, scale: Any, desc: Any, out: Any, SIZE: Any = 64) -> None:
    """The arguments of a kernel."""


def leaf(source: int, offset: int = 0) -> Leaf:
    return Leaf(Place(source, offset), LAYOUT)  # type: ignore[arg-type]


def a_launch(ptx: str = PTX.format(scratch=SCRATCH.format(13)), **facts: Any) -> Launch:
    signature = {
        "x": "*fp16", "one": "constexpr", "rows": ("i32", "constexpr"), "scale": "fp32",
        "desc": "tensordesc<fp16[1, 1, 8, 16]>", "out": "*fp32", "SIZE": "constexpr",
    }  # fmt: skip
    metadata = {"num_ctas": 1, "num_warps": 4, "shared": 1000, "tensordesc_meta": [META], **facts}
    compiled = SimpleNamespace(
        metadata=SimpleNamespace(**metadata), src=SimpleNamespace(signature=signature), asm={"ptx": ptx}, function=77
    )
    desc = SimpleNamespace(base=leaf(1, 4096), shape=LAYOUT[0], strides=LAYOUT[1], padding="zero")
    args = (leaf(0, 32), 1, (7, 1), 0.5, desc, leaf(2))
    kernel = SimpleNamespace(signature=inspect.signature(a_kernel))
    return Launch(kernel, (5, 6), args, {"num_warps": 4}, compiled)


def test_a_launch_as_the_driver_takes_it() -> None:
    """Parameters in their order, constants left out, a tensor map made once and readdressed later."""
    prepared = Prepared.of(a_launch())
    assert prepared is not None
    assert (prepared.function, prepared.grid, prepared.threads, prepared.shared) == (77, (5, 6, 1), 128, 1000)
    library = Library()
    parameters = Parameters(Driver(library), [prepared], lambda x: x.place)
    parameters.point([1000, 20000, 3000], 9)
    ((config, function, array),) = parameters.launches
    read = direct.Config.from_address(config)
    assert (read.grid_x, read.grid_y, read.grid_z, read.block_x, read.shared, read.stream) == (5, 6, 1, 128, 1000, 9)
    assert function == 77
    at = (ctypes.c_void_p * 14).from_address(array)
    values = [ctypes.string_at(at[i], 8) for i in range(14)]
    assert struct.unpack("<q", values[0]) == (1032,)
    assert struct.unpack("<i", values[1][:4]) == (7,)
    assert struct.unpack("<f", values[2][:4]) == (0.5,)
    assert [struct.unpack("<i", x[:4])[0] for x in values[4:8]] == [2, 4, 8, 16]
    assert [struct.unpack("<q", x)[0] for x in values[8:12]] == [512, 128, 16, 1]
    assert [struct.unpack("<q", x)[0] for x in values[12:]] == [3000, 0]
    (name, encoded), *rest = library.calls
    assert (name, rest) == ("cuTensorMapEncodeTiled", [])
    assert at[3] == encoded[0] and at[3] % 64 == 0
    assert encoded[1:4] == (10, 4, 24096)  # bf16 in the driver's numbers
    assert [list(x) for x in encoded[4:8]] == [[16, 8, 4, 2], [32, 256, 1024, 0], [16, 8, 1, 1], [1] * 4]
    assert encoded[8:] == (0, 2, 2, 0)
    parameters.point([1000, 30000, 4000], 9)
    assert library.calls[1:] == [("cuTensorMapReplaceAddress", (at[3], 34096))]
    assert struct.unpack("<q", ctypes.string_at(at[12], 8)) == (4000,)
    parameters.point([1000, 30000, 4000], 10)
    assert len(library.calls) == 2 and read.stream == 10


@pytest.mark.parametrize(
    ("ptx", "facts"),
    [
        (PTX.format(scratch="".join(SCRATCH.format(n) for n in (13, 14, 15))), {}),
        (PTX.replace(".u32 a_kernel_param_1", ".u64 a_kernel_param_1").format(scratch=""), {}),
        ("", {}),
        (PTX.format(scratch=""), {"tensordesc_meta": None}),
        (PTX.format(scratch=""), {"num_ctas": 2}),
        (PTX.format(scratch=""), {"global_scratch_size": 8}),
        (PTX.format(scratch=""), {"launch_pdl": True}),
        (PTX.format(scratch=""), {"tensordesc_meta": [{"another": "layout"}]}),
    ],
)
def test_what_is_left_to_triton(ptx: str, facts: dict[str, Any]) -> None:
    assert Prepared.of(a_launch(PTX.format(scratch=""))) is not None
    assert Prepared.of(a_launch(ptx, **facts)) is None


def test_errors_of_the_driver() -> None:
    library = Library()
    cuda = Driver(library)
    cuda.check(0)
    library.code = 700
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        cuda.check(cuda.launch(1, 2, 3, None))


GPU_CASES: dict[str, tuple[Selector, dict[str, Any]]] = {
    "mean": (MeanSimilarity(0.5, pool=8, block_q=64, block_k=64), {}),
    "exact keys": (ExactKeys(0.5, block_q=64, block_k=64), {"is_causal": True, "precision": "int8_fp8"}),
    "8 bits": (TopK(0.3), {"precision": "int8_fp8"}),
    "causal": (TopK(0.3, block_q=64), {"is_causal": True, "window": 300, "precision": "int8_bf16"}),
    "text": (TopK(0.3) | Tokens(((0, 70),)), {"precision": "int8_fp8"}),
}


def inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(1, n, 1000, 128, generator=generator, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2)]


def run(x: list[Tensor], case: tuple[Selector, dict[str, Any]]) -> Tensor:
    return sparse_attention(*x, case[0], backend="triton", strict=True, **case[1])


def expected(x: list[Tensor], case: tuple[Selector, dict[str, Any]]) -> Tensor:
    known, replay.DEVICES = replay.DEVICES, set()
    try:
        return run(x, case)
    finally:
        replay.DEVICES = known


def is_direct() -> bool:
    return all(entry.plan is not None and entry.plan.prepared is not None for entry in replay._entries.values())


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_same_bits_on_a_gpu(case: tuple[Selector, dict[str, Any]]) -> None:
    replay.forget()
    calls = [inputs(seed) for seed in (0, 1)]
    wanted = [expected(x, case) for x in calls]
    for i in (0, 1, 0, 1, 1):
        assert torch.equal(run(calls[i], case), wanted[i])
    assert is_direct()


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_streams(case: tuple[Selector, dict[str, Any]]) -> None:
    """Each stream's workspaces are its own."""
    replay.forget()
    calls = [inputs(seed) for seed in range(4)]
    wanted = [expected(x, case) for x in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(8):
        outs = []
        for stream, x in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                outs.append(run(x, case))
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out, want in zip(outs, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_capture(case: tuple[Selector, dict[str, Any]]) -> None:
    """A graph that captured a replayed call computes what its inputs hold now."""
    replay.forget()
    calls = [inputs(seed) for seed in range(3)]
    wanted = [expected(x, case) for x in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(calls[0], case)
    torch.cuda.current_stream().wait_stream(stream)
    static = [x.clone() for x in calls[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run(static, case)
    for x, want in zip(calls, wanted, strict=True):
        for to, new in zip(static, x, strict=True):
            to.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)
    assert torch.equal(run(calls[1], case), wanted[1])


@pytest.mark.gpu
def test_threads() -> None:
    """Threads on streams of their own, two signatures in turn; one of the threads is new to CUDA."""
    replay.forget()
    cases = [GPU_CASES["8 bits"], GPU_CASES["mean"]]
    calls = [inputs(seed) for seed in range(3)]
    wanted = [[expected(x, case) for case in cases] for x in calls]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(40):
                outs = [run(calls[i], case) for case in cases]
                torch.cuda.current_stream().synchronize()
                wrong.extend(i for out, want in zip(outs, wanted[i], strict=True) if not torch.equal(out, want))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert is_direct()


@pytest.mark.gpu
def test_static_inputs() -> None:
    """As graphs from their second time at an address on, each address with a graph of its own; new contents count."""
    replay.forget()
    case, calls = GPU_CASES["8 bits"], [inputs(seed) for seed in range(3)]
    wanted = [expected(x, case) for x in calls]
    for x in calls:
        run(x, case)
    buffers = [[x.clone() for x in calls[0]] for _ in range(2)]
    outs: list[Tensor] = []
    for i in (0, 1, 2, 0, 1, 2):
        outs = []
        for static in buffers:
            for to, new in zip(static, calls[i], strict=True):
                to.copy_(new)
            out, _ = attend_again(*static, case[0], case[1], backend="triton", static=True)
            assert torch.equal(out, wanted[i])
            outs.append(out)
    assert torch.equal(outs[0], outs[1]) and outs[0].data_ptr() != outs[1].data_ptr()
    assert sum(len(entry.plan._graphs) for entry in replay._entries.values() if entry.plan) == 2


@pytest.mark.gpu
def test_no_memory_is_kept() -> None:
    replay.forget()
    x = inputs(0)
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        run(x, GPU_CASES["8 bits"])
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    replay.forget()
    x = inputs(0)
    want = expected(x, GPU_CASES["8 bits"])
    for place in (["cuda:1"] * 4 + ["cuda:0"] * 4) * 2:
        out = run([y.to(place) for y in x], GPU_CASES["8 bits"])
        assert out.device == torch.device(place)
        assert torch.equal(out.cpu(), want.cpu())
