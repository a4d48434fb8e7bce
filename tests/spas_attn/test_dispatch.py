"""The choice by `auto` on GPUs, from tables made up for the purpose; reading, writing and fitting such tables."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BF16, F32, Case
from torch import Tensor

import spas_attn
from spas_attn import (
    BlockMask,
    backends,
    block_sparse_attention,
    crossover,
    dispatch,
    explain,
    sparse_attention,
    tune_kernels,
)
from spas_attn.backends import Call
from spas_attn.crossover import Line, Row, Work
from spas_attn.dispatch import choose
from spas_attn.selectors import Dense, MeanSimilarity, Selector, Streaming, TopK
from spas_attn.tune_kernels import Point

H200, NAME = (9, 0), "NVIDIA H200"


def row(**changes: Any) -> Row:
    """Dense takes 10 per pair; sparse 12 at density 1, and 1 for each million tokens of selection."""
    made = Row(
        NAME, H200, 128, False, {"sdpa": Line(0.0, 0.0, 10.0)}, Line(0.1, 1.0, 0.0),
        {"triton/bf16": Line(0.0, 0.0, 12.0)}, "2026-11-21",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU, so that the choice for one can be made here."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")

    def as_cpu(self) -> Tensor:
        return self.as_subclass(torch.Tensor)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """An H200 whose `triton` and `flash` compute on the processor; call it with the rows of the table."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: H200)
    sdpa, cpu = backends.get("sdpa"), backends.get("cpu")
    crossover.forget()

    def plain(call: Call) -> Call:
        return call.replace(**{name: getattr(call, name).as_subclass(torch.Tensor) for name in "qkv"}, precision="bf16")

    for name, chosen in (("triton", cpu), ("flash", cpu), ("sdpa", sdpa)):
        stand_in = dataclasses.replace(
            chosen,
            name=name,
            missing=lambda: None,
            declines=lambda call: None,
            run=lambda call, chosen=chosen: chosen.run(plain(call)),
        )
        monkeypatch.setitem(backends.base._REGISTRY, name, stand_in)

    def install(*table: Row) -> None:
        crossover.forget()
        monkeypatch.setattr(crossover, "rows", functools.cache(lambda: table))

    install(row())
    yield install
    monkeypatch.undo()
    crossover.forget()


def on_gpu(length: int = 384, dtype: torch.dtype = BF16, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 128, generator=generator).to(dtype) for _ in range(3))
    return q.as_subclass(OnGpu), k.as_subclass(OnGpu), v.as_subclass(OnGpu)


def shape(length: int, heads: int = 2, **changes: Any) -> Call:
    """A call of any length that holds no memory, with a mask that stands in for what will be selected."""
    x = torch.empty((), dtype=changes.pop("dtype", BF16)).expand(1, heads, length, 128).as_subclass(OnGpu)
    grid = -(-length // 128)
    number = torch.empty((), dtype=torch.int32)
    mask = BlockMask(number.expand(1, heads, grid), number.expand(1, heads, grid, grid), 128, 128, length, length)
    return Call(x, x, x, **{"mask": mask, "scale": 0.1, **changes})


class TestChoice:
    # 24 heads, 16384 tokens: 0.786 million tokens, 6.44 thousand million pairs: dense 64.4, sparse 0.89 + 77.3 density.
    @pytest.mark.parametrize(("density", "backend"), [(1.0, "sdpa"), (0.83, "sdpa"), (0.81, "triton"), (0.1, "triton")])
    def test_by_density(self, density: float, backend: str) -> None:
        said = choose(shape(16384, 24, expected_density=density), "auto", sparse=True)
        assert said.backend == backend
        assert said.declined == {}
        assert said.instead_of == ("triton" if backend == "sdpa" else None)
        for text in (f"triton {0.886 + 77.31 * density:.2f} ms", "dense sdpa 64.42 ms", f"{density:.0%}", NAME, "2026"):
            assert text in said.reason, said.reason
        assert ("dense attention is faster" in said.reason) == (backend == "sdpa")

    @pytest.mark.parametrize("length", [128, 512, 1024])
    @pytest.mark.parametrize("density", [None, 0.0, 0.1, 1.0])
    def test_short_calls_run_dense_whatever_is_kept(self, length: int, density: float | None) -> None:
        assert choose(shape(length, expected_density=density), "auto", sparse=True).backend == "sdpa"

    def test_unknown_density_leaves_it_to_the_length(self) -> None:
        long, short = (choose(shape(n, 24), "auto", sparse=True) for n in (16384, 256))
        assert (long.backend, short.backend) == ("triton", "sdpa")
        assert "density unknown" in long.reason

    def test_a_given_mask_never_becomes_dense(self) -> None:
        said = choose(shape(256, expected_density=1.0), "auto", sparse=True, mask_given=True)
        assert (said.backend, said.instead_of) == ("triton", None)

    @pytest.mark.parametrize("name", ["triton", "flash", "sdpa"])
    def test_names_are_never_overridden(self, name: str) -> None:
        assert choose(shape(256, expected_density=1.0), name, sparse=True).backend == name

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
    def test_what_was_not_measured_stays_sparse(self, changes: dict[str, Any], gpu: Callable[..., None]) -> None:
        gpu(row(), row(is_causal=True))
        assert choose(shape(256, **changes), "auto", sparse=True).backend == "triton"

    def test_the_faster_sparse_backend(self, gpu: Callable[..., None]) -> None:
        sparse = {
            "triton/bf16": Line(0.0, 0.0, 5.0),
            "flash/bf16": Line(0.5, 0.0, 4.0),
            "triton/int8_fp8": Line(0, 0, 1),
        }
        gpu(row(sparse=sparse))
        by_length = {n: choose(shape(n, 24, expected_density=0.5), "auto", sparse=True).backend for n in (3000, 16384)}
        assert by_length == {3000: "triton", 16384: "flash"}
        call = shape(16384, 24, expected_density=0.5, precision="int8_fp8")
        assert choose(call, "auto", sparse=True).backend == "triton"

    def test_the_faster_that_can(self, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        gpu(row(dense={"flash": Line(0, 0, 9.0), "sdpa": Line(0, 0, 10.0)},
                sparse={"triton/bf16": Line(0, 0, 5.0), "flash/bf16": Line(0, 0, 4.0)}))  # fmt: skip
        assert choose(shape(16384, 24, expected_density=1.0), "auto", sparse=True).backend == "flash"
        assert choose(shape(256, expected_density=1.0), "auto", sparse=True).instead_of == "flash"
        dense = shape(256).replace(mask=None)
        assert choose(dense, "auto", sparse=False).backend == "flash"
        absent = dataclasses.replace(backends.get("flash"), missing=lambda: "not installed")
        monkeypatch.setitem(backends.base._REGISTRY, "flash", absent)
        said = choose(shape(16384, 24, expected_density=1.0), "auto", sparse=True)
        assert (said.backend, said.declined) == ("triton", {"flash": "not installed"})
        assert choose(shape(256, expected_density=1.0), "auto", sparse=True).backend == "sdpa"
        assert choose(dense, "auto", sparse=False).backend == "sdpa"

    def test_without_a_measurement(self, gpu: Callable[..., None]) -> None:
        gpu(row(capability=(8, 9)))
        said = choose(shape(256, expected_density=1.0), "auto", sparse=True)
        assert said.backend == "triton"
        assert "tune_kernels" in said.reason

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_without_a_graph_break(self, dynamic: bool) -> None:
        """The table is looked up while tracing; a graph break here would cost more than it saves."""

        def chosen(x: Tensor) -> Tensor:
            found = crossover.predict(
                torch.device("cuda:0"),
                24,
                x.shape[0],
                x.shape[0],
                128,
                is_causal=False,
                precision="bf16",
                density=0.5,
                selects=True,
            )
            assert found is not None
            assert found.numbers()
            return x + 1 if found.dense["sdpa"] <= found.sparse["triton"] else x

        compiled = torch.compile(chosen, fullgraph=True, backend="eager", dynamic=dynamic)
        for length in (128, 16384):
            x = torch.ones(length)
            assert torch.equal(compiled(x), chosen(x))
            assert bool((chosen(x) == 2).all()) == (length == 128)


class TestCalls:
    def test_dense_selects_nothing_and_is_no_fallback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, v = on_gpu()

        def never(*args: object, **more: object) -> BlockMask:
            raise AssertionError("something was selected")

        monkeypatch.setattr(TopK, "select", never)
        before = spas_attn.fallback_counts()
        out, stats = sparse_attention(q, k, v, TopK(0.9), return_stats=True, strict=True)
        exact = backends.get("sdpa").run(Call(q, k, v, scale=128**-0.5))
        assert torch.equal(out.as_subclass(torch.Tensor), exact)
        assert (stats.backend, stats.mask) == ("sdpa", None)
        assert spas_attn.fallback_counts() == before
        assert explain(q, k, v, TopK(0.9)).instead_of == "triton"

    def test_eight_bits_may_run_exact(self, gpu: Callable[..., None]) -> None:
        gpu(row(sparse={"triton/int8_bf16": Line(0, 0, 12.0)}))
        q, k, v = on_gpu()
        for selector in (TopK(1.0), Dense()):
            out, stats = sparse_attention(q, k, v, selector, precision="int8_bf16", return_stats=True, strict=True)
            assert stats.backend == "sdpa"
            assert torch.equal(out.as_subclass(torch.Tensor), backends.get("sdpa").run(Call(q, k, v, scale=128**-0.5)))

    def test_packed_sequences_choose_one_by_one(
        self, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        select = Selector.select

        def on_the_processor(self: Selector, q: Tensor, k: Tensor, **more: Any) -> BlockMask:
            return select(self, q.as_subclass(torch.Tensor), k.as_subclass(torch.Tensor), **more)

        monkeypatch.setattr(Selector, "select", on_the_processor)
        gpu(row(dense={"sdpa": Line(0, 0, 1e4)}, select=Line(0.5, 0, 0), sparse={"triton/bf16": Line(0, 0, 0)}))
        q, k, v = on_gpu(640)
        cu = torch.tensor([0, 128, 640], dtype=torch.int32)  # 0.33 ms of dense attention, and 5.2
        selector = TopK(0.25, local=0)
        out, stats = sparse_attention(q, k, v, selector, cu_seqlens_q=cu, cu_seqlens_k=cu, return_stats=True)
        assert stats.mask is not None
        short, long = stats.mask.split()
        assert torch.equal(short.counts, torch.ones_like(short.counts))
        assert torch.equal(long.counts, torch.ones_like(long.counts))
        parts = [x.as_subclass(torch.Tensor)[:, :, 128:] for x in (q, k, v)]
        exact = sparse_attention(*parts, selector, backend="cpu")
        assert torch.equal(out.as_subclass(torch.Tensor)[:, :, 128:], exact)

    def test_a_given_mask_is_honoured(self) -> None:
        call = Case(384, 384, dim=128, dtype=BF16).call()
        assert call.mask is not None
        on = [x.as_subclass(OnGpu) for x in (call.q, call.k, call.v)]
        mask = dataclasses.replace(call.mask, counts=call.mask.counts.as_subclass(OnGpu))
        out = block_sparse_attention(*on, mask, expected_density=1.0, strict=True)
        assert torch.equal(out.as_subclass(torch.Tensor), backends.get("cpu").run(call))


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
def test_expected_density_of_selectors(selector: Any, density: float | None) -> None:
    assert selector.expected_density == density


class TestNearest:
    TABLE = (
        row(head_dim=128, measured="own"),
        row(head_dim=64),
        row(head_dim=128),
        row(head_dim=64, is_causal=True),
        row(device="NVIDIA H100", head_dim=96),
        row(device="A100", capability=(8, 0), head_dim=128),
    )

    @pytest.mark.parametrize(
        ("name", "capability", "dim", "causal", "expected", "note"),
        [
            (NAME, H200, 128, False, 0, ""),
            (NAME, H200, 64, False, 1, ""),
            (NAME, H200, 40, False, 1, "head dim 40"),
            (NAME, H200, 96, False, 0, "head dim 96"),
            (NAME, H200, 256, False, 0, "head dim 256"),
            (NAME, H200, 128, True, 3, "head dim 128"),
            ("NVIDIA H100", H200, 128, False, 4, "head dim 128"),
            ("NVIDIA GH200", H200, 128, False, 0, "nearest to NVIDIA GH200"),
            ("RTX 4090", (8, 9), 128, False, 5, "nearest to RTX 4090"),
            ("B200", (10, 0), 128, False, None, ""),
        ],
    )
    def test_row(
        self, name: str, capability: tuple[int, int], dim: int, causal: bool, expected: int | None, note: str
    ) -> None:
        found = crossover.nearest(self.TABLE, name, capability, dim, causal)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert found[0] is self.TABLE[expected]
            assert (note in found[1]) if note else found[1] == ""


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        table = (row(), row(is_causal=True, versions={"torch": "2.13"}))
        crossover.write(table, tmp_path / "new" / "table.json")
        assert crossover.read(tmp_path / "new" / "table.json") == table

    def test_the_packaged_table_can_be_read(self) -> None:
        for entry in crossover.read(crossover.PACKAGED):
            assert entry.dense and entry.sparse and entry.measured and entry.versions

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"format": 2, "rows": []}', '{"format": 1, "rows": [{"device": "x"}]}']
    )
    def test_other_files_are_refused(self, content: str, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        path.write_text(content)
        with pytest.raises(ValueError, match="table.json is no table"):
            crossover.read(path)

    def test_the_users_own_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        crossover.forget()
        monkeypatch.setenv(crossover.ENVIRONMENT, str(tmp_path / "mine.json"))
        packaged = crossover.rows()
        crossover.write((row(measured="mine"),), tmp_path / "mine.json")
        assert crossover.rows() == packaged, "it is read once"
        crossover.forget()
        assert crossover.rows() == (row(measured="mine"), *packaged)

    def test_where_it_lies(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv(crossover.ENVIRONMENT, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert crossover.user_table() == tmp_path / "spas_attn" / "crossover.json"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert crossover.user_table() == Path.home() / ".cache" / "spas_attn" / "crossover.json"


class TestTuning:
    def test_fit_finds_the_line(self) -> None:
        line = Line(0.05, 0.3, 1.7)
        work = [Work.of(24, n, n) for n in (1024, 4096, 32768)]
        points = [Point(w, d, line(w, d), line(w, d)) for w in work for d in (1.0, 0.25)]
        found = tune_kernels.fit(points)
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(line), rel=1e-6)

    def test_fit_is_never_negative(self) -> None:
        work = [Work.of(24, n, n) for n in (1024, 4096, 32768)]
        found = tune_kernels.fit([Point(w, 1.0, ms, 1.0) for w, ms in zip(work, (0.1, -0.1, 0.05), strict=True)])
        assert min(dataclasses.astuple(found)) >= 0

    def test_measures_what_runs(self) -> None:
        """A timer that knows the truth: from the calls it is given it makes the times of three lines."""
        select, kernel, dense = Line(0.1, 0.5, 0.0), Line(0.2, 0.0, 2.0), Line(0.0, 0.0, 3.0)

        def timer(call: Any) -> float:
            call()
            if call.func is backends.get("sdpa").run:
                (made,) = call.args
                return dense(Work.of(2, made.q.shape[2], made.q.shape[2]))
            q, how = call.args[0], call.args[3]
            work, density = Work.of(2, q.shape[2], q.shape[2]), how.keep if isinstance(how, TopK) else densities(how)
            return kernel(work, density) + (select(work) if isinstance(how, TopK) else 0.0)

        def densities(mask: BlockMask) -> float:
            return float(mask.density().mean())

        found = tune_kernels.measure(
            "cpu", 32, False, timer, heads=2, lengths=(256, 512, 1024), densities=(1.0, 0.5),
            dense=("sdpa",), sparse=(("cpu", "bf16"), ("cpu", "int8_bf16")),
        )  # fmt: skip
        assert list(found[0]) == ["sdpa"]
        assert list(found[2]) == ["cpu/bf16"], "int8_bf16 does not run on a processor"
        for line, expected in ((found[0]["sdpa"], dense), (found[1], select), (found[2]["cpu/bf16"], kernel)):
            for n in (256, 1024):
                assert line(Work.of(2, n, n)) == pytest.approx(expected(Work.of(2, n, n)), rel=1e-3)

    def test_crossover_density(self) -> None:
        made = row()
        density = tune_kernels.crossover_density(made, "bf16", 16384)
        assert density is not None
        work = Work.of(24, 16384, 16384)
        assert made.select(work) + made.sparse["triton/bf16"](work, density) == pytest.approx(made.dense["sdpa"](work))
        assert tune_kernels.crossover_density(made, "bf16", 128) is None
        assert tune_kernels.crossover_density(made, "int8_fp8", 16384) is None
        cheap = row(sparse={"triton/bf16": Line(0, 0, 1.0)})
        assert tune_kernels.crossover_density(cheap, "bf16", 65536) == 1.0
        assert "1024: " in tune_kernels.report(made)

    def test_merge_replaces_what_was_measured_again(self) -> None:
        old = (row(measured="old"), row(device="other"), row(head_dim=64))
        new = (row(measured="new"),)
        assert tune_kernels.merge(new, old) == (new[0], old[1], old[2])

    def test_needs_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="no CUDA GPU"):
            tune_kernels.main([])

    def test_table_is_json_of_plain_numbers(self, tmp_path: Path) -> None:
        crossover.write((row(),), tmp_path / "t.json")
        (entry,) = json.loads((tmp_path / "t.json").read_text())["rows"]
        assert entry["sparse"] == {"triton/bf16": [0.0, 0.0, 12.0]}


def test_auto_lists_registered_backends_only() -> None:
    assert {name for names in dispatch._AUTO.values() for name in names} <= set(backends.names())
