"""The processor that runs an installed processor of diffusers with our attention inside.

A processor of diffusers makes q, k and v, calls ``dispatch_attention_fn`` or ``F.scaled_dot_product_attention``, and
projects the result. A :class:`SparseProcessor` runs that very code, as the installed version or the user has it, with
these two functions replaced (rebind.py): projections, norms, rotary embeddings, parameters of the user's own, and
fused, quantised or LoRA layers remain what they were.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from autotune import SparseAttention

from .context_parallel import exchange_for, parts_of_sequence
from .families import Place, count_dense_call
from .rebind import Table, obstacle, rebound
from .schedule import noise_of_call, now

Ranges = tuple[tuple[int, int], ...]

SDPA = F.scaled_dot_product_attention
CALIBRATE_ALONE = "a calibration watches whole layers: run it without enable_parallelism"


class SparseProcessor:
    """An attention processor whose attention proper runs through ``attn.inner_attention``.

    :func:`sparse_processor` makes a class for each class of processors, whose ``__call__`` has the original's
    signature: diffusers drops keyword arguments that a processor does not name. Attributes are the original's, read
    and set (``set_attention_backend`` and ``enable_parallelism`` of diffusers do that).

    Args:
        original: the processor that was there; a new one by default, as diffusers makes processors by their class.
    """

    original_class: ClassVar[type]
    place: ClassVar[Place]
    sparse_call: ClassVar[Callable[..., Any]]  # the original's __call__ with our attention inside
    original: Any

    def __init__(self, original: Any = None) -> None:
        self.__dict__["original"] = self.original_class() if original is None else original

    def __reduce__(self) -> tuple[Any, ...]:
        return sparse_processor, (self.original, self.place)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for methods of their own
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)

    def run(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the original processor returns for these arguments, with sparse attention once the layer is tuned."""
        inner = getattr(attn, "inner_attention", None)  # None where diffusers brought this processor back after restore
        if inner is None or inner.mode == "dense":
            return self.original(attn, *args, **kwargs)
        with _calling(inner, self._text(args, kwargs)):
            return self.sparse_call(self.original, attn, *args, **kwargs)

    def _text(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ranges:
        """(start, stop) of the text among the tokens that attend to each other."""
        if self.place is None:
            return ()
        hidden = args[0] if args else kwargs["hidden_states"]
        encoder = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        total, length = hidden.shape[1], now.text_length // parts_of_sequence(self.original)
        if encoder is not None:
            length = encoder.shape[1]
            total += length
        return ((0, length),) if self.place == "text first" else ((total - length, total),)


def unsupported(processor: Any) -> str | None:
    """Why attention cannot be replaced in a processor, or None."""
    kind = type(processor).__name__
    if isinstance(processor, nn.Module):
        return f"{kind} has weights of its own (an image-prompt adapter): unload it first"
    call = inspect.getattr_static(processor, "__call__", None)
    if not isinstance(call, types.FunctionType):
        return f"{kind} has no __call__ written in Python: its attention cannot be replaced"
    where = obstacle(processor, _table())
    if where is not None:
        return f"{kind} reaches attention through {where}, which cannot be replaced: call it in __call__ itself"
    if rebound(call, _table()) is call:
        return f"{kind} calls neither {dispatch_attention_fn.__name__} nor F.{SDPA.__name__}"
    return None


def sparse_processor(original: Any, place: Place) -> SparseProcessor:
    """The SparseProcessor for a processor of a layer whose text stands at a place."""
    kind: Any = type(original)
    return _sparse_class(kind, place)(original)


@functools.cache
def _sparse_class(original: Any, place: Place) -> type[SparseProcessor]:
    def __call__(self: SparseProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(attn, args, kwargs)

    __call__.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
    members = {
        "__call__": __call__,
        "original_class": original,
        "place": place,
        # One function for all layers of a class, so that torch.compile sees one.
        "sparse_call": staticmethod(rebound(original.__call__, _table())),
    }
    made = type(f"Sparse{original.__name__}", (SparseProcessor,), members)
    with contextlib.suppress(ImportError, ValueError):  # a diffusers without the registry; a processor not in it
        # What layer skipping and perturbed-attention guidance know processors by.
        from diffusers.hooks._helpers import AttentionProcessorRegistry

        AttentionProcessorRegistry.register(made, AttentionProcessorRegistry.get(original))
    return made


def _table() -> Table:
    # Twice the same, unless someone has put another function into torch meanwhile.
    return ((SDPA, _sdpa), (F.scaled_dot_product_attention, _sdpa), (dispatch_attention_fn, _dispatch))


class _Calling(threading.local):
    """The layer whose processor runs in this thread, and its text."""

    # Not attributes of the class: see schedule._Now.
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


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """``F.scaled_dot_product_attention`` as rebound processors see it; tensors ``[B, H, L, D]``."""

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, *args, **options)

    return _attend(query, key, value, _named(args, options), dense)


def _dispatch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """``dispatch_attention_fn`` as rebound processors see it; tensors ``[B, L, H, D]``."""

    def dense() -> Tensor:  # on the attention backend that the user has chosen
        return dispatch_attention_fn(query, key, value, *args, **options).transpose(1, 2)

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    given = _named(args, options)
    mask = given.get("attn_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == q.shape[0]:
        given["attn_mask"] = mask[:, None, None]  # key padding to diffusers, where SDPA reads queries by keys
    return _attend(q, k, v, given, dense).transpose(1, 2)


def _named(args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an attention call after q, k and v, by name."""
    return {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **options}


def _attend(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any], dense: Callable[[], Tensor]) -> Tensor:
    """The attention of the layer in progress; q, k, v and the result ``[B, H, L, D]``."""
    inner = _now.inner
    assert inner is not None, "a rebound processor ran outside SparseProcessor.run"
    key_mask, exchange, reason = None, None, _dense_reason(q, given)
    # Where a processor drops padded text (Mochi), less of it is left.
    text = tuple((start, min(stop, k.shape[2])) for start, stop in _now.text)
    if reason is None:
        key_mask, reason = _key_mask(given.get("attn_mask"), q.shape[0], k.shape[2])
    if reason is None and given.get("parallel_config") is not None and not now.dense:
        exchange, reason = exchange_for(given["parallel_config"], q.shape[1], text)
        reason = CALIBRATE_ALONE if exchange and inner.mode == "tune" else reason
    if reason is not None and not now.dense:
        count_dense_call(reason)
        return dense()
    options = {
        "is_causal": bool(given.get("is_causal")),
        "scale": q.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"],
        "noise": noise_of_call(),
    }
    if exchange is not None:
        return exchange.attend(inner, q, k, v, key_mask, text, options)
    return inner(q, k, v, dense=dense, attn_mask=key_mask, text=text, scheduled=now.dense, **options)


def _dense_reason(q: Tensor, given: dict[str, Any]) -> str | None:
    """Why an attention call has to run as the model makes it, masks apart, or None."""
    if q.dim() != 4:
        return f"a processor called attention with tensors of {q.dim()} dimensions, not 4"
    if given.get("dropout_p"):
        return "the attention drops out probabilities"
    if F.scaled_dot_product_attention is not SDPA:
        return "F.scaled_dot_product_attention was replaced by another function"
    for index in range(torch._C._len_torch_function_stack()):  # perturbed-attention guidance, for example
        mode = torch._C._get_function_stack_at(index)
        if not isinstance(mode, DeviceContext):
            return f"{type(mode).__name__} is active, which may change what attention computes"
    return None


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
