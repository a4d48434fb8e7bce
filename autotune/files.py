"""The tuned file: extract, save and load thresholds; everything is checked before anything is installed.

A file is a flat dict ``"<path of the module>.<key>": tensor`` plus ``"_metadata"``, read with
``torch.load(weights_only=True)`` and matched by exact path. Read are formats 1 to 3, and files of the original
SpargeAttn (the same keys plus an unused ``simthreshd2``, no metadata), whose thresholds belong to 128 × 64 blocks
scored by block means. A file that keeps its trade-off (``autotune/tradeoff.py``) can be loaded for another target than
it was calibrated for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .metadata import Info, metadata_of, read_metadata
from .module import SparseAttention, sparse_modules
from .paths import clean_path
from .retarget import choose_at_load
from .storage import digest, read, write
from .tradeoff import Target
from .tuned import FILE_KEYS, Tuned

_UNUSED = "simthreshd2"  # a buffer of the original's files that nothing reads
_SUFFIX = ".inner_attention"
State = dict[str, Any]


def extract_sparse_attention_state_dict(model: Any, *, verbose: bool = False) -> State:
    """The thresholds of a tuned model or pipeline, with ``"_metadata"``; of a second transformer with its prefix.

    Raises:
        ValueError: when the model is not patched, or a layer has no thresholds yet.
    """
    state: State = {}
    modules = sparse_modules(model)
    for path, module in modules.items():
        if module.tuned is None or module.mode != "sparse":
            raise ValueError(f"layer {path!r} is not tuned yet: calibrate the model or load a tuned file first")
        for key, name in FILE_KEYS.items():
            state[f"{path}.{key}"] = getattr(module.tuned, name).cpu().clone()
        _say(verbose, path, module.tuned)
    state["_metadata"] = metadata_of(model, modules)
    return state


def _say(verbose: bool, path: str, tuned: Tuned) -> None:
    if verbose:
        print(f"{path}: {int(tuned.is_sparse.sum())} of {len(tuned.is_sparse)} heads sparse")


def save(state: State, path: str | os.PathLike[str]) -> None:
    """Write a state dict, with a digest of its tensors; the file appears whole or not at all.

    Raises:
        OSError: naming the path and the reason.
    """
    info = state.get("_metadata")
    write(state if info is None else state | {"_metadata": info | {"digest": _digest(state)}}, path)


def _digest(state: State) -> str:
    return digest({str(key): value for key, value in sorted(state.items(), key=str) if key != "_metadata"})


def load(path: str | os.PathLike[str]) -> State:
    """Read a tuned file; its checksums, and the digest of its tensors where it has one, are verified.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, or no tuned file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no tuned file at {str(path)!r}")
    try:
        state = read(Path(path))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged or not a tuned file: {error}") from error
    if not isinstance(state, dict) or not any(str(key).endswith(".is_sparse") for key in state):
        raise ValueError(f"{str(path)!r} is not a tuned file: it holds no '<layer>.is_sparse' entries")
    info = state.get("_metadata")
    if isinstance(info, dict) and info.get("digest", "") not in ("", _digest(state)):
        raise ValueError(
            f"{str(path)!r} is damaged: its tensors are not those it was saved with (files changed on purpose are "
            "written with autotune.save)"
        )
    return state


def is_verified(state: State) -> bool:
    """Whether the thresholds of a file, and the bounds they were chosen for, were checked by this library.

    Files of the original SpargeAttn never were, nor are those of models patched with ``calibrated=False``, or saved
    with thresholds that were chosen from a trade-off at load time.
    """
    info = state.get("_metadata")
    return info is not None and all(info.get(name, True) is not False for name in ("calibrated", "checked"))


def load_sparse_attention_state_dict(
    model: Any,
    state: State | str | os.PathLike[str],
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    sparsity: float | None = None,
    speedup: float | None = None,
    error: float | None = None,
    verbose: bool = False,
) -> Any:
    """Install tuned thresholds in a patched model and switch its layers to mode "sparse".

    The layers take the file's bounds as their own too, for a later calibration that names none; a warning says so
    where they had others.

    Args:
        model: a patched model, or a pipeline with patched transformers.
        state: a tuned file's path or its content.
        block_q, block_k: override the block sizes of a file of the original SpargeAttn (128 × 64 by default).
        sparsity, speedup, error: choose other thresholds than the file's, for one target as in
            :func:`autotune.calibrate` (a speedup by the cost model of the machine that the model is on). The file's
            trade-off says what each candidate costs and errs, and which of them hold the calibration's bounds; their
            errors are those of its curves, and the real kernel was not checked with this choice (``Tuned.checked`` is
            False, and so is :func:`is_verified` of a file saved from it), unless it is the one that was. PV skip is off
            where the choice differs.

    Returns:
        The model.

    Raises:
        ValueError: when a target is out of range or reach, or the file holds no trade-off to choose from; when the file
            was made for another family of models or another head dim, or a layer is missing,
            left over, has another number of heads, or a value is out of range; the message names file and layer.
            Nothing is installed then.
        RuntimeError: while the model is being calibrated.
    """
    target = Target.of(sparsity=sparsity, speedup=speedup, error=error)
    content = load(state) if isinstance(state, (str, os.PathLike)) else state
    try:
        _install(model, content, block_q, block_k, target, verbose)
    except ValueError as error:
        if content is state:
            raise
        raise ValueError(f"{str(state)!r}: {error}") from error
    return model


def _install(
    model: Any, state: State, block_q: int | None, block_k: int | None, target: Target | None, verbose: bool
) -> None:
    modules = sparse_modules(model)
    if any(module.observer is not None for module in modules.values()):
        raise RuntimeError("the model is being calibrated: load a tuned file before or after that")
    info = read_metadata(state.get("_metadata"), block_q, block_k)
    layers = _layers(state)
    info.check(model, list(modules.values()))
    if modules.keys() != layers.keys():
        raise ValueError(_mismatch(model, info, modules, layers))
    tuned = {path: _tuned(path, module, layers[path], info) for path, module in modules.items()}
    if target is not None:
        tuned = choose_at_load(tuned, info.tradeoff, target, modules, info)
    for path, module in modules.items():  # nothing fails from here on
        module.selector = info.selector_of(path)
        module.precision, module.text_sink = info.precision_of(path) or module.precision, info.text_sink
        l1, pv_l1, tail = info.checked or (None, None, None)
        if l1 is not None and pv_l1 is not None:
            module.l1, module.pv_l1, module.tail = l1, pv_l1, tail
        module.set_thresholds(tuned[path])
        _say(verbose, path, tuned[path])


def _layers(state: State) -> dict[str, dict[str, Any]]:
    """The entries of a file by layer; rejects what it does not know."""
    layers: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if key == "_metadata":
            continue
        path, _, name = str(key).rpartition(".")
        path = clean_path(path)
        if name not in (*FILE_KEYS, _UNUSED) or not path.endswith(_SUFFIX):
            allowed = ", ".join(FILE_KEYS)
            raise ValueError(f"unknown entry {key!r} in the tuned file: expected '<path>{_SUFFIX}.<one of {allowed}>'")
        entry = layers.setdefault(path, {})
        if name in entry:
            raise ValueError(f"the tuned file holds {name} of layer {path!r} twice, the second time as {key!r}")
        entry[name] = value
    return layers


def _tuned(path: str, module: SparseAttention, entry: dict[str, Any], info: Info) -> Tuned:
    """A layer's state; a ValueError that names layer and value on what a file cannot mean."""
    absent = [key for key in FILE_KEYS if key not in entry]
    if absent:
        raise ValueError(f"layer {path!r} of the tuned file lacks {absent}")
    edges = info.phase_edges.get(path, ())
    shape = (len(edges) + 1,) if edges else ()
    sizes = {x.shape[-1] for key in FILE_KEYS if isinstance(x := entry[key], Tensor) and x.dim() == len(shape) + 1}
    shape = (*shape, module.heads or max(sizes, default=1))
    selector = info.selector_of(path)
    ranges = {  # by key: lowest and highest value, and whether the lowest is excluded
        "is_sparse": (0.0, 1.0, False),
        "cdfthreshd": (min(0.0, *selector.candidates), 1.0, False),
        "simthreshd1": (-1.0, 1.0, False),
        "pvthreshd": (0.0, math.inf, True),
    }
    values: dict[str, Any] = {
        FILE_KEYS[key]: _numbers(f"layer {path!r}: {key}", entry[key], shape, *ranges[key]) for key in FILE_KEYS
    }
    flags = values["is_sparse"]
    if not bool(((flags == 0) | (flags == 1)).all()):
        raise ValueError(f"layer {path!r}: is_sparse must be true or false (1 or 0), got {flags.tolist()}")
    facts: dict[str, Any] = {name: getattr(info, name) for name in ("lengths", "calibrated", "tradeoff")}
    facts |= {"bounds": info.checked, "checked": info.thresholds_checked}
    facts |= {"edges": edges, "densities": info.phase_density.get(path, ()) if edges else ()}
    tuned = Tuned(**values, expected_density=info.layer_density.get(path), **facts)
    try:
        for phase in range(len(edges) + 1):
            tuned.at(phase).serve(selector, torch.device("cpu"))
    except ValueError as error:  # a selector may allow fewer values
        raise ValueError(f"layer {path!r}: {error}") from error
    return tuned


def _numbers(name: str, value: Any, shape: tuple[int, ...], low: float, high: float, above: bool) -> Tensor:
    """A tensor of a file as float32 ``[heads]``, or ``[phases, heads]``."""
    wanted = "[heads]" if len(shape) == 1 else "[phases, heads]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor {wanted}, got {type(value).__name__} {str(value)[:60]}")
    usual = value.layout is torch.strided and not value.is_quantized and value.device.type != "meta"
    dims = (len(shape),) if len(shape) > 1 else (0, 1)
    if value.dim() not in dims or not usual or value.is_complex():
        found = f"{value.dtype} {list(value.shape)}, {value.layout}, on {value.device}"
        raise ValueError(f"{name} must be a tensor {wanted}, got {found}")
    if value.dim() == 1 and len(value) != shape[0]:
        raise ValueError(f"{name} has {len(value)} values, the model has {shape[0]} heads")
    if len(shape) > 1 and tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}, the file's phases and the model's heads {list(shape)}")
    numbers = value.detach().cpu().float().expand(shape)
    if not bool((torch.isfinite(numbers) & ((numbers > low) if above else (numbers >= low)) & (numbers <= high)).all()):
        raise ValueError(f"{name} must be finite, in {'(' if above else '['}{low:g}, {high:g}], got {numbers.tolist()}")
    return numbers


def _mismatch(model: Any, info: Info, modules: Mapping[str, Any], layers: Mapping[str, Any]) -> str:
    missing, extra = sorted(modules.keys() - layers.keys()), sorted(layers.keys() - modules.keys())
    made_for = f" (made for {info.model_class})" if info.model_class else ""
    parts = [f"the tuned file{made_for} does not fit {type(model).__name__}:"]
    if missing:
        parts.append(f"{len(missing)} layers of the model are not in the file, first {missing[0]!r};")
        if len(missing) < len(modules) and not extra:
            parts.append("patch the layers that were tuned only (layer_range);")
    if extra:
        parts.append(f"{len(extra)} layers of the file are not in the model, first {extra[0]!r};")
    return " ".join(parts).rstrip(";")
