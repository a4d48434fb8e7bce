"""What a tuned file says beside thresholds: its ``"_metadata"``, written, and read with every value checked."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata as packages
from typing import Any

from spas_attn.call import ALIASES, PRECISIONS
from spas_attn.selectors import MeanSimilarity, Selector

from .module import DEFAULT_L1, DEFAULT_PV_L1, DEFAULT_TAIL, SparseAttention
from .paths import transformers_of
from .tradeoff import Tradeoff
from .tuned import Bounds, check_bounds

FORMAT = 3  # written where a file holds what readers of format 2 must not pass over, such as a budget without bounds
_PACKAGES = ("spas-attn", "torch", "transformers", "diffusers", "triton")
_REQUIRED = ("model_class", "selector", "l1", "pv_l1", "tail")
_FORMAT_1_FIELDS = ("block_q", "block_k", "pool", "sink", "local")  # of its selector, beside the class's name


def metadata_of(model: Any, modules: dict[str, SparseAttention]) -> dict[str, Any]:
    """The record of a tuned model."""
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
    first, precisions = next(iter(tuned.values())), _layer_precisions(modules)
    edges = {path: list(t.edges) for path, t in tuned.items() if t.edges} or None
    checked = first.bounds or (module.l1, module.pv_l1, module.tail)
    return {
        "format": FORMAT if None in checked[:2] or precisions or edges else 2,
        "model_class": _model_class(model),
        "family": module.family,
        "head_dim": head_dims.pop() if len(head_dims) == 1 else None,
        "calibrated": all(t.calibrated for t in tuned.values()),
        "checked": all(t.checked for t in tuned.values()),
        "tradeoff": None if first.tradeoff is None else first.tradeoff.to_dict(),
        "selector": _without_thresholds(module.selector),
        "layer_selectors": _layer_selectors(modules),
        "precision": module.precision,
        "layer_precisions": precisions,
        "phase_edges": edges,
        "phase_density": {path: list(t.densities) for path, t in tuned.items() if t.edges} or None,
        "text_sink": module.text_sink,
        "dense_steps": list(module.dense_steps) if module.dense_steps else None,
        **dict(zip(("l1", "pv_l1", "tail"), checked, strict=True)),
        "lengths": [min(lengths), max(lengths)] if lengths else None,
        "mean_density": sum(densities.values()) / len(densities) if densities else None,
        "layer_density": densities,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def _without_thresholds(selector: Selector) -> dict[str, Any]:
    """A selector's record without the fields whose values are a file's tensors."""
    # Where a field may be None, the record has to say that it was a number (MInference).
    names, kind = (selector.tuned, "sim_threshold"), type(selector)
    replaced = [name for name in names if getattr(kind, name, None) is not None]
    return {key: value for key, value in selector.to_dict().items() if key not in replaced}


def _layer_selectors(modules: dict[str, SparseAttention]) -> dict[str, dict[str, Any]] | None:
    """The selectors by layer, None where all layers have the same."""
    found = {path: _without_thresholds(module.selector) for path, module in modules.items()}
    first = next(iter(found.values()))
    return None if all(content == first for content in found.values()) else found


def _layer_precisions(modules: dict[str, SparseAttention]) -> dict[str, str] | None:
    """The precisions by layer, None where all layers have the same."""
    found = {path: module.precision for path, module in modules.items()}
    return found if len({*found.values()}) > 1 else None


def _model_class(model: Any) -> str:
    """Class of a model, or of a pipeline's first transformer, as it is without its wrappers."""
    first: Any = transformers_of(model)[0][1]
    first = getattr(first, "_orig_mod", first)
    return type(first.module if type(first).__name__.endswith("DataParallel") else first).__name__


@dataclass(frozen=True)
class Info:
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
    mean_density: float | None = None
    layer_density: Mapping[str, float] = field(default_factory=dict)
    layer_selectors: Mapping[str, Selector] = field(default_factory=dict)  # empty: all layers have `selector`
    layer_precisions: Mapping[str, Any] = field(default_factory=dict)  # empty: all layers have `precision`
    phase_edges: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by layer; empty: no phases
    phase_density: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    calibrated: bool = True
    thresholds_checked: bool = True
    tradeoff: Tradeoff | None = None

    def selector_of(self, path: str) -> Selector:
        """The selector of a layer."""
        return self.layer_selectors.get(path, self.selector)

    def precision_of(self, path: str) -> Any:
        """The precision of a layer, None for the module's own."""
        return self.layer_precisions.get(path, self.precision)

    @property
    def checked(self) -> Bounds | None:
        """The bounds, if the thresholds were checked against them."""
        return self.bounds if self.calibrated else None

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
        if self.checked is not None and None not in self.checked[:2] and other:
            _warn(
                f"the model was patched with l1, pv_l1, tail = {sorted(other, key=str)[0]} and the file was tuned with "
                f"{self.bounds}: the file's hold now, for later calibrations too; name bounds in calibrate() for others"
            )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def read_metadata(info: Any, block_q: int | None, block_k: int | None) -> Info:
    """Check what a file says.

    Args:
        info: its ``"_metadata"``, None for a file of the original SpargeAttn.
        block_q, block_k: block sizes of such a file, 128 and 64 by default.
    """
    if info is None:
        q, k = block_q or 128, block_k or 64
        return Info(MeanSimilarity(pool=min(q, k), block_q=q, block_k=k, local=0))
    if not isinstance(info, dict):
        raise ValueError(f"_metadata of the tuned file must be a dict, got {type(info).__name__}")
    if repr(info.get("format")) not in ("1", "2", str(FORMAT)):
        raise ValueError(f"the tuned file has format {info.get('format')!r}, this version reads formats 1 to {FORMAT}")
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
        check_bounds(*bounds, guards=info["format"] == FORMAT)
    except (TypeError, ValueError) as error:
        raise ValueError(f"_metadata of the tuned file holds invalid bounds: {error}") from error
    values: dict[str, Any] = {}
    for name, (what, valid) in _OPTIONAL.items():
        if (value := info.get(name)) is None:
            continue
        if not valid(value):
            raise ValueError(f"_metadata of the tuned file: {name} must be {what} or None, got {value!r}")
        values[name] = tuple(value) if isinstance(value, list) else value
    if "precision" in values:
        values["precision"] = ALIASES.get(values["precision"], values["precision"])
    for name in ("phase_edges", "phase_density"):
        values[name] = {path: tuple(numbers) for path, numbers in values.get(name, {}).items()}
    if "layer_selectors" in values:
        values["layer_selectors"] = {path: _made(content) for path, content in values["layer_selectors"].items()}
    values["thresholds_checked"] = values.pop("checked", True)
    tradeoff = None if info.get("tradeoff") is None else Tradeoff.read(info["tradeoff"])
    return Info(selector, bounds=bounds, tradeoff=tradeoff, **values)


def _selector(info: dict[str, Any]) -> Selector:
    content = info["selector"]
    if info["format"] == 1:
        content = {"class": content, **{name: info[name] for name in _FORMAT_1_FIELDS if name in info}}
    return _made(content)


def _made(content: Any) -> Selector:
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


def _falling(x: Any) -> bool:
    inside = isinstance(x, (list, tuple)) and len(x) > 0 and all(_share(edge) for edge in x)
    return inside and all(high > low for high, low in zip((1.0, *x), (*x, 0.0), strict=True))


def _pair(x: Any, valid: Callable[[Any], bool]) -> bool:
    return isinstance(x, (list, tuple)) and len(x) == 2 and all(valid(value) for value in x)


# What a file may say: in words, and as a check.
_OPTIONAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model_class": ("text", lambda x: isinstance(x, str)),
    "family": ("text", lambda x: isinstance(x, str)),
    "head_dim": ("a number", _count),
    "precision": (f"one of {PRECISIONS}", lambda x: x in (*PRECISIONS, *ALIASES)),
    "text_sink": ("True or False", lambda x: isinstance(x, bool)),
    "dense_steps": ("two shares", lambda x: _pair(x, _share) and x[0] + x[1] < 1),
    "lengths": ("two numbers of keys", lambda x: _pair(x, _count) and x[0] <= x[1]),
    "mean_density": ("in [0, 1]", _share),
    "layer_density": ("a dict of shares by layer", _shares),
    "layer_precisions": (
        "a dict of precisions by layer",
        lambda x: isinstance(x, dict) and all(value in (*PRECISIONS, *ALIASES) for value in x.values()),
    ),
    "phase_edges": (
        "a dict of falling noise levels by layer",
        lambda x: isinstance(x, dict) and all(map(_falling, x.values())),
    ),
    "phase_density": (
        "a dict of lists of shares by layer",
        lambda x: (
            isinstance(x, dict)
            and all(isinstance(v, (list, tuple)) and all(d is None or _share(d) for d in v) for v in x.values())
        ),
    ),
    "layer_selectors": ("a dict of selectors by layer", lambda x: isinstance(x, dict)),
    "calibrated": ("True or False", lambda x: isinstance(x, bool)),
    "checked": ("True or False", lambda x: isinstance(x, bool)),
}
