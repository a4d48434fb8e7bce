"""The tuned file: extract, save and load thresholds, with strict validation.

A file is a flat dict ``"<path of the module>.<buffer>": tensor`` plus ``"_metadata"``, read with
``torch.load(weights_only=True)`` and matched by exact path. Files of the original SpargeAttn (the same buffer names
plus an unused ``simthreshd2``, no metadata) load as 128 × 64 blocks scored by block means.
"""

from __future__ import annotations

import datetime
import os
import pickle
import warnings
from collections.abc import Iterable
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spas_attn.selectors import MeanSimilarity, PeakMass

from .module import BUFFERS, SparseAttention, Thresholds, check_bounds, clean_path, sparse_modules, transformers_of

FORMAT = 1
SELECTORS: dict[str, type[MeanSimilarity]] = {kind.__name__: kind for kind in (MeanSimilarity, PeakMass)}
_UNUSED = "simthreshd2"  # a buffer of the original's files that nothing reads
_SUFFIX = ".inner_attention"
_PACKAGES = ("spas-attn", "torch", "transformers", "diffusers", "triton")
# What torch.load raises on damaged and foreign files.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError,
)  # fmt: skip
_REQUIRED = ("model_class", "selector", "block_q", "block_k", "pool", "sink", "local", "l1", "pv_l1", "tail")
State = dict[str, Any]


def extract_sparse_attention_state_dict(model: Any, *, verbose: bool = False) -> State:
    """The thresholds of a tuned model or pipeline, with ``"_metadata"``; of a second transformer with its prefix.

    Raises:
        ValueError: when the model is not patched, or a layer has no thresholds yet.
    """
    state: State = {}
    modules = sparse_modules(model)
    for path, module in modules.items():
        if module.is_sparse is None or module.mode != "sparse":
            raise ValueError(f"layer {path!r} is not tuned yet: calibrate the model or load a tuned file first")
        for name in BUFFERS:
            state[f"{path}.{name}"] = getattr(module, name).detach().cpu().clone()
        if verbose:
            print(f"{path}: {int(module.is_sparse.sum())} of {module.heads} heads sparse")
    state["_metadata"] = _metadata(model, next(iter(modules.values())))
    return state


def _metadata(model: Any, module: SparseAttention) -> dict[str, Any]:
    selector = module.selector
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:
            continue
    modules = sparse_modules(model)
    densities = {path: m.expected_density for path, m in modules.items() if m.expected_density is not None}
    head_dims = {m.head_dim for m in modules.values()}
    return {
        "format": FORMAT,
        "model_class": _model_class(model),
        "family": module.family,
        "head_dim": head_dims.pop() if len(head_dims) == 1 else None,
        "selector": type(selector).__name__,
        "block_q": selector.block_q,
        "block_k": selector.block_k,
        "pool": selector.pool,
        "sink": selector.sink,
        "local": selector.local,
        "precision": module.precision,
        "text_sink": module.text_sink,
        "dense_steps": list(module.dense_steps) if module.dense_steps else None,
        "l1": module.l1,
        "pv_l1": module.pv_l1,
        "tail": module.tail,
        "lengths": list(module.lengths) if module.lengths else None,
        "mean_density": sum(densities.values()) / len(densities) if densities else None,
        "layer_density": densities,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _model_class(model: Any) -> str:
    """Class of a model, or of a pipeline's first transformer, as it is without torch.compile."""
    first = transformers_of(model)[0][1]
    return type(getattr(first, "_orig_mod", first)).__name__


def save(state: State, path: str | os.PathLike[str]) -> None:
    """Write a state dict; the file appears whole or not at all."""
    write_atomically(state, path)


def write_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a temporary name beside ``path``, then move into place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> State:
    """Read a tuned file.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is truncated, or no tuned file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no tuned file at {str(path)!r}")
    state = read(Path(path))
    if not isinstance(state, dict) or not any(str(key).endswith(".is_sparse") for key in state):
        raise ValueError(f"{str(path)!r} is not a tuned file: it holds no '<layer>.is_sparse' entries")
    return state


def read(path: Path) -> Any:
    """``torch.load`` of tensors and plain values only; a ValueError when that fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message advises to load without weights_only
        raise ValueError(
            f"{str(path)!r} is truncated or not a tuned file: it holds other things than tensors and plain values"
        ) from error
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{str(path)!r} is truncated or not a tuned file: {reason}") from error


def load_sparse_attention_state_dict(
    model: Any,
    state: State | str | os.PathLike[str],
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    verbose: bool = False,
) -> Any:
    """Install tuned thresholds in a patched model and switch its layers to mode "sparse".

    Args:
        model: a patched model, or a pipeline with patched transformers.
        state: a tuned file's path or its content.
        block_q, block_k: override the block sizes of a file of the original SpargeAttn (128 × 64 by default).

    Returns:
        The model.

    Raises:
        ValueError: when the file was made for another family of models or another head dim, or a layer is missing,
            left over, has another number of heads, or a value is not finite; the message names the layer. Nothing is
            installed then.
    """
    state = load(state) if isinstance(state, (str, os.PathLike)) else state
    modules = sparse_modules(model)
    info = _info(state)
    selector = _selector(info, block_q, block_k)
    _check_family(model, info, list(modules.values()))
    layers = _layers(state)
    missing, extra = sorted(modules.keys() - layers.keys()), sorted(layers.keys() - modules.keys())
    if missing or extra:
        raise ValueError(_mismatch(model, info, missing, extra))
    values = {path: _thresholds(path, module, layers[path]) for path, module in modules.items()}
    lengths, densities = _lengths(info), _densities(info, modules)
    for path, module in modules.items():
        module.selector = selector
        if info:
            module.l1, module.pv_l1, module.tail = info["l1"], info["pv_l1"], info["tail"]
            module.precision = info.get("precision", module.precision)
            module.text_sink = info.get("text_sink", module.text_sink)
        module.set_thresholds(values[path], expected_density=densities[path], lengths=lengths)
        if verbose:
            print(f"{path}: {int(values[path].is_sparse.sum())} of {module.heads} heads sparse")
    return model


def is_verified(state: State) -> bool:
    """Whether the bounds of a file were checked by this library (files of the original SpargeAttn never were)."""
    return "_metadata" in state


def _info(state: State) -> dict[str, Any] | None:
    """The metadata of a file, None for a file of the original SpargeAttn; refuses what this version cannot read."""
    info = state.get("_metadata")
    if info is None:
        return None
    if not isinstance(info, dict):
        raise ValueError(f"_metadata of the tuned file must be a dict, got {type(info).__name__}")
    if info.get("format") != FORMAT:
        raise ValueError(f"the tuned file has format {info.get('format')!r}, this version reads format {FORMAT}")
    absent = [name for name in _REQUIRED if name not in info]
    if absent:
        raise ValueError(f"_metadata of the tuned file lacks {absent}")
    try:
        check_bounds(info["l1"], info["pv_l1"], info["tail"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"_metadata of the tuned file holds bounds that make no sense: {error}") from error
    return info


def _check_family(model: Any, info: dict[str, Any] | None, modules: list[SparseAttention]) -> None:
    """Refuse a file of another family or head dim (layers of two models may have the same paths and heads), and warn
    where the model is denser in the calibration than now.
    """
    info = info or {}
    made_for, families = info.get("family"), {module.family for module in modules if module.family}
    if made_for and families and made_for not in families:
        raise ValueError(
            f"the tuned file was made for {made_for} ({info['model_class']}), and {_model_class(model)} belongs to "
            f"the family {', '.join(sorted(families))}"
        )
    # The original's files and our first ones have no head dim, nor do files of models whose layers differ in it.
    dim, dims = info.get("head_dim"), {module.head_dim for module in modules if module.head_dim}
    if dim is not None and not isinstance(dim, int):
        raise ValueError(f"_metadata of the tuned file: head_dim must be a number or None, got {dim!r}")
    if dim is not None and not dims <= {dim}:
        raise ValueError(
            f"the tuned file was made for head dim {dim} ({info['model_class']}), and {_model_class(model)} has "
            f"{', '.join(map(str, sorted(dims)))}"
        )
    steps = info.get("dense_steps")
    pair = isinstance(steps, (list, tuple)) and len(steps) == 2 and all(isinstance(x, (int, float)) for x in steps)
    if steps is not None and not pair:
        raise ValueError(f"_metadata of the tuned file: dense_steps must be two shares or None, got {steps!r}")
    have = [module.dense_steps or (0.0, 0.0) for module in modules]
    if steps and any(first < steps[0] or last < steps[1] for first, last in have):
        warnings.warn(
            f"the file was calibrated with dense_steps={tuple(steps)}: the noise levels that ran dense were not "
            "measured; patch the model with the same dense_steps",
            RuntimeWarning,
            stacklevel=3,
        )


def _lengths(info: dict[str, Any] | None) -> tuple[int, int] | None:
    """Shortest and longest calibrated number of keys."""
    lengths = (info or {}).get("lengths")
    if lengths is None:
        return None
    if not isinstance(lengths, (list, tuple)) or len(lengths) != 2 or not all(isinstance(x, int) for x in lengths):
        raise ValueError(f"_metadata of the tuned file: lengths must be two numbers of keys, got {lengths!r}")
    return lengths[0], lengths[1]


def _densities(info: dict[str, Any] | None, paths: Iterable[str]) -> dict[str, float | None]:
    """Measured density of every layer, None where the file does not say."""
    recorded = (info or {}).get("layer_density", {})
    found = {path: recorded.get(path) for path in paths} if isinstance(recorded, dict) else {"all": recorded}
    for path, density in found.items():
        if density is None and path != "all":
            continue
        if path == "all" or not isinstance(density, (int, float)) or not 0 <= density <= 1:
            raise ValueError(f"_metadata of the tuned file: layer_density of {path!r} is {density!r}, not in [0, 1]")
    return found


def _selector(info: dict[str, Any] | None, block_q: int | None, block_k: int | None) -> MeanSimilarity:
    if info is None:  # a file of the original: thresholds belong to its 128 x 64 blocks and block means
        q, k = block_q or 128, block_k or 64
        return MeanSimilarity(pool=min(q, k), block_q=q, block_k=k, local=0)
    if info["selector"] not in SELECTORS:
        raise ValueError(f"the tuned file was made for selector {info['selector']!r}, known here: {sorted(SELECTORS)}")
    if block_q is not None or block_k is not None:
        raise ValueError(
            f"this file records its own block sizes ({info['block_q']} x {info['block_k']}); block_q and block_k "
            "override those of the original SpargeAttn's files only"
        )
    fields = ("pool", "block_q", "block_k", "sink", "local")
    return SELECTORS[info["selector"]](**{name: info[name] for name in fields})


def _layers(state: State) -> dict[str, dict[str, Tensor]]:
    """The entries of a file by layer; refuses what it does not know."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key == "_metadata":
            continue
        path, _, name = str(key).rpartition(".")
        path = clean_path(path)
        if name not in (*BUFFERS, _UNUSED) or not path.endswith(_SUFFIX):
            raise ValueError(f"unknown entry {key!r} in the tuned file: expected '<path>{_SUFFIX}.<one of {BUFFERS}>'")
        entry = layers.setdefault(path, {})
        if name in entry:
            raise ValueError(f"the tuned file holds {name} of layer {path!r} twice, the second time as {key!r}")
        entry[name] = value
    return layers


def _thresholds(path: str, module: SparseAttention, entry: dict[str, Tensor]) -> Thresholds:
    absent = [name for name in BUFFERS if name not in entry]
    if absent:
        raise ValueError(f"layer {path!r} of the tuned file lacks {absent}")
    heads = module.heads
    for name in BUFFERS:
        value = entry[name]
        if not isinstance(value, Tensor) or value.dim() > 1 or value.is_complex():
            raise ValueError(f"layer {path!r}: {name} must be a tensor [heads], got {value!r}")
        if heads is not None and value.dim() == 1 and value.numel() != heads:
            raise ValueError(f"layer {path!r}: {name} has {value.numel()} values, the model has {heads} heads")
        if not bool(torch.isfinite(value.float()).all()):
            raise ValueError(f"layer {path!r}: {name} holds values that are not finite: {value.tolist()}")
    _check_values(path, entry)
    sizes = {entry[name].numel() for name in BUFFERS if entry[name].dim() == 1} or {1}
    if len(sizes) > 1:
        raise ValueError(f"layer {path!r}: its tensors have {sorted(sizes)} values, one per head is expected")
    count = heads or max(sizes)
    full = {name: entry[name].expand(count) for name in BUFFERS}
    return Thresholds(**full)


def _check_values(path: str, entry: dict[str, Tensor]) -> None:
    """Refuse numbers that cannot be meant."""
    flags, cdf = entry["is_sparse"], entry["cdfthreshd"].float()
    if not bool(((flags == 0) | (flags == 1)).all()):
        raise ValueError(f"layer {path!r}: is_sparse must be true or false (1 or 0), got {flags.tolist()}")
    if not bool(((cdf >= 0) & (cdf <= 1)).all()):
        raise ValueError(f"layer {path!r}: cdfthreshd must be in [0, 1], got {cdf.tolist()}")


def _mismatch(model: Any, info: dict[str, Any] | None, missing: list[str], extra: list[str]) -> str:
    modules = sparse_modules(model)
    made_for = f" (made for {info['model_class']})" if info else ""
    parts = [f"the tuned file{made_for} does not fit {type(model).__name__}:"]
    if missing:
        parts.append(f"{len(missing)} layers of the model are not in the file, first {missing[0]!r};")
        if len(missing) < len(modules) and not extra:
            parts.append("patch the layers that were tuned only (layer_range);")
    if extra:
        parts.append(f"{len(extra)} layers of the file are not in the model, first {extra[0]!r};")
    return " ".join(parts).rstrip(";")
