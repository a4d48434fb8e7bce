"""Published tables, by hand in the published formats; the wrong ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spas_attn.published import minference_table, streaming_heads, write_head_table, xattention_table
from spas_attn.selectors import MInference

TABLE = [[0.5, 0.75, 0.0, 1.0], [0.25, 0.96875, 0.5, 0.125], [1.0, 1.0, 0.75, 0.5]]  # 3 layers x 4 query heads
PYTHON = f"""import torch
raise SystemExit("this file was run")
llama_fuse_4 = {[[0.1] * 4] * 3}
llama_fuse_16 = torch.tensor({TABLE})
names = ["no", "table"]
"""


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_xattention_table_in_every_format(tmp_path: Path) -> None:
    torch.save(torch.tensor(TABLE), tmp_path / "tensor.pt")
    torch.save({"llama_fuse_16": TABLE}, tmp_path / "named.pt")
    files = [
        write(tmp_path / "list.json", TABLE),
        write(tmp_path / "named.json", {"llama_fuse_8": [[0.1] * 4] * 3, "llama_fuse_16": TABLE}),
        write(tmp_path / "llama_threshold.py", PYTHON),
        tmp_path / "tensor.pt",
        tmp_path / "named.pt",
    ]
    for path in files:
        selectors = xattention_table(path, layers=3, heads=4, block_q=64)
        assert [torch.as_tensor(s.threshold).tolist() for s in selectors] == TABLE
        assert all((s.stride, s.block_q) == (16, 64) for s in selectors)
    four = xattention_table(files[2], stride=4)
    assert four[0].stride == 4 and torch.as_tensor(four[0].threshold).tolist() == pytest.approx([0.1] * 4)
    assert xattention_table(files[1], name="llama_fuse_8")[0].stride == 16


def test_a_head_of_the_table_is_a_query_head(tmp_path: Path) -> None:
    """0 leaves the sink and the diagonal, 1 everything."""
    selector = xattention_table(write(tmp_path / "t.json", [[0.0, 1.0, 0.0, 1.0]]), block_q=64, block_k=64)[0]
    x = torch.randn(1, 4, 512, 32, generator=torch.Generator().manual_seed(0))
    counts = selector.select(x, x[:, :2], is_causal=True).counts[0, :, -1].tolist()
    assert counts == [2, 8, 2, 8]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.json", [[0.5, 0.5], [0.5]], {}, "rows of one length"),
        ("t.json", [0.5, 0.5], {}, "layers x heads, got shape"),
        ("t.json", [], {}, "layers x heads, got shape"),
        ("t.json", [[0.5, 1.5]], {}, "numbers from 0 to 1"),
        ("t.json", "[[NaN, 0.5]]", {}, "numbers from 0 to 1"),
        ("t.json", [["high"]], {}, "layers x heads"),
        ("t.json", TABLE, {"layers": 32}, "has 3 layers, but 32"),
        ("t.json", TABLE, {"heads": 32}, "has 4 heads, but 32"),
        ("t.json", TABLE, {"name": "x"}, "name must be left out"),
        ("t.json", {"a_16": TABLE, "b_16": TABLE}, {}, "name must be one of"),
        ("t.json", {"a": TABLE}, {"name": "b"}, "name must be one of"),
        ("t.json", "{", {}, "cannot be read"),
        ("t.py", "x = (", {}, "cannot be read"),
        ("t.py", "x = [f()]\n", {}, "assigns no list"),
        ("t.pt", "no archive", {}, "cannot be read"),
        ("t.py", PYTHON, {"stride": 8}, "name must be one of"),
    ],
)
def test_tables_that_are_none(name: str, content: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        xattention_table(path, **options)
    assert str(path) in str(error.value)


def heads_folder(folder: Path, rows: list[list[float]], config: Any = None) -> Path:
    write(folder / "full_attention_heads.tsv", "\n".join("\t".join(map(str, row)) for row in rows) + "\n")
    if config is not None:
        write(folder / "config.json", config)
    return folder


def test_streaming_heads(tmp_path: Path) -> None:
    folder = heads_folder(tmp_path, [[1.0, 0.0], [0.0, 0.0]], {"sink_size": 64, "recent_size": 256, "lr": 0.02})
    first, second = streaming_heads(folder, query_heads=4, layers=2, block_k=64)
    assert first.dense_heads is not None and first.dense_heads.tolist() == [True, True, False, False]
    assert second.dense_heads is not None and not second.dense_heads.any()
    assert (first.sink_tokens, first.local_tokens, first.block_k) == (64, 256, 64)
    given = streaming_heads(folder / "full_attention_heads.tsv", query_heads=2, sink_tokens=128, local_tokens=1024)
    assert (given[0].sink_tokens, given[0].local_tokens) == (128, 1024)
    x = torch.randn(1, 4, 1024, 32, generator=torch.Generator().manual_seed(0))
    counts = first.select(x, x[:, :2], is_causal=True).counts[0, :, -1].tolist()
    assert counts[:2] == [16, 16] and counts[2] == counts[3] == 1 + 4 + 2  # sink, 256 keys, the two of the diagonal


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"threshold": 0.5}, [[1, 1, 0], [1, 0, 0]]),
        ({"threshold": 0.0}, [[1, 1, 1], [1, 1, 1]]),
        ({"sparsity": 0.0}, [[1, 1, 1], [1, 1, 1]]),
        ({"sparsity": 1.0}, [[0, 0, 0], [0, 0, 0]]),
        ({"sparsity": 0.5}, [[1, 1, 0], [1, 0, 0]]),
        ({"sparsity": 0.25}, [[1, 1, 1], [1, 0, 0]]),  # of three equal values the later two stream first
        ({"sparsity": 0.8}, [[1, 0, 0], [0, 0, 0]]),
    ],
)
def test_which_heads_stream(rule: dict[str, float], expected: list[list[int]], tmp_path: Path) -> None:
    folder = heads_folder(tmp_path, [[0.9, 0.5, 0.2], [0.5, 0.2, 0.2]], {"sink_size": 128, "recent_size": 1024})
    found = [s.dense_heads for s in streaming_heads(folder, query_heads=3, **rule)]  # type: ignore[arg-type]
    assert [heads.int().tolist() for heads in found if heads is not None] == expected


SIZES = {"sink_tokens": 128, "local_tokens": 1024}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[1, 0], [1]], {"query_heads": 2, **SIZES}, "rows of one length"),
        ([[1, 2]], {"query_heads": 2, **SIZES}, "numbers from 0 to 1"),
        ([[1, 0]], {"query_heads": 3, **SIZES}, "query_heads must be a multiple"),
        ([[1, 0]], {"query_heads": 0, **SIZES}, "query_heads must be a multiple"),
        ([[1, 0]], {"query_heads": 2, "layers": 4, **SIZES}, "has 1 layers, but 4"),
        ([[0.3, 0.7]], {"query_heads": 2, **SIZES}, "give sparsity or threshold"),
        ([[0.3, 0.7]], {"query_heads": 2, "sparsity": 0.5, "threshold": 0.5, **SIZES}, "exclude each other"),
        ([[0.3, 0.7]], {"query_heads": 2, "sparsity": 1.5, **SIZES}, "sparsity must be in"),
        ([[1, 0]], {"query_heads": 2}, "sink_tokens must be a number of tokens.*no 'sink_size'"),
        ([[1, 0]], {"query_heads": 2, "sink_tokens": 128}, "local_tokens must be a number of tokens"),
    ],
)
def test_head_tables_that_do_not_fit(rows: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        streaming_heads(heads_folder(tmp_path, rows), **options)


def test_head_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table of heads"):
        streaming_heads(tmp_path, query_heads=2, **SIZES)
    with pytest.raises(ValueError, match="no table of heads"):
        streaming_heads(write(tmp_path / "x.tsv", "full\tstreaming\n"), query_heads=2, **SIZES)


def test_minference_table(tmp_path: Path) -> None:
    layers = [
        {"0": ["vertical_and_slash", 1000, 6096, 0.5], "1": ["vertical_and_slash", 30, 800, 0.25]},
        {"1": ["block_sparse", 100, 100, 1.0], "0": ["stream_llm", 128, 1024, 1.0]},
    ]
    first, second = minference_table(write(tmp_path / "model.json", layers), layers=2, heads=2, block_q=64)
    assert isinstance(first, MInference) and first.pattern == ("vertical_slash", "vertical_slash")
    assert torch.as_tensor(first.vertical_size).tolist() == [1000, 30]
    assert torch.as_tensor(first.slash_size).tolist() == [6096, 800]
    assert second.pattern == ("a_shape", "block_sparse") and second.block_q == 64
    assert torch.as_tensor(second.vertical_size).tolist() == [128, 100]
    assert torch.as_tensor(second.slash_size).tolist() == [1024, 100]


GOOD = ["vertical_and_slash", 10, 10, 1.0]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({}, {}, "must hold a list"),
        ([], {}, "must hold a list"),
        ([{"0": GOOD, "2": GOOD}], {}, "layer 0 must be an object with the heads"),
        ([{"0": ["diagonal", 10, 10, 1.0]}], {}, "layer 0, head 0 must be"),
        ([{"0": ["vertical_and_slash", 10]}], {}, "layer 0, head 0 must be"),
        ([{"0": ["vertical_and_slash", -1, 10, 1.0]}], {}, "sizes must be numbers"),
        ([{"0": GOOD}, {"0": GOOD, "1": GOOD}], {}, "has 2 heads, but 1"),
        ([{"0": GOOD}], {"heads": 2}, "has 1 heads, but 2"),
        ([{"0": GOOD}], {"layers": 2}, "has 1 layers, but 2"),
    ],
)
def test_patterns_that_are_none(content: Any, options: dict[str, int], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.json", content)
    with pytest.raises(ValueError, match=message) as error:
        minference_table(path, **options)
    assert str(path) in str(error.value)


def test_written_tables_are_read(tmp_path: Path) -> None:
    table = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    file = write_head_table(tmp_path / "new" / "folder", table, 128, 1024)
    assert file == tmp_path / "new" / "folder" / "full_attention_heads.tsv"
    assert {x.name for x in file.parent.iterdir()} == {"full_attention_heads.tsv", "config.json"}, (
        "nothing is left over"
    )
    assert json.loads(file.with_name("config.json").read_text()) == {"sink_size": 128, "recent_size": 1024}
    rows = [[float(cell) for cell in line.split("\t")] for line in file.read_text().splitlines()]
    assert torch.equal(torch.tensor(rows), table), "to the bit"
    for value in table.flatten().tolist():
        dense = [selector.dense_heads for selector in streaming_heads(file, query_heads=4, threshold=value)]
        assert torch.equal(torch.stack(dense), table >= value)  # type: ignore[arg-type]
    write_head_table(file.parent, [[1, 0], [0, 1]], 64, 0)  # again, of another model
    again = streaming_heads(file.parent, query_heads=2)
    assert [selector.dense_heads.tolist() for selector in again if selector.dense_heads is not None] == [
        [True, False],
        [False, True],
    ]
    assert file.read_text() == "1\t0\n0\t1\n"


@pytest.mark.parametrize(
    ("table", "sizes", "message"),
    [
        ([[0.5, 1.5]], (128, 1024), "table must hold numbers from 0 to 1"),
        ([[0.5, float("nan")]], (128, 1024), "table must hold numbers from 0 to 1"),
        ([[0.5], [0.5, 0.5]], (128, 1024), "rows of one length"),
        (torch.ones(3), (128, 1024), "layers x heads"),
        ([[1.0]], (-1, 1024), "sink_size must be a number of tokens, 0 or more, got -1"),
        ([[1.0]], (128, 0.5), "recent_size must be a number of tokens, 0 or more, got 0.5"),
        ([[1.0]], (True, 1024), "sink_size must be a number of tokens"),
    ],
)
def test_tables_that_are_not_written(table: Any, sizes: tuple[Any, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_head_table(tmp_path / "new", table, *sizes)
    assert not (tmp_path / "new").exists()


def test_a_model_is_not_overwritten(tmp_path: Path) -> None:
    config = write(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(ValueError, match="folder must not hold another config.json"):
        write_head_table(tmp_path, [[1.0]], 128, 1024)
    assert json.loads(config.read_text()) == {"model_type": "llama"} and len(list(tmp_path.iterdir())) == 1
