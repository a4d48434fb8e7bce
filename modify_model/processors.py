"""What the diffusers families share: the model's own attention processor, with only its attention replaced.

A processor of diffusers makes q, k and v, calls ``dispatch_attention_fn`` or ``F.scaled_dot_product_attention``, and
projects the result. :class:`SparseProcessor` runs that very code, as the installed version has it, with these two
names bound to the functions below: projections, norms, rotary embeddings, and fused, quantised or LoRA layers remain
the model's own. An adapter says only where its attention layers are and where the text stands.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from autotune import SparseAttention
from spas_attn.selectors.tokens import Ranges

from .patching import Family, count_dense_call
from .schedule import NoiseLevel, thousandths

SDPA, DISPATCH = "scaled_dot_product_attention", "dispatch_attention_fn"


class SparseProcessor:
    """An attention processor whose attention proper runs through ``attn.inner_attention``.

    A family derives from it and names in ``__call__`` the parameters that its attention layers pass (diffusers drops
    keyword arguments that a processor does not name).

    Args:
        original: the processor that was there.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self._sparse_call = _rebound(type(original).__call__)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.original,)  # a rebound function cannot be copied or pickled; it is made again

    def run(self, attn: Any, *arguments: Any, text: Ranges = ()) -> Any:
        """What the original processor returns for these arguments, with sparse attention once the layer is tuned.

        Args:
            attn: the attention layer.
            arguments: of the original processor, after ``attn``.
            text: (start, stop) of the text among the tokens that attend to each other.
        """
        inner = attn.inner_attention
        if inner.mode == "dense" or inner.dense_now:
            return self.original(attn, *arguments)
        with _calling(inner, text):
            return self._sparse_call(self.original, attn, *arguments)

    # diffusers reads and sets these two on processors (set_attention_backend, enable_parallelism); where the original
    # has none, they raise AttributeError here too, and diffusers passes the layer over.

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config


class _Calling(threading.local):
    """The layer whose processor runs in this thread, and its text."""

    # Not attributes of the class: torch.compile guards on what the instance holds, and the first call must not add to
    # it what was missing while it was traced.
    def __init__(self) -> None:
        self.inner: SparseAttention | None = None
        self.text: Ranges = ()


_now = _Calling()


@contextlib.contextmanager
def _calling(inner: SparseAttention, text: Ranges) -> Iterator[None]:
    before = _now.inner, _now.text
    _now.inner, _now.text = inner, text
    try:
        yield
    finally:
        _now.inner, _now.text = before


def _sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """``F.scaled_dot_product_attention`` as rebound processors see it; tensors ``[B, H, L, D]``."""

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)

    return _attend(query, key, value, attn_mask, options, dense)


def _dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """``dispatch_attention_fn`` as rebound processors see it; tensors ``[B, L, H, D]``."""

    def dense() -> Tensor:  # on the attention backend that the user has chosen
        return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **options).transpose(1, 2)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = attn_mask
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == q.shape[0]:
        mask = mask[:, None, None]  # key padding to diffusers, where SDPA itself reads queries by keys
    return _attend(q, k, v, mask, options, dense).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Mapping[str, Any], dense: Callable[[], Tensor]
) -> Tensor:
    """The attention of the layer in progress; q, k, v and the result ``[B, H, L, D]``."""
    inner = _now.inner
    assert inner is not None, "a rebound processor ran outside SparseProcessor.run"
    key_mask, reason = _key_mask(mask, q.shape[0], k.shape[2])
    if options.get("parallel_config") is not None:
        reason = "context parallelism gives each device a part of the sequence, and blocks are selected on the whole"
    if options.get("dropout_p"):
        reason = "the attention drops out probabilities"
    if reason is not None:
        count_dense_call(reason)
        return dense()
    scale = q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"]
    return inner(
        q,
        k,
        v,
        dense=dense,
        is_causal=bool(options.get("is_causal")),
        scale=scale,
        attn_mask=key_mask,
        text=_now.text,
    )


def _key_mask(mask: Any, batch: int, k_len: int) -> tuple[Tensor | None, str | None]:
    """Key padding ``[B, Lk]`` of a mask as SDPA reads it, or why it is none."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        return None, f"the model passed an attention mask of type {type(mask).__name__}, not a tensor"
    if mask.dtype != torch.bool:
        return None, f"the model passed an attention mask of {mask.dtype}, not a boolean one"
    shape = tuple(mask.shape)
    if shape in ((1, 1, 1, k_len), (batch, 1, 1, k_len)):
        mask = mask[:, 0, 0]
    elif shape != (1, k_len):  # this one: all queries, hence all samples, see the same keys
        return None, "the model passed a full attention mask, which sparse attention does not represent"
    return mask.expand(batch, -1), None


@functools.cache
def _rebound(call: Callable[..., Any]) -> Callable[..., Any]:
    """A processor's ``__call__`` with the two attention functions replaced in its globals.

    One function for all layers of a class, so that torch.compile sees one. diffusers itself stays untouched: what is
    not patched (cross-attention, text encoders, VAEs) calls what it always called.
    """
    names = {**call.__globals__, "F": types.SimpleNamespace(**{**vars(F), SDPA: _sdpa}), DISPATCH: _dispatch}
    del names["__name__"]  # by it, torch.compile would look names up in the original module
    found = types.FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    found.__kwdefaults__ = call.__kwdefaults__
    return found


def unsupported(attention: Any) -> str | None:
    """Why a layer's processor cannot be made sparse, or None."""
    processor = attention.processor
    if isinstance(processor, nn.Module):
        return f"{type(processor).__name__} has weights of its own (an image-prompt adapter): unload it first"
    call = inspect.getattr_static(processor, "__call__", None)
    if not isinstance(call, types.FunctionType) or not {SDPA, DISPATCH} & set(call.__code__.co_names):
        return f"{type(processor).__name__} calls neither {DISPATCH} nor F.{SDPA}: its attention cannot be replaced"
    return None


def _install(processor: type[SparseProcessor], attention: Any, inner: SparseAttention) -> tuple[nn.Module, Any]:
    original = attention.processor
    attention.inner_attention = inner
    attention.processor = processor(original)
    return attention, original


def _remove(attention: Any, original: Any) -> nn.Module:
    if is_sparse(attention):  # else someone has set another processor meanwhile; it stays
        attention.processor = original
    del attention.inner_attention
    return attention


def is_sparse(attention: Any) -> bool:
    """Whether a layer's processor is one of ours."""
    return isinstance(attention.processor, SparseProcessor)


def _layers(blocks: Mapping[str, str], model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The self-attention layers in a model's blocks: ``{class of the block: attribute}``, in the model's order."""
    found = []
    for path, module in model.named_modules():
        names = [blocks[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in blocks]
        if names:
            found.append((f"{path}.{names[0]}", getattr(module, names[0])))
    return found


def processor_family(
    name: str,
    model_classes: tuple[str, ...],
    blocks: Mapping[str, str],
    processor: type[SparseProcessor],
    *,
    noise_level: NoiseLevel = thousandths,
    switch: Callable[[nn.Module, bool], None] = lambda model, on: None,
) -> Family:
    """A family of diffusers whose attention processors are swapped.

    Args:
        name, model_classes, switch: as in :class:`modify_model.patching.Family`.
        blocks: class names of the transformer blocks, and the attribute of each that holds its self-attention.
        processor: its SparseProcessor.
        noise_level: maps the ``timestep`` that the model receives to [0, 1], 1 = pure noise.
    """
    return Family(
        name=name,
        model_classes=model_classes,
        layers=functools.partial(_layers, dict(blocks)),
        num_heads=lambda attention: int(attention.heads),  # type: ignore[arg-type]
        head_dim=lambda attention: int(attention.inner_dim) // int(attention.heads),  # type: ignore[arg-type]
        install=functools.partial(_install, processor),
        remove=_remove,
        switch=switch,
        in_place=is_sparse,
        unsupported=unsupported,
        noise_level=noise_level,
    )
