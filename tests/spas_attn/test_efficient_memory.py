"""EfficientAttention and memory: estimates, chunks from what is free, running out of it, and what is said about it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spas_attn.efficient import memory, tiled
from spas_attn.efficient.choice import SHARE, Chooser
from spas_attn.efficient.problem import Problem
from spas_attn.efficient.ways import WAYS, dense_bytes
from spas_attn.efficient_attention import EfficientAttention
from spas_attn.selectors import TopK

LOG = "spas_attn.efficient_attention"
GB = 1 << 30
TABLE = Path(__file__).parents[2] / "docs/benchmarks/efficient_h100.json"
MEASURED = [row for row in json.loads(TABLE.read_text())["rows"] if "added_mib" in row]


def problem(q_len: int = 4096, k_len: int = 4096, device: str = "meta", **options: object) -> Problem:
    """Real sizes without memory: 16 heads of 64."""
    q, k = (torch.empty(1, 16, n, 64, dtype=torch.bfloat16, device=device) for n in (q_len, k_len))
    return Problem(q, k, k, scale=0.125, **options)


def bias(*shape: int, learned: bool = False) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=learned)


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: size)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, largest: int, error: Exception | None = None) -> list[int]:
    """Make a way run out of memory with chunks above ``largest``; the chunks that were tried."""
    way, tried = WAYS[name], []

    def run(problem: Problem, chunk: int, selector: object) -> Tensor:
        tried.append(chunk)
        if chunk > largest or largest < 0:
            raise error or torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        return way.run(problem, chunk, selector)

    monkeypatch.setitem(WAYS, name, type(way)(way.name, way.refuses, way.adds, run, way.chunked))
    return tried


def small(chunk: int = 64, **options: object) -> tuple[EfficientAttention, Tensor]:
    torch.manual_seed(0)
    return EfficientAttention(24, 2, 16, chunk_size=chunk, **options).eval(), torch.randn(2, 96, 24)


def test_the_estimate_counts_heads_and_bytes() -> None:
    """There: no factor for heads. All scores of 16 heads at 4,096 tokens in float32 are 1 GiB."""
    assert dense_bytes(problem()) == 16 * 4096 * 4096 * 4 == GB
    assert 2 * GB <= WAYS["standard"].adds(problem(), 0) <= 2.2 * GB
    assert WAYS["chunked_queries"].adds(problem(), 512) <= GB / 8 + 56 * 2**20, "an eighth, and its pieces"
    for name in ("chunked_queries", "chunked_keys"):
        sizes = [WAYS[name].adds(problem(), chunk) for chunk in (1, 64, 512, 4096)]
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("name", ["chunked_queries", "chunked_keys"])
def test_chunks_are_chosen_from_free_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    for size in (4 * GB, GB // 4, GB // 8, GB // 12):
        free(monkeypatch, size)
        report = Chooser(name, 2048, False, None).choose(problem())
        assert report.chunk is not None and report.free == size
        assert report.estimate <= SHARE * size
        assert report.chunk == 2048 or WAYS[name].adds(problem(), report.chunk + 64) > SHARE * size
        chosen.append(report.chunk)
    assert chosen == sorted(set(chosen), reverse=True) and chosen[0] == 2048


def test_auto_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused kernel needs no chunks; where SDPA would hold all scores, chunks of queries, then of keys."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: 1)
    free(monkeypatch, GB // 2)
    assert Chooser("auto", 512, False, None).choose(problem(32768, 32768)).backend == "sdpa"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: 0)
    report = Chooser("auto", 512, False, None).choose(problem())
    assert (report.backend, report.chunk) == ("chunked_queries", 512)
    assert "it would add 2,0" in report.declined["sdpa"] and "512.0 MiB are free" in report.declined["sdpa"]
    report = Chooser("auto", 512, False, None).choose(problem(8, 4_000_000))
    assert report.backend == "chunked_keys" and "8 queries against all keys" in report.declined["chunked_queries"]
    free(monkeypatch, 8 * GB)
    assert Chooser("auto", 512, False, None).choose(problem()).backend == "sdpa"


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: "-".join(str(row[key]) for key in list(row)[:4]))
def test_estimates_against_what_an_h100_took(row: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0.97 to 1.45 of the measured peak; the estimate counts a gradient of the output, the figures do not."""
    length, backward = int(str(row["length"])), row["pass"] != "forward"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: 2)
    options: dict[str, object] = {}
    if row["kind"] == "padding":
        options["mask"] = torch.empty(1, 1, 1, length, dtype=torch.bool, device="meta")
    if row["kind"] == "bias":
        options["biases"] = (bias(1, 16, 1, length, learned=backward),)
    call = problem(length, length, **options)
    call.q.requires_grad_(backward)
    estimate = WAYS[str(row["backend"])].adds(call, int(str(row["chunk"] or 0)))
    assert 0.97 <= estimate / 2**20 / float(str(row["added_mib"])) <= 1.45


def test_a_bias_alone_stays_unexpanded_in_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one row a head 4 MiB are added for 1 GiB of scores; with its gradient, or joined with a mask, they count."""
    asked: list[Tensor] = []

    def fused(*args: object, attn_mask: Tensor, **kwargs: object) -> int:
        asked.append(attn_mask)
        return 2

    monkeypatch.setattr(torch, "_fused_sdp_choice", fused)
    sizes = {
        "row": problem(biases=(bias(1, 16, 1, 4096),)),
        "learned": problem(biases=(bias(1, 16, 1, 4096, learned=True),)),
        "joined": problem(biases=(bias(1, 16, 4096, 1),), mask=torch.empty(1, 1, 1, 4096, dtype=torch.bool)),
        "of queries": problem(biases=(bias(1, 16, 4096, 1),)),
        "odd": problem(4096, 4090, biases=(bias(1, 16, 4096, 4090),)),
        "even": problem(4096, 4096, biases=(bias(1, 16, 4096, 4096),)),
    }
    mib = {name: WAYS["sdpa"].adds(call, 0) / 2**20 for name, call in sizes.items()}
    assert all(mask.stride(-1) == 1 for mask in asked), "another stride would say that no kernel takes it"
    assert mib["row"] < 18 and 700 < mib["learned"] < 800 and mib["of queries"] > 512
    assert 1024 < mib["joined"] < 1100, "two tensors of bfloat16"
    assert mib["odd"] > mib["even"] + 500, "strides that are no multiples of 8 are copied"


def test_auto_takes_sdpa_for_a_bias_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """32,768 tokens on a card with 75 GiB: forward 129 MiB, with its gradient 33.5 GB, which took 180 ms (H100)."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: 2)
    chooser = Chooser("auto", 512, False, None)
    calls = [problem(32768, 32768, biases=(bias(1, 16, 1, 32768, learned=learned),)) for learned in (False, True)]
    free(monkeypatch, 75 * GB)
    assert [chooser.choose(call).backend for call in calls] == ["sdpa", "sdpa"]
    free(monkeypatch, 5 * GB)
    assert [chooser.choose(call).backend for call in calls] == ["sdpa", "chunked_queries"]


def test_out_of_memory_halves_the_chunk_and_is_remembered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention, x = small(backend="chunked_queries")
    want = attention(x)
    tried = failing(monkeypatch, "chunked_queries", 20)
    with caplog.at_level(logging.WARNING, LOG):
        torch.testing.assert_close(attention(x), want)
        assert tried == [64, 32, 16] and attention.explain().retries == 2 and attention.explain().chunk == 16
        attention(x)
        assert tried[3:] == [16] and attention.explain().retries == 0, "remembered for the shape"
        attention(x[:, :80])
        assert tried[4:] == [64, 32, 16], "another shape is tried anew"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and all("memory ran out" in text for text in warnings), "once a shape"


@pytest.mark.parametrize("error", [None, MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_auto_goes_on_in_chunks_that_only_shrink(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = small()
    want = attention(x)
    sdpa = failing(monkeypatch, "sdpa", -1, error)
    queries, keys = failing(monkeypatch, "chunked_queries", 5, error), failing(monkeypatch, "chunked_keys", -1)
    standard = failing(monkeypatch, "standard", 0)
    torch.testing.assert_close(attention(x), want)
    assert sdpa == [0] and queries[0] == 48 and queries[-1] == 3, "half of the queries at most"
    assert all(b == a // 2 for a, b in zip(queries[:-1], queries[1:], strict=True))
    report = attention.explain()
    assert report.backend == "chunked_queries" and report.declined["sdpa"] == "memory ran out"
    assert f"memory ran out {len(queries)} times" in str(report) and not standard and not keys


def test_few_queries_go_on_in_chunks_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query against all keys did not fit: chunks of keys, as far as they need less than that."""
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 4, 4000, 16)
    call = Problem(q, k, k, scale=0.25)
    want = WAYS["standard"].run(call, 0, None)
    for name in ("sdpa", "chunked_queries"):
        failing(monkeypatch, name, -1)
    tried = failing(monkeypatch, "chunked_keys", 100)
    out, report = Chooser("auto", 2048, False, None).run(call)
    torch.testing.assert_close(out, want)
    assert report.backend == "chunked_keys" and report.chunk == tried[-1] <= 100 < tried[0]
    estimates = [WAYS["chunked_queries"].adds(call, 1), *(WAYS["chunked_keys"].adds(call, c) for c in tried)]
    assert estimates == sorted(set(estimates), reverse=True)


def test_nothing_smaller_raises_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sdpa", "chunked_queries", "chunked_keys"):
        failing(monkeypatch, name, -1)
    attention, x = small()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="1 TiB"):
        attention(x)


@pytest.mark.parametrize("name", ["sdpa", "standard"])
def test_a_backend_asked_for_by_name_is_not_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing(monkeypatch, name, -1)
    attention, x = small(backend=name)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        attention(x)
    assert tried == [0]
    attention, x = small(backend="flash")
    with pytest.raises(ValueError, match="backend='flash' cannot compute this call: flash kernels take no bias"):
        attention(x, attention_bias=torch.zeros(96, 96))


def test_other_errors_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access nothing on the device works: a retry would only hide it."""
    tried = failing(monkeypatch, "sdpa", -1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    attention, x = small()
    with pytest.raises(RuntimeError, match="illegal"):
        attention(x)
    assert tried == [0]


@pytest.mark.parametrize("name", ["chunked_queries", "chunked_keys"])
def test_a_backward_pass_that_runs_out_halves_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 24, 16, requires_grad=True) for _ in range(3))
    want = torch.autograd.grad(WAYS[name].run(Problem(q, k, v), 24, None).sum(), (q, k, v))
    real, areas = tiled._backward_rows, []

    def run(tiles: tiled._Tiles, *rest: object) -> None:
        areas.append(min(tiles.rows, 24) * min(tiles.columns, 24))
        if areas[-1] > 24 * 6:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        real(tiles, *rest)

    monkeypatch.setattr(tiled, "_backward_rows", run)
    got = torch.autograd.grad(WAYS[name].run(Problem(q, k, v), 24, None).sum(), (q, k, v))
    assert areas[:3] == [24 * 24, 24 * 12, 24 * 6]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_selector_is_opted_into(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, _ = small(selector=TopK(keep=0.5))
    x = torch.randn(1, 512, 24)
    with torch.no_grad():
        sparse = attention(x, mask=torch.ones(1, 512, dtype=torch.bool))
        assert attention.last_backend == "block_sparse"
        attention(x, attention_bias=torch.zeros(512, 512))
        assert attention.last_backend == "sdpa" and "no bias" in attention.explain().declined["block_sparse"]
    exact = attention(x)
    assert attention.last_backend == "sdpa" and "no backward" in attention.explain().declined["block_sparse"]
    assert 1e-4 < (sparse - exact).abs().max() < 1, "it left blocks out"
    by_name, _ = small(selector=TopK(keep=0.5), backend="block_sparse")
    with pytest.raises(ValueError, match="no backward pass"):
        by_name(x)
    with pytest.raises(ValueError, match="no selector is given"):
        small(backend="block_sparse")[0](x)


def test_what_ran_is_logged_once_and_nothing_printed(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    attention, x = small(use_flash_attention=True)
    assert attention.last_backend is None
    assert attention.explain(x).backend == "sdpa" and attention.last_backend is None, "explain(x) computes nothing"
    with caplog.at_level(logging.DEBUG, LOG):
        for _ in range(3):
            attention(x)
    assert len(caplog.records) == 1 and "not flash: " in caplog.text
    assert "backend sdpa: the first exact way" in caplog.text and capsys.readouterr() == ("", "")


def test_memory_of_this_machine() -> None:
    assert 1 << 20 < memory.free_memory(torch.device("cpu")) < 1 << 50
    assert not memory.ran_out_of_memory(ValueError("out of memory"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "chunked_queries", "chunked_keys", "standard"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_estimate_against_the_peak(name: str, backward: bool) -> None:
    """At 4,096 tokens: never less than 0.9 of the measured peak, never more than 2 times."""
    q, k, v = (
        torch.randn(1, 4096, 16, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_(backward)
        for _ in range(3)
    )
    call, grad = Problem(q, k, v, scale=0.125), torch.randn(1, 16, 4096, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = WAYS[name].run(call, 512, None)
        if backward:
            torch.autograd.grad(out, (q, k, v), grad)
        del out
        added = torch.cuda.max_memory_allocated() - before
    assert 0.9 * added <= WAYS[name].adds(call, 512) <= 2 * added


@pytest.mark.gpu
def test_a_bias_of_queries_in_the_fused_kernel() -> None:
    """One number a query: the kernel refuses its stride of 0 over the keys, so that it is expanded."""
    q, k, v = (torch.randn(1, 2, 200, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    queries = torch.randn(1, 2, 200, 1, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    call = Problem(q, k, v, biases=(queries,), scale=0.125)
    results = []
    for name in ("sdpa", "standard"):
        out = WAYS[name].run(call, 0, None)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, queries))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=6e-2, rtol=6e-2)


@pytest.mark.gpu
def test_a_length_whose_scores_do_not_fit_runs() -> None:
    """65,536 tokens: all scores of 16 heads are 256 GiB. Also when free memory is told wrongly."""
    q, k, v = (torch.randn(1, 16, 65536, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    call = Problem(q, k, v, scale=0.125)
    want, report = Chooser("auto", 512, False, None).run(call)
    assert report.backend == "sdpa" and report.dense == 256 * GB
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Chooser("standard", 512, False, None).run(call)
    with pytest.MonkeyPatch.context() as patched:
        free(patched, 1 << 50)
        chooser = Chooser("chunked_queries", 65536, False, None)
        out, report = chooser.run(call)
        assert report.retries > 0 and report.chunk is not None and report.chunk < 65536
        assert chooser.run(call)[1].retries == 0
    assert (out - want).abs().max() < 1e-2
