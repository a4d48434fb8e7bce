"""evaluate/benchmarks/prefill.py: forced densities, the calls it times, rows and their file."""

from __future__ import annotations

import json
from pathlib import Path

import prefill
import pytest
import torch
import torch.nn.functional as F

from autotune import record_density
from autotune.module import sparse_modules
from spas_attn import backends
from spas_attn.call import Call

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.mark.parametrize("name", ["XAttention", "FlexPrefill", "FlashPrefill", "MeanSimilarity", "TopK"])
def test_a_threshold_is_found_for_a_density(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 4096, 32, generator=generator) for heads in (2, 1))
    call = Call.make(q, k, k, is_causal=True)
    for target in (0.6, 0.5):  # FlashPrefill forces 46% here
        kept = prefill.density_on(call, prefill.at_density(name, call, target))
        assert kept == pytest.approx(target, abs=0.03)


def test_rows_of_a_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, methods = tmp_path / "new" / "a.1", ["XAttention", "Streaming"]
    given = ["--tiny", "--lengths", "1536", "--layers", "2", "--runs", "1", "--density", "0.4", "--methods", *methods]
    assert prefill.main([*given, "--out", str(out)]) == 0
    rows = json.loads((tmp_path / "new" / "a.1.json").read_text())["rows"]
    found = [(row["part"], row["method"], row.get("backend")) for row in rows]
    assert found == [
        ("select", "dense", "SDPA"), ("select", "XAttention", None), ("select", "Streaming", None),
        ("first_token", "dense", "SDPA"), ("first_token", "XAttention", "cpu"), ("first_token", "XAttention", "auto"),
        ("first_token", "Streaming", "cpu"), ("first_token", "Streaming", "auto"),
    ]  # fmt: skip
    assert rows[1]["share"] == pytest.approx(rows[1]["ms"] / rows[0]["ms"])
    assert rows[4]["speedup"] == pytest.approx(rows[3]["ms"] / rows[4]["ms"])
    assert rows[4]["kept"] == pytest.approx(0.4, abs=0.06) and rows[3]["kept"] == 1.0
    assert all(row["layers"] == "2 of 32" for row in rows if row["part"] == "first_token")
    assert capsys.readouterr().out.count("| 2 of 32 |") == 5


def test_dense_calls_on_another_backend_leave_the_model_as_it_was() -> None:
    args = prefill.argparse.Namespace(tiny=True, layers=1, out=None, runs=1)
    model = prefill.Benchmark(args).model()
    ids = torch.randint(0, prefill.VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
    exact = prefill.forward(model, ids)
    with prefill._through(model, "reference"):
        assert torch.allclose(prefill.forward(model, ids), exact, atol=1e-4)
    assert not any("forward" in vars(layer) for layer in sparse_modules(model).values())
    call = prefill.seen_by_a_layer(model, ids)
    plain = F.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, enable_gqa=True)
    assert torch.allclose(backends.get("reference").run(call), plain, atol=1e-5)
    with record_density(model) as densities:
        prefill.run_sparse(model, prefill.METHODS["TopK"], 0.5, "cpu")
        prefill.forward(model, ids)
    assert densities.mean <= 1.0


@pytest.mark.parametrize("given", [["--tiny", "--density", "0"], ["--lengths", "8192"], ["--tiny", "--layers", "33"]])
def test_refuses_arguments(given: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        prefill.main(given)
    assert stopped.value.code == 2
