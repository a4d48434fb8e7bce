"""evaluate/benchmarks/streaming_cache.py: rows of a trial, and their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import streaming_cache

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_rows_of_a_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "a.1"
    assert streaming_cache.main(["--tiny", "--shares", "0", "0.5", "0.75", "--out", str(out)]) == 0
    content = json.loads((tmp_path / "new" / "a.1.json").read_text())
    assert (content["facts"]["sink"], content["facts"]["window"]) == (64, 128)
    rows = [row for row in content["rows"] if row["tokens"] == 2048]
    assert [row["streaming"] for row in rows] == [0, 0.5, 0.75]
    shares = [row["kv_share"] for row in rows]
    assert shares[0] == 1 and 0.5 < shares[1] < 0.75 and 0.25 < shares[2] < 0.5
    assert all(row["prefill_ms"] > 0 and row["chunked_ms"] > 0 and row["token_ms"] > 0 for row in rows)
    assert "kv_MiB" in capsys.readouterr().out


def test_arguments_that_cannot_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in ((["--tiny", "--shares", "1.5"], "--shares must lie in"), ([], "needs a GPU")):
        with pytest.raises(SystemExit):
            streaming_cache.main(given)
        assert message in capsys.readouterr().err


def test_heads_of_a_table() -> None:
    table = streaming_cache.make_table(4, 8, 0.75)
    assert (table == 0).sum(1).tolist() == [6] * 4
