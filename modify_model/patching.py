"""Install, remove and check sparse attention in a model: what all families share.

    patch(model)     puts a tunable SparseAttention into every attention layer
    verify(model)    says, layer by layer, whether it is there
    restore(model)   leaves the model exactly as it was

A family is one file, ``modify_<family>.py``, that registers a :class:`Family`: which models it serves, where their
attention layers are, and how one layer is made sparse and original again. The walk, the swap, the names and the
bookkeeping are here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, TypeVar

import torch
from torch import nn

from autotune import SparseAttention
from autotune.module import clean_path, transformers_of
from spas_attn import count_fallback

from .schedule import DenseSteps, NoiseLevel, check_range, check_schedule, remove_hooks, set_schedule

M = TypeVar("M")

# Class names of models, and the file that serves them. The file is imported when such a model arrives, so that nobody
# needs diffusers for a language model; importing it registers its Family.
ADAPTERS = {
    "LlamaModel": "modify_model.modify_llama",
    "CogVideoXTransformer3DModel": "modify_model.modify_cogvideo",
    "FluxTransformer2DModel": "modify_model.modify_flux",
    "HunyuanDiT2DModel": "modify_model.modify_hunyuan",
    "HunyuanVideoTransformer3DModel": "modify_model.modify_hunyuan",
    "LTXVideoTransformer3DModel": "modify_model.modify_ltx",
    "QwenImageTransformer2DModel": "modify_model.modify_qwenimage",
    "WanTransformer3DModel": "modify_model.modify_wan",
}


@dataclass(frozen=True)
class Family:
    """What is special to one family of models.

    Attributes:
        name: as users read it in messages.
        model_classes: names of the model classes it serves; subclasses and wrapped models are found too.
        layers: every self-attention layer of a model with its path, in layer order, patched or not.
        num_heads: query heads of an attention layer.
        head_dim: head dim of an attention layer, for the tuned file; None where it is not known.
        install: makes one layer sparse, with the given SparseAttention as its child ``inner_attention``. Returns the
            module that stands in the layer's place (the layer itself if only a processor was swapped) and what
            ``remove`` needs.
        remove: takes the module that ``install`` returned and its second value; returns the module that stood there.
        defaults: options of SparseAttention that suit the family better than the general ones.
        switch: settings of the model as a whole, on after a patch and off after a restore.
        problem: why an installed patch cannot work any more, or None.
        in_place: whether what ``install`` put into a layer is still there.
        unsupported: why a layer cannot be made sparse, or None.
        noise_level: maps the ``timestep`` that a diffusion model receives to [0, 1], 1 = pure noise.
    """

    name: str
    model_classes: tuple[str, ...]
    layers: Callable[[nn.Module], list[tuple[str, nn.Module]]]
    num_heads: Callable[[nn.Module], int]
    install: Callable[[nn.Module, SparseAttention], tuple[nn.Module, Any]]
    remove: Callable[[nn.Module, Any], nn.Module]
    head_dim: Callable[[nn.Module], int | None] = lambda attention: None
    defaults: Callable[[], dict[str, Any]] = dict
    switch: Callable[[nn.Module, bool], None] = lambda model, on: None
    problem: Callable[[nn.Module], str | None] = lambda model: None
    in_place: Callable[[nn.Module], bool] = lambda attention: True
    unsupported: Callable[[nn.Module], str | None] = lambda attention: None
    noise_level: NoiseLevel | None = None


@dataclass(frozen=True)
class Installed:
    """Kept on a patched attention module as a plain attribute: a dataclass is no registered child of a module, so
    state_dict, ``.to`` and ``parameters()`` do not see what it holds, while deepcopy and pickle do.
    """

    original: Any
    layer_range: tuple[int, int] | None


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


_families: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known; called by its file at import."""
    _families[family.name] = family
    return family


def patch(
    model: M,
    l1: float | None = None,
    pv_l1: float | None = None,
    tail: float | EllipsisType | None = ...,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
    dense_steps: tuple[float, float] | None = None,
    dense_layers: Sequence[int] = (),
    **options: Any,
) -> M:
    """Install a SparseAttention in the attention layers of a model, in place.

    The model computes exactly what it did before until its thresholds are calibrated or loaded. Patching again is
    harmless: layers that are already sparse keep their thresholds and take the bounds and options that this call
    names; ``layer_range``, ``dense_steps`` and ``dense_layers`` are what this call says.

    Args:
        model: a model of a known family, also inside PEFT or ``torch.compile``, or a pipeline with ``.transformer``
            (and ``.transformer_2``).
        l1, pv_l1, tail: error bounds of the calibration, see SparseAttention. Left out: its defaults, or, on a layer
            that is already sparse, the bounds that it has. ``tail=None`` switches the tail bound off.
        layer_range: (start, stop), only layers start to stop - 1, in the model's order; all by default.
        verbose: print a line for every layer.
        dense_steps: (first, last), for diffusion models: denoising steps in the first and last share of the noise
            range run dense, and a calibration does not watch them. A step belongs there if its noise level s (1 = pure
            noise) has ``1 - s < first`` or ``s < last``. Only the timestep decides, so neither the number of steps nor
            the batch nor classifier-free guidance matters. With a scheduler that shifts its timesteps the first steps
            lie close to 1: ``modify_model.dense_steps_of(scheduler, first=10)`` turns numbers of steps into shares.
        dense_layers: layers (in the model's order) that run dense in mode "sparse"; they are calibrated all the same.
        options: further arguments of SparseAttention (selector, backend, precision, text_sink); left out, the
            family's defaults hold.

    Returns:
        The same model.

    Raises:
        ValueError: if no family serves the model, a layer has a processor that cannot be replaced, or on a
            layer_range, dense_steps or dense_layers that make no sense.
        TypeError: on bounds that are no numbers and options of another type than SparseAttention takes.
    """
    settings = {name: value for name, value in {"l1": l1, "pv_l1": pv_l1, **options}.items() if value is not None}
    if tail is not ...:
        settings["tail"] = tail
    parts = [(prefix, root, find_family(root)) for prefix, root in transformers_of(model)]
    chosen = [_chosen_layers(family, root, layer_range, settings) for _, root, family in parts]  # changes nothing yet
    schedules = [
        check_schedule(family.noise_level, len(family.layers(root)), dense_steps, dense_layers)
        for _, root, family in parts
    ]
    for (prefix, root, family), inner, steps in zip(parts, chosen, schedules, strict=True):
        layers = family.layers(root)
        for index, (path, attention) in enumerate(layers):
            if index in inner:
                _install(family, root, path, attention, inner[index], layer_range, settings)
            else:
                _remove(family, root, path, attention)
            if verbose:
                what = "sparse attention installed" if index in inner else "left as it is"
                print(f"[{index + 1}/{len(layers)}] {prefix}{clean_path(path)}: {what}")
        family.switch(root, True)
        patched: list[Any] = [attention.inner_attention for _, attention in family.layers(root) if _record(attention)]
        set_schedule(root, family.noise_level, patched, steps, dense_layers)
        if verbose:
            print(f"{len(inner)}/{len(layers)} attention layers of {type(root).__name__} replaced")
    return model


def patch_family(model: nn.Module, families: Sequence[Family], **arguments: Any) -> nn.Module:
    """:func:`patch` for one family's own function: a ValueError on pipelines and models of others."""
    allowed = ", ".join(name for family in families for name in family.model_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"transformer must be a model built on {allowed}, got {type(model).__name__}; to patch all transformers "
            "of a pipeline, call modify_model.patch(pipeline)"
        )
    found = find_family(model)
    if found not in families:
        raise ValueError(f"model must be built on {allowed}, got {type(model).__name__} (family {found.name})")
    return patch(model, **arguments)


def restore(model: M) -> M:
    """Undo :func:`patch`: the same modules, state_dict keys, settings and outputs as before; a no-op otherwise.

    Changes made to the layers meanwhile (devices, dtypes, adapters put on the projections) are kept.
    """
    for _, root in transformers_of(model):
        family = find_family(root)
        for path, attention in family.layers(root):
            _remove(family, root, path, attention)
        family.switch(root, False)
        remove_hooks(root, DenseSteps)
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
            result.layers.extend(_status(family, root, prefix))
            problem = family.problem(root)
            if problem is not None:
                result.problems.append(problem)
    print(result)
    return result


def find_family(model: nn.Module) -> Family:
    """The family that serves a model, found by the class names of its modules (PEFT and compiled models included)."""
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    for name in names & ADAPTERS.keys():
        importlib.import_module(ADAPTERS[name])
    for family in _families.values():
        if names.intersection(family.model_classes):
            return family
    known = sorted({*ADAPTERS, *(name for family in _families.values() for name in family.model_classes)})
    raise ValueError(f"{type(model).__name__} has no adapter; supported are models built on {', '.join(known)}")


@torch.compiler.assume_constant_result
def count_dense_call(reason: str) -> None:
    """Count a call that runs dense instead of sparse; under torch.compile once, while tracing."""
    count_fallback(reason)


def find_modules(model: nn.Module, class_name: str) -> list[tuple[str, nn.Module]]:
    """Every module whose class, or a class it derives from, has that name, with its path."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if any(cls.__name__ == class_name for cls in type(module).__mro__)
    ]


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` everything that ``old`` has: attributes, the same children, parameters and forward hooks."""
    # accelerate wraps the forward of one instance; its hook is put on the new instance instead.
    own = {name: value for name, value in vars(old).items() if name not in ("forward", "_old_forward", "_hf_hook")}
    vars(new).update(own)
    new._modules = dict(old._modules)
    _copy_accelerate_hook(old, new)


def hand_back(new: nn.Module, old: nn.Module) -> None:
    """Undo :func:`take_over`, keeping what happened to ``new`` meanwhile: children replaced (by PEFT, by a
    quantiser), train or eval mode, accelerate's hook.
    """
    old._modules.update({name: child for name, child in new._modules.items() if name in old._modules})
    old.training = new.training
    _copy_accelerate_hook(new, old)


def _copy_accelerate_hook(source: nn.Module, target: nn.Module) -> None:
    hook = vars(source).get("_hf_hook")
    if hook is vars(target).get("_hf_hook"):
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(target)
    if hook is not None:
        add_hook_to_module(target, hook)


def _chosen_layers(
    family: Family, root: nn.Module, layer_range: tuple[int, int] | None, settings: dict[str, Any]
) -> dict[int, SparseAttention]:
    """A new SparseAttention for every layer in the range, by index; bad ranges, bounds and options are refused here,
    with those that an installed layer keeps taken into account.
    """
    layers = family.layers(root)
    if not layers:
        raise ValueError(f"no attention layer was found in {type(root).__name__}")
    chosen = {}
    for index in check_range(layer_range, len(layers)):
        path, attention = layers[index]
        reason = None if _record(attention) and family.in_place(attention) else family.unsupported(attention)
        if reason is not None:
            raise ValueError(f"layer {path!r} cannot be made sparse: {reason}")
        present = attention.inner_attention if _record(attention) else None
        kept = {name: getattr(present, name) for name in ("l1", "pv_l1", "tail")} if present is not None else {}
        chosen[index] = SparseAttention(**(family.defaults() | kept | settings))
        chosen[index].layer_idx, chosen[index].family = index, family.name
        chosen[index].head_dim = family.head_dim(attention)
    return chosen


def _install(
    family: Family,
    root: nn.Module,
    path: str,
    attention: nn.Module,
    inner: SparseAttention,
    layer_range: tuple[int, int] | None,
    settings: dict[str, Any],
) -> None:
    record = _record(attention)
    if record is not None:
        for name, value in settings.items():
            setattr(attention.inner_attention, name, value)
        record = dataclasses.replace(record, layer_range=layer_range)
        if not family.in_place(attention):  # another processor was set meanwhile
            _, original = family.install(attention, attention.inner_attention)  # type: ignore[arg-type]
            record = dataclasses.replace(record, original=original)
        attention._spas_attn = record  # type: ignore[assignment]
        return
    inner.set_heads(family.num_heads(attention))
    device = next((p.device for p in attention.parameters()), torch.device("cpu"))
    if device.type != "meta":  # where weights are offloaded, thresholds follow the calls
        inner.to(device)
    inner.train(attention.training)
    new, original = family.install(attention, inner)
    new._spas_attn = Installed(original, layer_range)  # type: ignore[assignment]
    _put(root, path, attention, new)


def _remove(family: Family, root: nn.Module, path: str, attention: nn.Module) -> None:
    record = _record(attention)
    if record is not None:
        del attention._spas_attn
        _put(root, path, attention, family.remove(attention, record.original))


def _put(root: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    if new is not old:
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, new)


def _record(attention: nn.Module) -> Installed | None:
    return vars(attention).get("_spas_attn")


def _status(family: Family, root: nn.Module, prefix: str) -> list[LayerStatus]:
    layers = family.layers(root)
    records = [record for _, attention in layers if (record := _record(attention)) is not None]
    layer_range = records[0].layer_range if records else None
    rows = []
    for index, (path, attention) in enumerate(layers):
        if _record(attention) is not None and family.in_place(attention):
            inner: Any = attention.inner_attention
            status = "kept dense" if inner.always_dense and inner.mode == "sparse" else str(inner.mode)
        elif layer_range is not None and index not in range(*layer_range):
            status = "left"
        else:
            status = "MISSING"
        name = type(attention).__name__
        rows.append(LayerStatus(prefix + clean_path(path), name, family.num_heads(attention), status))
    return rows
