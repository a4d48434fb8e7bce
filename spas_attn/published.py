"""Published tables: thresholds of XAttention, streaming heads of DuoAttention and PruLong, patterns of MInference.

Each reader gives one selector per layer; ``modify_model.patch(model, selector=..., calibrated=False)`` takes the list.
Nothing that a file says is executed. Tables of heads are written too.
"""

from __future__ import annotations

import ast
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .selectors import MInference, Streaming, XAttention

HEADS_FILE, CONFIG_FILE = "full_attention_heads.tsv", "config.json"
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
    dense = full_heads(path, sparsity=sparsity, threshold=threshold, layers=layers)
    kv_heads = dense.shape[1]
    if query_heads < 1 or query_heads % kv_heads:
        raise ValueError(f"query_heads must be a multiple of the table's {kv_heads} KV heads, got {query_heads}")
    sizes = window_sizes(path, sink_tokens, local_tokens)
    group = query_heads // kv_heads
    return [Streaming(*sizes, dense_heads=row.repeat_interleave(group), **options) for row in dense]


def full_heads(
    source: str | Path | Tensor | list[list[float]],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    layers: int | None = None,
    kv_heads: int | None = None,
) -> Tensor:
    """The KV heads of a table that keep everything, bool ``[layers, KV heads]``; see :func:`streaming_heads`.

    Args:
        source: a table's file or folder, or the table itself.
        kv_heads: of the model, checked where it is given.
    """
    if not isinstance(source, (str, Path)):
        return _dense_heads(_table(source, "the table of heads", layers, kv_heads), sparsity, threshold)
    file = _heads_file(source)
    try:
        lines = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
        rows = [[float(cell) for cell in line] for line in lines]
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no table of heads: {error}") from error
    return _dense_heads(_table(rows, f"{file}", layers, kv_heads), sparsity, threshold)


def window_sizes(source: Any, sink_tokens: int | None, local_tokens: int | None) -> tuple[int, int]:
    """Sink and local window in tokens, as given, or from the ``config.json`` beside a table's file."""
    config = _heads_file(source).with_name(CONFIG_FILE) if isinstance(source, (str, Path)) else None
    return _sizes(config, sink_tokens, local_tokens)


def write_head_table(folder: str | Path, table: Tensor | list[list[float]], sink_size: int, recent_size: int) -> Path:
    """Write a table of heads as DuoAttention and PruLong do, which :func:`streaming_heads` and their code read.

    ``full_attention_heads.tsv`` and ``config.json``; each file appears whole or not at all.

    Args:
        folder: made where there is none.
        table: ``[layers, KV heads]``, 1 = the head keeps everything, 0 = it streams, or values between.
        sink_size, recent_size: of the streaming heads, in tokens.

    Returns:
        The path of the table.

    Raises:
        ValueError: on values outside [0, 1] and sizes that are no numbers of tokens, and where the folder holds a
            ``config.json`` of something else, such as a model's. Nothing is written then.
    """
    folder = Path(folder)
    values = _table(table, "table", None, None)
    sizes = dict(zip(("sink_size", "recent_size"), (sink_size, recent_size), strict=True))
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{name} must be a number of tokens, 0 or more, got {size!r}")
    config = folder / CONFIG_FILE
    if config.exists():
        present = _json(config)
        if not isinstance(present, dict) or not sizes.keys() <= present.keys():
            raise ValueError(f"folder must not hold another config.json: {config} is none of a table of heads")
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(f"{value:.9g}" for value in row) for row in values.tolist()]
    _write(config, json.dumps(sizes, indent=2) + "\n")
    _write(folder / HEADS_FILE, "\n".join(lines) + "\n")
    return folder / HEADS_FILE


def _write(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _heads_file(path: str | Path) -> Path:
    return Path(path) / HEADS_FILE if Path(path).is_dir() else Path(path)


def _sizes(config: Path | None, sink: int | None, local: int | None) -> tuple[int, int]:
    """Sink and local window in tokens, as given or from the file beside the table."""
    content = _json(config) if config is not None and config.exists() and None in (sink, local) else {}
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
