"""The command with one budget: tuned for a target, generated from and compared at another, and what it rejects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from short_runs import short

from autotune import load
from autotune.files import is_verified

LLAMA = ("--model_name", "tiny:Llama")


def test_tune_for_a_sparsity_and_compare_at_another(run: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "tuned.pt"
    budget = ("--objective", "budget", "--sparsity", "0.2", "--tail", "3", "--precisions", "native", "int8_bf16")
    assert run("tune", *LLAMA, *short("tiny:Llama"), *budget, "--model_out_path", str(file)) == 0
    info = load(file)["_metadata"]
    assert info["tradeoff"]["target"] == ["sparsity", 0.2] and is_verified(load(file))
    assert (info["l1"], info["pv_l1"], info["tail"]) == (None, None, 3.0)
    capsys.readouterr()
    found = []
    for more in ((), ("--sparsity", "0.05")):
        length = ("--max_length", "640", "--num_compare", "1")
        assert run("compare", *LLAMA, *length, "--model_out_path", str(file), *more) == 0
        out = capsys.readouterr().out
        assert ("thresholds chosen for sparsity=0.05: errors are those of the calibration's curves" in out) == bool(
            more
        )
        found.append(out.split("all")[-1].split("%")[0])
    assert found[0] != found[1]
    assert run("generate", *LLAMA, "--max_new_tokens", "2", "--model_out_path", str(file), "--sparsity", "0.1") == 0
    capsys.readouterr()
    assert run("generate", *LLAMA, "--model_out_path", str(file), "--speedup", "1.5") == 2
    assert "speedup=1.5: a speedup is reached by the cost model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--objective", "budget"), "--objective budget needs a target: --sparsity, --speedup or --error"),
        (("tune", "--sparsity", "0.7"), "--sparsity is a target of --objective budget: give both"),
        (("tune", "--objective", "budget", "--sparsity", "7"), "sparsity must be above 0 and below 1, got 7.0"),
        (("tune", "--objective", "budget", "--sparsity", "0.5", "--error", "1"), "only one of sparsity"),
        (("tune", "--objective", "thrift"), "invalid choice: 'thrift'"),
        (("tune", "--objective", "budget", "--sparsity", "0.5", "--l1", "-1"), "l1 must be above 0"),
        (("generate", "--error", "0"), "error must be above 0"),
        (("tune", "--phases", "3"), "--phases is for a diffusion pipeline"),
    ],
)
def test_rejects(arguments: tuple[str, ...], message: str, run: Any, capsys: Any) -> None:
    assert run(arguments[0], *LLAMA, *arguments[1:]) == 2
    assert message in capsys.readouterr().err
