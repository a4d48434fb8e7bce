"""Sparse attention in the shape models of a user's own installation (hy3dgen, hy3dshape, ComfyUI): found by structure.

A block is recognised by its projections, and its forward by reaching ``F.scaled_dot_product_attention``, directly or
through functions of its own. That very code then runs with our attention in its place (``rebind.py``).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autotune import SparseAttention

from ..families import count_dense_call
from ..rebind import Table, rebound
from .schedule import scheduled

SDPA = F.scaled_dot_product_attention

# What the three kinds of attention layers have, by dotted name.
STRUCTURES = {
    "double-stream block": (
        "img_attn.qkv",
        "txt_attn.qkv",
        "img_attn.norm.query_norm",
        "img_attn.proj",
        "txt_attn.proj",
    ),
    "single-stream block": ("linear1", "linear2", "norm.query_norm", "norm.key_norm"),
    "self-attention": ("to_q", "to_k", "to_v", "q_norm", "k_norm", "out_proj"),
}
# The projection whose rows are the channels of all heads, how many times over, and a norm over the head dim.
_SIZES = {
    "double-stream block": ("img_attn.qkv", 3, "img_attn.norm.query_norm"),
    "single-stream block": ("linear2", 1, "norm.query_norm"),
    "self-attention": ("to_q", 1, "q_norm"),
}


def structure_of(layer: nn.Module) -> str | None:
    """The kind of STRUCTURES that a module is, or None."""
    return next((kind for kind, names in STRUCTURES.items() if all(_has(layer, name) for name in names)), None)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Heads and head dim of a recognised layer; (0, 0) of another."""
    kind = structure_of(layer)
    if kind is None:
        return 0, 0
    projection, times, norm = _SIZES[kind]
    dim = next(layer.get_submodule(norm).parameters()).numel()
    weight: Any = layer.get_submodule(projection).weight
    return weight.shape[0] // times // dim, dim


def unrecognised(layer: nn.Module) -> str | None:
    """Why attention in a layer cannot be replaced, or None."""
    name = type(layer).__name__
    if structure_of(layer) is None:
        parts = ", ".join(child for child, _ in layer.named_children()) or "nothing"
        return f"{name} (with {parts}) has none of the structures that are known: " + "; ".join(
            f"{kind}: {', '.join(names)}" for kind, names in STRUCTURES.items()
        )
    if rebound(_original(type(layer)).forward, _table()) is _original(type(layer)).forward:
        return (
            f"{name}.forward reaches no F.{SDPA.__name__}; another attention runs there (USE_SAGEATTN=1, "
            "xformers, or an option of the program): switch that off"
        )
    return None


def install(layer: nn.Module, inner: SparseAttention) -> None:
    """Give a layer its ``inner_attention``, and a class whose forward uses it."""
    layer.inner_attention = inner
    layer.__class__ = _sparse_class(_original(type(layer)))


def is_installed(layer: nn.Module) -> bool:
    """Whether :func:`install` was done, and not undone."""
    return isinstance(layer, _Sparse)


def remove(layer: nn.Module) -> None:
    """Undo :func:`install`."""
    layer.__class__ = _original(type(layer))
    del layer.inner_attention


class _Sparse:
    """Marks the classes that :func:`install` makes."""

    original_class: type


def _original(cls: Any) -> Any:
    return cls.original_class if issubclass(cls, _Sparse) else cls


@functools.cache
def _sparse_class(original: Any) -> Any:
    sparse_forward = rebound(original.forward, _table())

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = self._modules.get("inner_attention")
        if inner is None or inner.mode == "dense":
            return original.forward(self, *args, **kwargs)
        with _calling(inner):
            return sparse_forward(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:  # copies and pickles find no class of this name
        return _remade, (original,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    members = {"forward": forward, "__reduce_ex__": __reduce_ex__, "original_class": original}
    return type(f"Sparse{original.__name__}", (_Sparse, original), members)


def _remade(original: Any) -> Any:
    cls = _sparse_class(original)
    return cls.__new__(cls)


def _table() -> Table:
    return ((SDPA, _sdpa), (F.scaled_dot_product_attention, _sdpa))


class _Calling(threading.local):
    """The layer whose forward runs in this thread."""

    def __init__(self) -> None:
        self.inner: SparseAttention | None = None


_now = _Calling()


@contextlib.contextmanager
def _calling(inner: SparseAttention) -> Iterator[None]:
    before, _now.inner = _now.inner, inner
    try:
        yield
    finally:
        _now.inner = before


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """``F.scaled_dot_product_attention`` as a rebound forward sees it; tensors ``[B, H, L, D]``."""

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, *args, **options)

    inner = _now.inner
    assert inner is not None, "a rebound forward ran outside its layer"
    given = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **options}
    reason = None
    if query.dim() != 4:
        reason = f"the model called attention with tensors of {query.dim()} dimensions, not 4"
    elif given.get("attn_mask") is not None:
        reason = "the model passed an attention mask"
    elif given.get("dropout_p"):
        reason = "the attention drops out probabilities"
    if reason is not None:
        if not scheduled():
            count_dense_call(reason)
        return dense()
    scale = given.get("scale")
    return inner(
        query,
        key,
        value,
        dense=dense,
        is_causal=bool(given.get("is_causal")),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        scheduled=scheduled(),
    )


def _has(module: Any, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
    return isinstance(module, nn.Module)
