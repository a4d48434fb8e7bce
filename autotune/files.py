"""The tuned file: extract, save and load thresholds; everything is checked before anything is installed.

A file is a flat dict ``"<path of the module>.<key>": tensor`` plus ``"_metadata"``, read with
``torch.load(weights_only=True)`` and matched by exact path. Read are formats 1 and 2, and files of the original
SpargeAttn (the same keys plus an unused ``simthreshd2``, no metadata), whose thresholds belong to 128 × 64 blocks
scored by block means.
"""

from __future__ import annotations

import datetime
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spas_attn.call import ALIASES, PRECISIONS
from spas_attn.selectors import MeanSimilarity, Selector

from .module import (
    DEFAULT_L1,
    DEFAULT_PV_L1,
    DEFAULT_TAIL,
    SparseAttention,
    clean_path,
    sparse_modules,
    transformers_of,
)
from .storage import digest, read, write
from .tuned import FILE_KEYS, Bounds, Tuned, check_bounds

FORMAT = 2
_UNUSED = "simthreshd2"  # a buffer of the original's files that nothing reads
_SUFFIX = ".inner_attention"
_PACKAGES = ("spas-attn", "torch", "transformers", "diffusers", "triton")
_REQUIRED = ("model_class", "selector", "l1", "pv_l1", "tail")
_FORMAT_1_FIELDS = ("block_q", "block_k", "pool", "sink", "local")  # of its selector, beside the class's name
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
    state["_metadata"] = _metadata(model, modules)
    return state


def _metadata(model: Any, modules: dict[str, SparseAttention]) -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    module = next(iter(modules.values()))
    tuned = {path: module.tuned for path, module in modules.items() if module.tuned is not None}
    densities = {path: t.expected_density for path, t in tuned.items() if t.expected_density is not None}
    lengths = [length for t in tuned.values() for length in t.lengths or ()]
    head_dims = {module.head_dim for module in modules.values()}
    checked = next(iter(tuned.values())).bounds or (module.l1, module.pv_l1, module.tail)
    replaced = (module.selector.tuned, "sim_threshold")  # their values are the tensors
    return {
        "format": FORMAT,
        "model_class": _model_class(model),
        "family": module.family,
        "head_dim": head_dims.pop() if len(head_dims) == 1 else None,
        "selector": {key: value for key, value in module.selector.to_dict().items() if key not in replaced},
        "precision": module.precision,
        "text_sink": module.text_sink,
        "dense_steps": list(module.dense_steps) if module.dense_steps else None,
        **dict(zip(("l1", "pv_l1", "tail"), checked, strict=True)),
        "lengths": [min(lengths), max(lengths)] if lengths else None,
        "mean_density": sum(densities.values()) / len(densities) if densities else None,
        "layer_density": densities,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _model_class(model: Any) -> str:
    """Class of a model, or of a pipeline's first transformer, as it is without its wrappers."""
    first: Any = transformers_of(model)[0][1]
    first = getattr(first, "_orig_mod", first)
    return type(first.module if type(first).__name__.endswith("DataParallel") else first).__name__


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
    """Whether the bounds of a file were checked by this library (files of the original SpargeAttn never were)."""
    return "_metadata" in state


def load_sparse_attention_state_dict(
    model: Any,
    state: State | str | os.PathLike[str],
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    verbose: bool = False,
) -> Any:
    """Install tuned thresholds in a patched model and switch its layers to mode "sparse".

    The layers take the file's bounds as their own too, for a later calibration that names none; a warning says so
    where they had others.

    Args:
        model: a patched model, or a pipeline with patched transformers.
        state: a tuned file's path or its content.
        block_q, block_k: override the block sizes of a file of the original SpargeAttn (128 × 64 by default).

    Returns:
        The model.

    Raises:
        ValueError: when the file was made for another family of models or another head dim, or a layer is missing,
            left over, has another number of heads, or a value is out of range; the message names file and layer.
            Nothing is installed then.
        RuntimeError: while the model is being calibrated.
    """
    if isinstance(state, (str, os.PathLike)):
        content = load(state)
        try:
            return load_sparse_attention_state_dict(model, content, block_q=block_q, block_k=block_k, verbose=verbose)
        except ValueError as error:
            raise ValueError(f"{str(state)!r}: {error}") from error
    modules = sparse_modules(model)
    if any(module.observer is not None for module in modules.values()):
        raise RuntimeError("the model is being calibrated: load a tuned file before or after that")
    info = _info(state, block_q, block_k)
    layers = _layers(state)
    info.check(model, list(modules.values()))
    if modules.keys() != layers.keys():
        raise ValueError(_mismatch(model, info, modules, layers))
    tuned = {path: _tuned(path, module, layers[path], info) for path, module in modules.items()}
    for path, module in modules.items():  # nothing fails from here on
        module.selector = info.selector
        module.precision, module.text_sink = info.precision or module.precision, info.text_sink
        if info.bounds is not None:
            module.l1, module.pv_l1, module.tail = info.bounds
        module.set_thresholds(tuned[path])
        _say(verbose, path, tuned[path])
    return model


@dataclass(frozen=True)
class _Info:
    """What a file says beside thresholds, checked; the defaults are those of a file of the original."""

    selector: Selector
    model_class: str = ""
    family: str | None = None
    head_dim: int | None = None
    precision: Any = None  # None: the module's own
    text_sink: bool = True
    dense_steps: tuple[float, float] | None = None
    bounds: Bounds | None = None
    lengths: tuple[int, int] | None = None
    densities: Mapping[str, float] = field(default_factory=dict)

    def check(self, model: Any, modules: list[SparseAttention]) -> None:
        """Reject a file of another family or head dim (layers of two models may have the same paths and heads), and
        warn of what differs from the calibration.
        """
        families = {module.family for module in modules if module.family}
        if self.family and families and self.family not in families:
            raise ValueError(
                f"the tuned file was made for {self.family} ({self.model_class}), and {_model_class(model)} belongs to "
                f"the family {', '.join(sorted(families))}"
            )
        # The original's files and our first ones have no head dim, nor do files of models whose layers differ in it.
        dims = {module.head_dim for module in modules if module.head_dim}
        if self.head_dim is not None and not dims <= {self.head_dim}:
            raise ValueError(
                f"the tuned file was made for head dim {self.head_dim} ({self.model_class}), and {_model_class(model)} "
                f"has {', '.join(map(str, sorted(dims)))}"
            )
        have = [module.dense_steps or (0.0, 0.0) for module in modules]
        steps = self.dense_steps
        if steps and any(first < steps[0] or last < steps[1] for first, last in have):
            _warn(
                f"the file was calibrated with dense_steps={steps}: the noise levels that ran dense were not measured; "
                "patch the model with the same dense_steps"
            )
        own = {(module.l1, module.pv_l1, module.tail) for module in modules}
        other = own - {self.bounds, (DEFAULT_L1, DEFAULT_PV_L1, DEFAULT_TAIL)}
        if self.bounds is not None and other:
            _warn(
                f"the model was patched with l1, pv_l1, tail = {sorted(other, key=str)[0]} and the file was tuned with "
                f"{self.bounds}: the file's hold now, for later calibrations too; name bounds in calibrate() for others"
            )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _info(state: State, block_q: int | None, block_k: int | None) -> _Info:
    info = state.get("_metadata")
    if info is None:
        q, k = block_q or 128, block_k or 64
        return _Info(MeanSimilarity(pool=min(q, k), block_q=q, block_k=k, local=0))
    if not isinstance(info, dict):
        raise ValueError(f"_metadata of the tuned file must be a dict, got {type(info).__name__}")
    if info.get("format") not in (1, FORMAT):
        raise ValueError(f"the tuned file has format {info.get('format')!r}, this version reads formats 1 and {FORMAT}")
    absent = [name for name in _REQUIRED if name not in info]
    if absent:
        raise ValueError(f"_metadata of the tuned file lacks {absent}")
    selector = _selector(info)
    if block_q is not None or block_k is not None:
        raise ValueError(
            f"this file records its own block sizes ({selector.block_q} x {selector.block_k}); block_q and block_k "
            "override those of the original SpargeAttn's files only"
        )
    bounds = (info["l1"], info["pv_l1"], info["tail"])
    try:
        check_bounds(*bounds)
    except (TypeError, ValueError) as error:
        raise ValueError(f"_metadata of the tuned file holds invalid bounds: {error}") from error

    def optional(name: str, what: str, valid: Callable[[Any], bool], default: Any = None) -> Any:
        value = info.get(name)
        if value is not None and not valid(value):
            raise ValueError(f"_metadata of the tuned file: {name} must be {what} or None, got {value!r}")
        return default if value is None else value

    precision = optional("precision", f"one of {PRECISIONS}", lambda x: x in PRECISIONS or x in ALIASES)
    steps = optional("dense_steps", "two shares", lambda x: _pair(x, _share) and x[0] + x[1] < 1)
    lengths = optional("lengths", "two numbers of keys", lambda x: _pair(x, _count) and x[0] <= x[1])
    optional("mean_density", "in [0, 1]", _share)
    return _Info(
        selector,
        optional("model_class", "text", lambda x: isinstance(x, str), ""),
        optional("family", "text", lambda x: isinstance(x, str)),
        optional("head_dim", "a number", _count),
        ALIASES.get(precision, precision),
        optional("text_sink", "True or False", lambda x: isinstance(x, bool), True),
        None if steps is None else (steps[0], steps[1]),
        bounds,
        None if lengths is None else (lengths[0], lengths[1]),
        optional("layer_density", "a dict of shares by layer", _shares, {}),
    )


def _selector(info: dict[str, Any]) -> Selector:
    content = info["selector"]
    if info["format"] == 1:
        content = {"class": content, **{name: info[name] for name in _FORMAT_1_FIELDS if name in info}}
    try:
        return Selector.from_dict(content)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"_metadata of the tuned file: selector {content!r} is invalid: {error}") from error


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _share(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x <= 1


def _shares(x: Any) -> bool:
    return isinstance(x, dict) and all(value is None or _share(value) for value in x.values())


def _pair(x: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(x, (list, tuple)) and len(x) == 2 and all(valid(value) for value in x)


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


def _tuned(path: str, module: SparseAttention, entry: dict[str, Any], info: _Info) -> Tuned:
    """A layer's state; a ValueError that names layer and value on what a file cannot mean."""
    absent = [key for key in FILE_KEYS if key not in entry]
    if absent:
        raise ValueError(f"layer {path!r} of the tuned file lacks {absent}")
    sizes = {len(x) for key in FILE_KEYS if isinstance(x := entry[key], Tensor) and x.dim() == 1}
    heads = module.heads or max(sizes, default=1)
    ranges = {  # by key: lowest and highest value, and whether the lowest is excluded
        "is_sparse": (0.0, 1.0, False),
        "cdfthreshd": (min(0.0, *info.selector.candidates), 1.0, False),
        "simthreshd1": (-1.0, 1.0, False),
        "pvthreshd": (0.0, math.inf, True),
    }
    values = {FILE_KEYS[key]: _numbers(f"layer {path!r}: {key}", entry[key], heads, *ranges[key]) for key in FILE_KEYS}
    flags = values["is_sparse"]
    if not bool(((flags == 0) | (flags == 1)).all()):
        raise ValueError(f"layer {path!r}: is_sparse must be true or false (1 or 0), got {flags.tolist()}")
    return Tuned(**values, expected_density=info.densities.get(path), lengths=info.lengths, bounds=info.bounds)


def _numbers(name: str, value: Any, heads: int, low: float, high: float, above: bool) -> Tensor:
    """A tensor of a file as float32 ``[heads]``."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor [heads], got {type(value).__name__} {str(value)[:60]}")
    usual = value.layout is torch.strided and not value.is_quantized and value.device.type != "meta"
    if value.dim() > 1 or not usual or value.is_complex():
        raise ValueError(
            f"{name} must be a tensor [heads], got {value.dtype} {list(value.shape)}, {value.layout}, on {value.device}"
        )
    if value.dim() == 1 and len(value) != heads:
        raise ValueError(f"{name} has {len(value)} values, the model has {heads} heads")
    numbers = value.detach().cpu().float().expand(heads)
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{name} holds values that are not finite: {numbers.tolist()}")
    if not bool((((numbers > low) if above else (numbers >= low)) & (numbers <= high)).all()):
        raise ValueError(f"{name} must be in {'(' if above else '['}{low:g}, {high:g}], got {numbers.tolist()}")
    return numbers


def _mismatch(model: Any, info: _Info, modules: Mapping[str, Any], layers: Mapping[str, Any]) -> str:
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
