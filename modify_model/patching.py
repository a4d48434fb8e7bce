"""Install, remove and check sparse attention in a model: what all families share.

    patch(model)     puts a tunable SparseAttention into every attention layer
    verify(model)    says, layer by layer, whether it is there
    restore(model)   leaves the model exactly as it was

A :class:`~modify_model.families.Family` says where the attention layers of its models are, and how one layer is made
sparse and original again. The walk, the swap, the names and the bookkeeping are here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import nn

from autotune import SparseAttention
from autotune.paths import clean_path, transformers_of
from autotune.tuned import Tuned
from spas_attn.checks import HEAD_DIMS, check_flag

from .families import Family, Layer, find_family
from .schedule import check_range, check_schedule

M = TypeVar("M")


@dataclass(frozen=True)
class LayerStatus:
    """One attention layer: its path, the class that stands there, its query heads, and one of
    "dense" (installed, not tuned yet), "tune", "sparse", "kept dense" (tuned, but among dense_layers), "left" (outside
    layer_range) or "MISSING".
    """

    path: str
    class_name: str
    heads: int
    status: str


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; ``print`` shows it as a table."""

    layers: list[LayerStatus] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> int:
        """Number of layers with sparse attention installed."""
        return sum(layer.status not in ("left", "MISSING") for layer in self.layers)

    @property
    def ok(self) -> bool:
        """Every layer is replaced or was left on purpose, at least one is replaced, and nothing stands in the way."""
        return self.replaced > 0 and not self.problems and all(layer.status != "MISSING" for layer in self.layers)

    def __str__(self) -> str:
        width = max([len(layer.path) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}  {'class':24} {'heads':>5}  status"] if self.layers else []
        for layer in self.layers:
            lines.append(f"{layer.path:{width}}  {layer.class_name:24} {layer.heads:>5}  {layer.status}")
        left = sum(layer.status == "left" for layer in self.layers)
        summary = f"{self.replaced}/{len(self.layers)} attention layers replaced, {left} left on purpose"
        return "\n".join([*lines, summary, *(f"problem: {text}" for text in self.problems)])


def patch(
    model: M,
    l1: float | None = None,
    pv_l1: float | None = None,
    tail: float | EllipsisType | None = ...,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
    dense_steps: tuple[float, float] | None = None,
    dense_layers: Sequence[int] = (),
    calibrated: bool = True,
    **options: Any,
) -> M:
    """Install a SparseAttention in the attention layers of a model, in place.

    The model computes exactly what it did before until its thresholds are calibrated or loaded; with
    ``calibrated=False`` it runs sparse at once, at the selector's own thresholds, which no bound was checked for, and a
    file saved from it says so. It can be calibrated, or given a file, later all the same. Patching again is
    harmless: layers that are already sparse keep their thresholds and take the options that this call names, bounds for
    the next calibration (those that the thresholds were checked against stay on record). Thresholds mean nothing to
    another selector: it drops them, with a warning if they were calibrated. ``layer_range``, ``dense_steps`` and
    ``dense_layers`` are what this call says.

    Args:
        model: a model of a known family, also inside PEFT or ``torch.compile``, or a pipeline with ``.transformer``
            (and ``.transformer_2``).
        l1, pv_l1, tail: error bounds of the calibration, see SparseAttention. Left out: its defaults, or, on a layer
            that is already sparse, the bounds that it has. ``tail=None`` switches the tail bound off.
        layer_range: (start, stop), only layers start to stop - 1, in the model's order; all by default.
        verbose: print a line for every layer.
        dense_steps: (first, last), for diffusion models: denoising steps in the first and last share of the noise
            range run dense, and a calibration does not watch them: noise levels s (1 = pure noise) with
            ``1 - s < first`` or ``s < last``, whatever the number of steps, the batch and the guidance. For a pipeline
            also whole numbers, (10, 2), of steps of its scheduler as it stands: see ``modify_model.dense_steps_of``.
        dense_layers: layers (in the model's order) that run dense in mode "sparse"; they are calibrated all the same.
        calibrated: False runs the selector's own thresholds at once. Layers that have thresholds from a calibration or
            a file lose them, with a warning.
        options: further arguments of SparseAttention (selector, backend, precision, text_sink, graphs); left out, the
            family's defaults hold. ``graphs=True`` is safe in every family here: each layer projects its attention's
            output into other memory before another layer runs (one thread at a time). ``selector`` may also be a list
            or tuple of selectors, one for each attention layer of the model in its order (published tables of
            thresholds per layer and head).

    Returns:
        The same model.

    Raises:
        ValueError: if no family serves the model, a layer has a processor that cannot be replaced, or on a
            layer_range, dense_steps or dense_layers that make no sense, and another number of selectors than layers.
        TypeError: on bounds that are no numbers and options of another type than SparseAttention takes.
    """
    check_flag("calibrated", calibrated)
    settings = {name: value for name, value in {"l1": l1, "pv_l1": pv_l1, **options}.items() if value is not None}
    if tail is not ...:
        settings["tail"] = tail
    parts = [(prefix, root, find_family(root)) for prefix, root in transformers_of(model)]
    scheduler, plans = getattr(model, "scheduler", None), []
    for _, root, family in parts:  # everything is checked before anything is changed
        layers = family.layers(root)
        steps = check_schedule(family.noise_level, len(layers), dense_steps, dense_layers, scheduler)
        plans.append((_chosen(family, root, layers, layer_range, settings), steps))
    for (prefix, root, family), (chosen, steps) in zip(parts, plans, strict=True):
        for inner in _apply(family, root, chosen, settings, prefix, verbose):
            inner.layer_range, inner.dense_steps = layer_range, steps
            inner.always_dense = inner.layer_idx in dense_layers
            if not calibrated:
                _uncalibrate(inner)
        family.switch(root, True, steps)
    return model


def patch_function(name: str, *families: Family) -> Callable[..., nn.Module]:
    """A family's own :func:`patch`, for models only: a ValueError on pipelines and models of others."""
    allowed = ", ".join(model_class for family in families for model_class in family.model_classes)

    def function(
        transformer: nn.Module,
        l1: float | None = None,
        pv_l1: float | None = None,
        layer_range: tuple[int, int] | None = None,
        verbose: bool = False,
    ) -> nn.Module:
        if not isinstance(transformer, nn.Module):
            raise ValueError(
                f"transformer must be a model built on {allowed}, got {type(transformer).__name__}; to patch all "
                "transformers of a pipeline, call modify_model.patch(pipeline)"
            )
        found = find_family(transformer)
        if found not in families:
            raise ValueError(
                f"model must be built on {allowed}, got {type(transformer).__name__} (family {found.name})"
            )
        return patch(transformer, l1=l1, pv_l1=pv_l1, layer_range=layer_range, verbose=verbose)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Patch a model built on {allowed} in place; arguments and errors of :func:`modify_model.patch`."
    return function


def restore(model: M) -> M:
    """Undo :func:`patch`: the same modules, state_dict keys, settings and outputs as before; a no-op otherwise.

    Changes made to the layers meanwhile (devices, dtypes, adapters put on the projections) are kept.
    """
    for _, root in transformers_of(model):
        family = find_family(root)
        for layer in family.layers(root):
            if _inner(layer.attention) is not None:
                family.remove(layer.attention)
        family.switch(root, False)
    return model


def verify(model: Any) -> Verification:
    """Check and print, for every attention layer, whether it is sparse, left on purpose, or missing; never raises."""
    try:
        parts = [(prefix, root, find_family(root)) for prefix, root in transformers_of(model)]
    except ValueError as error:
        result = Verification(problems=[str(error)])
    else:
        result = Verification()
        for prefix, root, family in parts:
            result.layers.extend(_statuses(family, root, prefix))
            problem = family.problem(root)
            if problem is not None:
                result.problems.append(problem)
    print(result)
    return result


def _chosen(
    family: Family,
    root: nn.Module,
    layers: list[Layer],
    layer_range: tuple[int, int] | None,
    settings: dict[str, Any],
) -> dict[int, SparseAttention]:
    """A new SparseAttention for every layer in the range, by index; bad ranges, bounds and options are refused here,
    with those that an installed layer keeps taken into account.
    """
    if not layers:
        raise ValueError(f"{type(root).__name__} cannot be made sparse: {family.missing(root)}")
    chosen, label = {}, family.label(root)
    for index in check_range(layer_range, len(layers)):
        path, attention, _ = layers[index]
        heads, head_dim = family.heads(attention)
        present = _inner(attention)
        reason = None if present and family.is_sparse(attention) else family.unsupported(attention)
        reason = reason or _unfit(attention, head_dim)
        if reason is not None:
            raise ValueError(f"layer {path!r} cannot be made sparse: {reason}")
        kept = {name: getattr(present, name) for name in ("l1", "pv_l1", "tail")} if present else {}
        inner = chosen[index] = SparseAttention(**(family.defaults() | kept | _of_layer(settings, index, len(layers))))
        inner.set_heads(heads)
        inner.kv_heads = family.kv_heads(attention)
        inner.family, inner.layer_idx, inner.head_dim = label, index, head_dim
    return chosen


def _apply(
    family: Family,
    root: nn.Module,
    chosen: dict[int, SparseAttention],
    settings: dict[str, Any],
    prefix: str,
    verbose: bool,
) -> list[Any]:
    """Make the chosen layers sparse and the others original; returns what the sparse ones have."""
    layers, installed = family.layers(root), []
    for index, layer in enumerate(layers):
        if index in chosen:
            installed.append(_install(family, layer, chosen[index], _of_layer(settings, index, len(layers))))
        elif _inner(layer.attention) is not None:
            family.remove(layer.attention)
        if verbose:
            what = "sparse attention installed" if index in chosen else "left as it is"
            print(f"[{index + 1}/{len(layers)}] {prefix}{clean_path(layer.path)}: {what}")
    if verbose:
        print(f"{len(chosen)}/{len(layers)} attention layers of {type(root).__name__} replaced")
    return installed


def _install(family: Family, layer: Layer, inner: SparseAttention, settings: dict[str, Any]) -> SparseAttention:
    """Make a layer sparse, with a new SparseAttention or the one that it has, and return it."""
    attention, present = layer.attention, _inner(layer.attention)
    if present is None:
        device = next((p.device for p in attention.parameters()), torch.device("cpu"))
        if device.type != "meta":  # where weights are offloaded, thresholds follow the calls
            inner.to(device)
        inner.train(attention.training)
    else:
        if present.tuned is not None and _rule(settings.get("selector", present.selector)) != _rule(present.selector):
            if present.tuned.calibrated:  # a selector's own thresholds go with it
                warnings.warn(
                    "another selector: the layers lose their thresholds; calibrate the model, or load a file, again",
                    RuntimeWarning,
                    stacklevel=4,
                )
            present.tuned, present.mode = None, "dense"
        for name in settings:
            setattr(present, name, getattr(inner, name))  # checked, and as SparseAttention keeps it
        inner = present
    if present is None or not family.is_sparse(attention):  # another processor may have been set meanwhile
        family.install(layer, inner)
    return inner


def _of_layer(settings: dict[str, Any], index: int, layers: int) -> dict[str, Any]:
    """The settings of one layer: of a list of selectors its own."""
    selector = settings.get("selector")
    if not isinstance(selector, (list, tuple)):
        return settings
    if len(selector) != layers:
        raise ValueError(
            f"selector must be one selector, or one for each of the model's {layers} attention layers, got "
            f"{len(selector)}"
        )
    return settings | {"selector": selector[index]}


def _uncalibrate(inner: SparseAttention) -> None:
    """Run a layer at its selector's own thresholds."""
    if inner.tuned is not None and inner.tuned.calibrated:
        warnings.warn(
            "calibrated=False: the layers lose the thresholds of their calibration or file",
            RuntimeWarning,
            stacklevel=3,
        )
    inner.set_thresholds(Tuned.own(inner.selector, inner.heads or 1))


def _unfit(attention: nn.Module, head_dim: int) -> str | None:
    """Why no sparse backend serves a layer, or None."""
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"its head dim is {head_dim}, and sparse attention serves {HEAD_DIMS[0]} to {HEAD_DIMS[1]}"
    if any(parameter.dtype == torch.float64 for parameter in attention.parameters()):
        return "its weights are float64, and sparse attention serves float16, bfloat16 and float32"
    return None


def _inner(attention: nn.Module) -> SparseAttention | None:
    """The SparseAttention of a patched layer."""
    inner = attention._modules.get("inner_attention")
    return inner if isinstance(inner, SparseAttention) else None


def _rule(selector: Any) -> Any:
    """What a selector is besides the threshold that a calibration tunes."""
    return {name: value for name, value in selector.to_dict().items() if name != selector.tuned}


def _statuses(family: Family, root: nn.Module, prefix: str) -> list[LayerStatus]:
    layers = family.layers(root)
    present: list[Any] = [_inner(attention) for _, attention, _ in layers]
    layer_range = next((inner.layer_range for inner in present if inner is not None), None)
    rows = []
    for index, (path, attention, _) in enumerate(layers):
        inner = present[index]
        if inner is not None and family.is_sparse(attention):
            status = "kept dense" if inner.always_dense and inner.mode == "sparse" else str(inner.mode)
        elif layer_range is not None and index not in range(*layer_range):
            status = "left"
        else:
            status = "MISSING"
        rows.append(
            LayerStatus(prefix + clean_path(path), type(attention).__name__, family.heads(attention)[0], status)
        )
    return rows
