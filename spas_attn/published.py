"""Published tables: thresholds of XAttention, streaming heads of DuoAttention and PruLong, patterns of MInference.

Each reader gives one selector per layer; ``modify_model.patch(model, selector=..., calibrated=False)`` takes the list.
Nothing that a file says is executed.
"""

from __future__ import annotations

import ast
import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .selectors import MInference, Streaming, XAttention

HEADS_FILE = "full_attention_heads.tsv"
# MInference's published names of the patterns, by ours.
PATTERN_NAMES = {"vertical_slash": "vertical_and_slash", "a_shape": "stream_llm", "block_sparse": "block_sparse"}
_PATTERNS = {published: name for name, published in PATTERN_NAMES.items()}


def xattention_table(
    path: str | Path,
    *,
    stride: int = 16,
    name: str | None = None,
    layers: int | None = None,
    heads: int | None = None,
    **options: Any,
) -> list[XAttention]:
    """XAttention's thresholds per layer and query head, as its repository publishes them for Llama-3.1-8B (32 x 32).

    Args:
        path: a JSON file, a ``.pt`` file (read with ``weights_only``), or a Python file with a list of lists, which is
            parsed and never run.
        stride: that the table was made for.
        name: of the table, where a file holds several; by default the one whose name ends in ``_<stride>``.
        layers, heads: numbers of the model, checked where they are given.
        options: further fields of XAttention (block sizes and the like).

    Raises:
        ValueError: on a file that is no such table, and another number of layers or heads.
    """
    table = _table(_rows(Path(path), stride, name), f"{path}", layers, heads)
    return [XAttention(row.clone(), stride, **options) for row in table]


def streaming_heads(
    path: str | Path,
    *,
    query_heads: int,
    sparsity: float | None = None,
    threshold: float | None = None,
    sink_tokens: int | None = None,
    local_tokens: int | None = None,
    layers: int | None = None,
    **options: Any,
) -> list[Streaming]:
    """Head tables of DuoAttention (arXiv 2410.10819) and PruLong (arXiv 2506.17121): heads at 1 dense, at 0 streaming.

    Args:
        path: a ``full_attention_heads.tsv`` or ``masks_sp*.tsv`` (layers x KV heads, no header), or its folder.
        query_heads: of a layer of the model; those of a KV head share its value.
        sparsity: share of the KV heads of the whole model that stream, rounded to a whole number of them: those of the
            lowest values; of equal values those of later layers, and in a layer of later heads, stream first.
        threshold: heads of at least this value are dense. Give one of the two, unless all values are 0 or 1.
        sink_tokens, local_tokens: of the streaming heads; by default ``sink_size`` and ``recent_size`` of the
            ``config.json`` beside the table. PruLong publishes none and uses 128 and 1024.
        layers: of the model, checked where it is given.
        options: further fields of Streaming.

    Raises:
        ValueError: on a file that is no such table, heads that do not fit, and where a size or a rule is missing.
    """
    path = Path(path)
    file = path / HEADS_FILE if path.is_dir() else path
    try:
        lines = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
        rows = [[float(cell) for cell in line] for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no table of heads: {error}") from error
    table = _table(rows, f"{file}", layers, None)
    kv_heads = table.shape[1]
    if query_heads < 1 or query_heads % kv_heads:
        raise ValueError(f"query_heads must be a multiple of the table's {kv_heads} KV heads, got {query_heads}")
    dense = _dense_heads(table, sparsity, threshold)
    sizes = _sizes(file.with_name("config.json"), sink_tokens, local_tokens)
    group = query_heads // kv_heads
    return [Streaming(*sizes, dense_heads=row.repeat_interleave(group), **options) for row in dense]


def minference_table(
    path: str | Path, *, layers: int | None = None, heads: int | None = None, **options: Any
) -> list[MInference]:
    """MInference's patterns: a JSON list with one object per layer, ``{head: [pattern, vertical, slash, score]}``.

    Args:
        path: the JSON file.
        layers, heads: numbers of the model, checked where they are given.
        options: further fields of MInference.

    Raises:
        ValueError: on a file that is no such table, and another number of layers or heads.
    """
    return minference_layers(_json(Path(path)), f"{path}", layers=layers, heads=heads, **options)


def minference_layers(
    content: Any, where: str, *, layers: int | None = None, heads: int | None = None, **options: Any
) -> list[MInference]:
    """The selectors of a table that is read already; ``where`` names it in errors, the rest is as in
    :func:`minference_table`.
    """
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where} must hold a list with one object per layer, got {type(content).__name__}")
    found = [_layer(entry, f"{where}, layer {index}") for index, entry in enumerate(content)]
    _check_count(where, "layers", len(found), layers)
    for patterns, _ in found:
        _check_count(where, "heads", len(patterns), heads or len(found[0][0]))
    return [MInference(patterns, sizes[:, 0].clone(), sizes[:, 1].clone(), **options) for patterns, sizes in found]


def _rows(path: Path, stride: int, name: str | None) -> Any:
    """The nested list of numbers in a file; of several named ones the one that is asked for."""
    if path.suffix == ".py":
        content: Any = _python_lists(path)
    elif path.suffix in (".pt", ".pth"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    else:
        content = _json(path)
    if not isinstance(content, dict):
        if name is not None:
            raise ValueError(f"name must be left out: {path} holds one table without a name, got {name!r}")
        return content
    known = sorted(content)
    if name is None:
        chosen = [key for key in known if key.endswith(f"_{stride}")] if len(known) > 1 else known
        if len(chosen) != 1:
            raise ValueError(f"name must be one of {known} in {path} (none is clearly of stride {stride})")
        name = chosen[0]
    if name not in content:
        raise ValueError(f"name must be one of {known} in {path}, got {name!r}")
    return content[name]


def _python_lists(path: Path) -> dict[str, Any]:
    """Lists of lists that a Python file assigns to names, by name; the file is parsed, not run."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        if isinstance(value, ast.Call) and value.args:  # torch.tensor([...])
            value = value.args[0]
        if isinstance(target, ast.Name) and isinstance(value, ast.List):
            try:
                found[target.id] = ast.literal_eval(value)
            except ValueError:
                continue
    if not found:
        raise ValueError(f"{path} assigns no list of numbers to a name")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _table(rows: Any, where: str, layers: int | None, heads: int | None) -> Tensor:
    """Numbers of [0, 1] as float32 ``[layers, heads]``."""
    try:
        table = torch.as_tensor(rows, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where} must hold a table of layers x heads with rows of one length: {error}") from error
    if table.dim() != 2 or not table.numel():
        raise ValueError(f"{where} must hold a table of layers x heads, got shape {tuple(table.shape)}")
    if not bool(((table >= 0) & (table <= 1)).all()):  # NaN too
        raise ValueError(f"{where} must hold numbers from 0 to 1, got {float(table.min())} to {float(table.max())}")
    _check_count(where, "layers", table.shape[0], layers)
    _check_count(where, "heads", table.shape[1], heads)
    return table


def _check_count(where: str, what: str, found: int, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise ValueError(f"{where} has {found} {what}, but {wanted} are needed")


def _dense_heads(table: Tensor, sparsity: float | None, threshold: float | None) -> Tensor:
    """KV heads that stay dense, bool ``[layers, KV heads]``."""
    if sparsity is not None and threshold is not None:
        raise ValueError(f"sparsity and threshold exclude each other, got {sparsity} and {threshold}")
    for name, value in (("sparsity", sparsity), ("threshold", threshold)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if threshold is not None:
        return table >= threshold
    if sparsity is None:
        if bool(((table == 0) | (table == 1)).all()):
            return table == 1
        raise ValueError("the table holds values between 0 and 1: give sparsity or threshold")
    values = table.flatten()
    dense = values.argsort(descending=True, stable=True)[: len(values) - math.floor(sparsity * len(values) + 0.5)]
    return torch.zeros(len(values), dtype=torch.bool).index_fill_(0, dense, True).view_as(table)


def _sizes(config: Path, sink: int | None, local: int | None) -> tuple[int, int]:
    """Sink and local window in tokens, as given or from the file beside the table."""
    content = _json(config) if config.exists() and None in (sink, local) else {}
    if not isinstance(content, dict):
        raise ValueError(f"{config} must hold an object, got {type(content).__name__}")
    sizes = []
    for name, key, value in (("sink_tokens", "sink_size", sink), ("local_tokens", "recent_size", local)):
        found = content.get(key) if value is None else value
        if isinstance(found, bool) or not isinstance(found, int) or found < 0:
            said = f"{key!r} of {config} is {found!r}" if key in content else f"no {key!r} in {config}"
            raise ValueError(f"{name} must be a number of tokens, 0 or more: give it ({said}; got {value!r})")
        sizes.append(found)
    return sizes[0], sizes[1]


def _layer(entry: Any, where: str) -> tuple[tuple[str, ...], Tensor]:
    """Patterns and sizes ``[heads, 2]`` of one layer."""
    if not isinstance(entry, dict) or set(entry) != {str(head) for head in range(len(entry))} or not entry:
        raise ValueError(f"{where} must be an object with the heads '0', '1', … as keys")
    patterns, sizes = [], []
    for head in range(len(entry)):
        values = entry[str(head)]
        if not isinstance(values, list) or len(values) not in (3, 4) or values[0] not in _PATTERNS:
            raise ValueError(
                f"{where}, head {head} must be [pattern, vertical size, slash size, score] with a pattern of "
                f"{sorted(_PATTERNS)}, got {values!r}"
            )
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) or x < 0 for x in values[1:3]):
            raise ValueError(f"{where}, head {head}: sizes must be numbers of tokens, 0 or more, got {values[1:3]}")
        patterns.append(_PATTERNS[values[0]])
        sizes.append([float(x) for x in values[1:3]])
    return tuple(patterns), torch.tensor(sizes)
