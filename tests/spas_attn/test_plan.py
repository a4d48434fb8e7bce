"""Plans on GPUs: what `auto` chooses from tables made up for the purpose, and the calls that follow from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BF16, F32, Case
from made_up_gpu import FakeGpu, on_cpu, on_gpu, row
from torch import Tensor

import spas_attn
from spas_attn import BlockMask, Call, backends, block_sparse_attention, cost_model, explain, sparse_attention
from spas_attn.cost_model import Line
from spas_attn.plan import AUTOMATIC, plan
from spas_attn.selectors import Dense, FlexPrefill, MeanSimilarity, Selector, Streaming, Tokens, TopK

SELECTOR = MeanSimilarity()


@pytest.fixture(autouse=True)
def gpu(gpu_like: FakeGpu) -> FakeGpu:
    """A GPU whose `triton` and `flash` compute on the CPU, and on which the row above was measured."""
    for name, like in (("triton", "cpu"), ("flash", "cpu"), ("sdpa", "sdpa")):
        gpu_like.serve(name, like)
    gpu_like.measured(row())
    return gpu_like


def shape(length: int, heads: int = 2, **changes: Any) -> Call:
    """A call of any length that holds no memory."""
    x = torch.empty((), dtype=changes.pop("dtype", BF16)).expand(1, heads, length, 128)
    return on_gpu(Call(x, x, x, scale=0.1, **changes))


def drawn(length: int = 384) -> tuple[Tensor, Tensor, Tensor]:
    call = on_gpu(Case(length, length, dim=128, dtype=BF16, density=None).call())
    return call.q, call.k, call.v


class TestChoice:
    # 24 heads, 16384 tokens: 0.786 million tokens, 6.44 thousand million pairs: dense 64.4, sparse 0.89 + 77.3 density.
    @pytest.mark.parametrize(("density", "backend"), [(1.0, "sdpa"), (0.83, "sdpa"), (0.81, "triton"), (0.1, "triton")])
    def test_by_density(self, density: float, backend: str) -> None:
        said = plan(shape(16384, 24, expected_density=density), SELECTOR)
        assert said.backend == backend
        assert (said.declined, said.fallback) == ({}, None)
        assert said.instead_of == ("triton" if backend == "sdpa" else None)
        assert said.selects == (backend == "triton")
        for text in (
            f"triton {0.886 + 77.31 * density:.2f} ms",
            "dense sdpa 64.42 ms",
            f"{density:.0%}",
            "Made-up GPU",
        ):
            assert text in said.reason, said.reason
        assert ("dense attention is faster" in said.reason) == (backend == "sdpa")

    @pytest.mark.parametrize("length", [128, 1024])
    @pytest.mark.parametrize("density", [None, 0.0, 1.0])
    def test_short_calls_run_dense_whatever_is_kept(self, length: int, density: float | None) -> None:
        assert plan(shape(length, expected_density=density), SELECTOR).backend == "sdpa"

    # 4,096 tokens: dense 4.0, sparse 0.2 + 1.5 and FlexPrefill's 4.4; 16,384 tokens: 64.4 against 28.9.
    @pytest.mark.parametrize(("length", "backend"), [(4096, "sdpa"), (16384, "triton")])
    def test_a_selector_of_many_launches_has_to_pay_for_them(self, length: int, backend: str) -> None:
        call = shape(length, 24, expected_density=0.3)
        flex, tokens = FlexPrefill(), Tokens(((0, 9),))
        assert plan(call, SELECTOR).backend == "triton"
        assert [plan(call, selector).backend for selector in (flex, flex | tokens, tokens | flex)] == [backend] * 3

    def test_unknown_density_leaves_it_to_the_length(self) -> None:
        long, short = (plan(shape(n, 24), SELECTOR) for n in (16384, 256))
        assert (long.backend, short.backend) == ("triton", "sdpa")
        assert "density unknown" in long.reason

    def test_a_given_mask_never_becomes_dense(self) -> None:
        mask = BlockMask.from_dense(torch.ones(1, 2, 2, 2, dtype=torch.bool), 256, 256)
        said = plan(shape(256, expected_density=1.0).replace(mask=mask))
        assert (said.backend, said.instead_of, said.selects) == ("triton", None, False)

    @pytest.mark.parametrize("name", ["triton", "flash", "sdpa"])
    def test_names_are_never_overridden(self, name: str) -> None:
        said = plan(shape(256, expected_density=1.0), SELECTOR, name)
        assert (said.backend, said.selects) == (name, True)

    @pytest.mark.parametrize(
        "changes",
        [
            {"attn_mask": torch.ones(1, 256, dtype=torch.bool)},
            {"is_causal": True, "window": 100},
            {"dtype": F32},
            {"precision": "int8_bf16"},
        ],
        ids=["padding", "window", "fp32", "int8"],
    )
    def test_what_was_not_measured_stays_sparse(self, changes: dict[str, Any], gpu: FakeGpu) -> None:
        gpu.measured(row(), row(is_causal=True))
        assert plan(shape(256, **changes), SELECTOR).backend == "triton"

    def test_the_faster_sparse_backend(self, gpu: FakeGpu) -> None:
        sparse = {
            "triton/native": Line(0.0, 0.0, 5.0),
            "flash/native": Line(0.5, 0.0, 4.0),
            "triton/int8_fp8": Line(0, 0, 1),
        }
        gpu.measured(row(sparse=sparse))
        by_length = {n: plan(shape(n, 24, expected_density=0.5), SELECTOR).backend for n in (3000, 16384)}
        assert by_length == {3000: "triton", 16384: "flash"}
        call = shape(16384, 24, expected_density=0.5, precision="int8_fp8")
        assert plan(call, SELECTOR).backend == "triton"

    def test_the_faster_that_can(self, gpu: FakeGpu) -> None:
        gpu.measured(row(dense={"flash": Line(0, 0, 9.0), "sdpa": Line(0, 0, 10.0)},
                         sparse={"triton/native": Line(0, 0, 5.0), "flash/native": Line(0, 0, 4.0)}))  # fmt: skip
        long, short = (shape(length, 24, expected_density=1.0) for length in (16384, 256))
        assert plan(long, SELECTOR).backend == "flash"
        assert plan(short, SELECTOR).instead_of == "flash"
        assert plan(short).backend == "flash"
        gpu.serve("flash", "cpu", missing=lambda: "not installed")
        said = plan(long, SELECTOR)
        assert (said.backend, said.declined) == ("triton", {"flash": "not installed"})
        assert plan(short, SELECTOR).backend == "sdpa"
        assert plan(short).backend == "sdpa"

    @pytest.mark.parametrize("bound", [0.02, 0.05, 0.2])
    @pytest.mark.parametrize("measured", [False, True])
    def test_precision_auto(self, bound: float, measured: bool, gpu: FakeGpu) -> None:
        """The fewest bits whose error is at most half of the bound; the fastest of those where all were measured."""
        times = {"native": 5.0, "int8_bf16": 3.0, "int8_fp8": 4.0}
        if measured:
            gpu.measured(row(sparse={f"triton/{name}": Line(0, 0, ms) for name, ms in times.items()}))
        said = plan(shape(16384, 24, precision="auto", error_bound=bound), SELECTOR)
        allowed = {0.02: "native", 0.05: "int8_bf16", 0.2: "int8_bf16" if measured else "int8_fp8"}
        assert said.precision == allowed[bound]

    def test_without_a_measurement(self, gpu: FakeGpu) -> None:
        gpu.measured(row(capability=(98, 9)))
        said = plan(shape(256, expected_density=1.0), SELECTOR)
        assert said.backend == "triton"
        assert "python -m spas_attn.measure" in said.reason

    def test_nothing_serves(self, gpu: FakeGpu) -> None:
        for name in AUTOMATIC["cuda"]:
            gpu.serve(name, "cpu", declines=lambda call: "not today")
        said = plan(shape(16384, 24), SELECTOR)
        assert (said.backend, said.selects) == ("sdpa", True)
        assert said.declined == dict.fromkeys(AUTOMATIC["cuda"], "not today")
        assert said.fallback == "triton: not today; flash: not today; cudnn: not today"

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_without_a_graph_break(self, dynamic: bool) -> None:
        """The table is looked up while tracing; a graph break here would cost more than it saves."""

        def chosen(x: Tensor) -> Tensor:
            q = x[:, None].expand(1, 24, -1, 128)
            found = cost_model.predict(Call(q, q, q), 0.5, selects=True)
            assert found is not None
            assert found.numbers()
            return x + 1 if found.dense["sdpa"] <= found.sparse["triton"] else x

        compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=dynamic)
        for length in (128, 16384):
            x = torch.ones(length)
            assert torch.equal(compiled(x), chosen(x))
            assert bool((chosen(x) == 2).all()) == (length == 128)


class Never(TopK):
    """Fails when it is asked."""

    def levels(self, call: Call) -> Tensor:
        raise AssertionError("something was selected")


class TestCalls:
    def test_dense_selects_nothing_and_is_no_fallback(self) -> None:
        q, k, v = drawn()
        before = spas_attn.fallback_counts()
        out, stats = sparse_attention(q, k, v, Never(0.9), return_stats=True, strict=True)
        exact = backends.get("sdpa").run(Call(q, k, v, scale=128**-0.5))
        assert torch.equal(out.as_subclass(Tensor), exact)
        assert (stats.backend, stats.mask) == ("sdpa", None)
        assert spas_attn.fallback_counts() == before
        assert explain(q, k, v, TopK(0.9)).instead_of == "triton"

    def test_eight_bits_may_run_exact(self, gpu: FakeGpu) -> None:
        gpu.measured(row(sparse={"triton/int8_bf16": Line(0, 0, 12.0)}))
        q, k, v = drawn()
        for selector in (Never(1.0), Dense()):
            out, stats = sparse_attention(q, k, v, selector, precision="int8_bf16", return_stats=True, strict=True)
            assert stats.backend == "sdpa"
            assert torch.equal(out.as_subclass(Tensor), backends.get("sdpa").run(Call(q, k, v, scale=128**-0.5)))

    def test_packed_sequences_choose_one_by_one(self, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
        select = Selector.mask_of  # on the CPU, where the tensors are
        monkeypatch.setattr(Selector, "mask_of", lambda selector, call: select(selector, on_cpu(call)))
        gpu.measured(
            row(dense={"sdpa": Line(0, 0, 1e4)}, select=Line(0.5, 0, 0), sparse={"triton/native": Line(0, 0, 0)})
        )
        q, k, v = drawn(640)
        cu = torch.tensor([0, 128, 640], dtype=torch.int32)  # 0.33 ms of dense attention, and 5.2
        selector = TopK(0.25, local=0)
        out, stats = sparse_attention(q, k, v, selector, cu_seqlens_q=cu, cu_seqlens_k=cu, return_stats=True)
        assert stats.mask is not None
        short, long = stats.mask.split()
        assert torch.equal(short.counts, torch.ones_like(short.counts))
        assert torch.equal(long.counts, torch.ones_like(long.counts))
        parts = [x.as_subclass(Tensor)[:, :, 128:] for x in (q, k, v)]
        exact = sparse_attention(*parts, selector, backend="cpu")
        assert torch.equal(out.as_subclass(Tensor)[:, :, 128:], exact)

    def test_a_given_mask_is_honoured(self) -> None:
        call = Case(384, 384, dim=128, dtype=BF16).call()
        moved = on_gpu(call)
        assert moved.mask is not None
        out = block_sparse_attention(moved.q, moved.k, moved.v, moved.mask, expected_density=1.0, strict=True)
        assert torch.equal(out.as_subclass(Tensor), backends.get("cpu").run(call))


@pytest.mark.parametrize(
    ("selector", "density"),
    [
        (TopK(0.3), 0.3),
        (TopK(torch.tensor([0.3, 0.5])), None),
        (MeanSimilarity(), None),
        (Streaming(), None),
        (Dense(), 1.0),
        (TopK(0.3) | TopK(0.5), 0.5),
        (TopK(0.3) | Streaming(), None),
    ],
    ids=str,
)
def test_expected_density_of_selectors(selector: Selector, density: float | None) -> None:
    assert selector.expected_density == density


def test_auto_lists_registered_backends_only() -> None:
    assert {name for names in AUTOMATIC.values() for name in names} <= set(backends.names())
