"""Tables of measured times: which row speaks for a GPU, files, and measuring itself with a made-up timer."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from made_up_gpu import FakeGpu, row

from spas_attn import BlockMask, Call, backends, cost_model, measure
from spas_attn.cost_model import Line, Work
from spas_attn.measure import Point
from spas_attn.select import select as select_blocks
from spas_attn.selectors import ExactKeys

H200, NAME = (9, 0), "NVIDIA H200"
measured = functools.partial(row, device=NAME, capability=H200)


class TestNearest:
    TABLE = (
        measured(head_dim=128, measured="own"),
        measured(head_dim=64),
        measured(head_dim=128),
        measured(head_dim=64, is_causal=True),
        measured(device="NVIDIA H100", head_dim=96),
        measured(device="A100", capability=(8, 0), head_dim=128),
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
        found = cost_model.nearest(self.TABLE, name, capability, dim, causal)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert found[0] is self.TABLE[expected]
            assert (note in found[1]) if note else found[1] == ""

    def test_blocks(self) -> None:
        """Those of the call if they were measured, else the nearest; the head dim counts first."""
        table = (measured(head_dim=64, blocks=(64, 64)), measured(), measured(blocks=(64, 64)))
        assert cost_model.nearest(table, NAME, H200, 128, False, (64, 64)) == (table[2], "")
        found = cost_model.nearest(table, NAME, H200, 128, False, (128, 64))
        assert found == (table[1], " (nearest to blocks 128 x 64)")


class TestFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        table = (row(), row(is_causal=True, versions={"torch": "2.13"}), row(blocks=(128, 64)))
        cost_model.write(table, tmp_path / "new" / "table.json")
        assert cost_model.read(tmp_path / "new" / "table.json") == table

    def test_the_packaged_table_can_be_read(self) -> None:
        for entry in cost_model.read(cost_model.PACKAGED):
            assert entry.dense and entry.sparse and entry.measured and entry.versions

    @pytest.mark.parametrize(
        "content", ["{", "[]", '{"format": 2, "rows": []}', '{"format": 1, "rows": [{"device": "x"}]}']
    )
    def test_other_files_are_refused(self, content: str, tmp_path: Path) -> None:
        path = tmp_path / "table.json"
        path.write_text(content)
        with pytest.raises(ValueError, match="table.json is no table"):
            cost_model.read(path)

    def test_the_users_own_comes_first(self, gpu_like: FakeGpu) -> None:
        packaged = cost_model.rows()
        cost_model.write((row(measured="mine"),), cost_model.user_table())
        assert cost_model.rows() == packaged, "it is read once"
        cost_model.forget()
        assert cost_model.rows() == (row(measured="mine"), *packaged)

    def test_where_it_lies(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv(cost_model.ENVIRONMENT, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cost_model.user_table() == tmp_path / "spas_attn" / "cost_model.json"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cost_model.user_table() == Path.home() / ".cache" / "spas_attn" / "cost_model.json"


class TestMeasure:
    def test_fit_finds_the_line(self) -> None:
        line = Line(0.05, 0.3, 1.7)
        work = [Work.of(24, n, n) for n in (1024, 4096, 32768)]
        points = [Point(w, d, line(w, d), line(w, d)) for w in work for d in (1.0, 0.25)]
        found = measure.fit(points)
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(line), rel=1e-6)

    def test_fit_is_never_negative(self) -> None:
        work = [Work.of(24, n, n) for n in (1024, 4096, 32768)]
        found = measure.fit([Point(w, 1.0, ms, 1.0) for w, ms in zip(work, (0.1, -0.1, 0.05), strict=True)])
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
            work, selects = Work.of(2, q.shape[2], q.shape[2]), isinstance(how, ExactKeys)
            mask: BlockMask = (
                select_blocks(how, Call(*call.args[:3], scale=q.shape[-1] ** -0.5)).mask if selects else how
            )
            assert (mask.block_q, mask.block_k) == (128, 64)
            return kernel(work, float(mask.density().mean())) + (select(work) if selects else 0.0)

        found = measure.measure(
            "cpu", 32, False, timer, heads=2, lengths=(256, 512, 1024), masses=(1.0, 0.5),
            dense=("sdpa",), sparse=(("cpu", "native"), ("cpu", "int8_bf16")), blocks=(128, 64),
        )  # fmt: skip
        assert list(found[0]) == ["sdpa"]
        assert list(found[2]) == ["cpu/native"], "int8_bf16 does not run on a CPU"
        for line, expected in ((found[0]["sdpa"], dense), (found[1], select), (found[2]["cpu/native"], kernel)):
            for n in (256, 1024):
                assert line(Work.of(2, n, n)) == pytest.approx(expected(Work.of(2, n, n)), rel=1e-3)

    def test_crossover_density(self) -> None:
        made = row()
        density = measure.crossover_density(made, "native", 16384)
        assert density is not None
        work = Work.of(24, 16384, 16384)
        assert made.select(work) + made.sparse["triton/native"](work, density) == pytest.approx(
            made.dense["sdpa"](work)
        )
        assert measure.crossover_density(made, "native", 128) is None
        assert measure.crossover_density(made, "int8_fp8", 16384) is None
        cheap = row(sparse={"triton/native": Line(0, 0, 1.0)})
        assert measure.crossover_density(cheap, "native", 65536) == 1.0
        assert "1024: " in measure.report(made)

    def test_merge_replaces_what_was_measured_again(self) -> None:
        old = (row(measured="old"), row(device="other"), row(head_dim=64), row(blocks=(64, 64)))
        new = (row(measured="new"),)
        assert measure.merge(new, old) == (new[0], *old[1:])

    @pytest.mark.usefixtures("gpu_like")
    def test_needs_a_gpu(self) -> None:
        with pytest.raises(SystemExit, match="no CUDA GPU"):
            measure.main([])

    def test_table_is_json_of_plain_numbers(self, tmp_path: Path) -> None:
        cost_model.write((row(),), tmp_path / "t.json")
        (entry,) = json.loads((tmp_path / "t.json").read_text())["rows"]
        assert entry["sparse"] == {"triton/native": [0.0, 0.0, 12.0]}
