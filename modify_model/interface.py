"""Attention of transformers' models as this library computes it, registered with transformers' AttentionInterface.

transformers looks attention functions and mask functions up by the name of the implementation, in every forward.
``"spas_attn"`` is the public name, for ``attn_implementation="spas_attn"``: whatever the model runs by default, and
sparse attention in the layers that :func:`modify_model.patch` has given one. A patched model that had another
implementation has a name of its own, see :func:`name_for`.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autotune import SparseAttention
from autotune.ulysses import deepspeed_ranks
from spas_attn.traced import constant_when_traced

from .families import count_dense_call
from .masks import COMPILED_PATTERN, SHORTEST, PreparedMask, chunks_of, prepare_mask
from .sequence_parallel import AROUND_ANOTHER, share_of, whole_mask
from .streaming_layer import Handed, StreamingLayer

NAME = "spas_attn"
PREFIX = "spas_attn_"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # what files of transformers call the AttentionInterface
# Arguments of attention functions, given by some models or by the user, that change the result.
UNSUPPORTED = ("softcap", "position_bias", "cache", "indices", "block_indices", "sinks")


class SparseLayer(nn.Module):
    """What :func:`sparse_class` puts before an attention class: its attention proper runs through ``inner_attention``.

    The layer keeps the installed version's own ``forward``: projections, RoPE, cache update and output projection are
    the model's own code, and q, k and v arrive at :func:`attend`.
    """

    inner_attention: SparseAttention
    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original class's forward; a ValueError on ``output_attentions=True``."""
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True needs the full attention matrix, which sparse attention never forms: "
                "call modify_model.restore(model) first"
            )
        if self.inner_attention.mode != "dense" and not is_ours(self.config):
            count_dense_call(changed(self.config))
        return super().forward(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register(original_implementation(self.config))  # a pickle may come to a new process

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (vars(self)["_original_class"],), dict(vars(self))


_sparse_classes: dict[type[nn.Module], type[nn.Module]] = {}


def sparse_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer of class ``kind`` gets; made at its first use."""
    if kind not in _sparse_classes:
        names = {"__module__": __name__, "__doc__": f"{kind.__name__} with sparse attention; see SparseLayer."}
        _sparse_classes[kind] = type(f"Sparse{kind.__name__}", (SparseLayer, kind), names)
    return _sparse_classes[kind]


def use_class(kind: type[nn.Module], sparse: type[nn.Module]) -> None:
    """Give layers of class ``kind`` a class that stands in a file, in place of one made for them."""
    _sparse_classes[kind] = sparse


def _empty(kind: type[nn.Module]) -> nn.Module:
    """A layer without its state, where a copy or a pickle is made."""
    made = sparse_class(kind)
    return made.__new__(made)


def attend(
    original: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a patched model, as transformers calls it.

    Args:
        original: name of the implementation that the model had; None for what it has by default.
        module: the attention layer, patched or not.
        query: ``[B, Hq, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        value: ``[B, Hkv, Lk, Dv]``.
        attention_mask: a PreparedMask, or whatever the original attention would have received; None under DeepSpeed's
            sequence parallelism, where the call holds the whole sequence of some heads (see sequence_parallel.py).

    Returns:
        ``[B, Lq, Hq, Dv]``, and the attention weights if the original attention gives any and the layer is not patched.
    """
    if isinstance(key, Handed):
        return _attend_cached(module, query, key.layer, attention_mask, kwargs), None
    held = deepspeed_ranks()
    if held is not None and isinstance(attention_mask, PreparedMask):
        raise ValueError(AROUND_ANOTHER)
    if held is not None and attention_mask is None and query.shape[2] >= SHORTEST:
        attention_mask = whole_mask(module, query, kwargs.get("position_ids"))
    prepared = attention_mask if isinstance(attention_mask, PreparedMask) else None
    name = original or default_implementation(type(module.config))

    documents = None
    if prepared is not None and isinstance(module, SparseLayer):
        documents = prepared.documents_at(kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids"))

    def run() -> tuple[Tensor, Tensor | None]:
        mask = attention_mask if prepared is None else prepared.original
        return _run(name, module, query, key, value, mask, kwargs)

    def dense() -> Tensor:
        if prepared is None or documents is None or prepared.documents is not None or name not in ("sdpa", "eager"):
            return run()[0].transpose(1, 2)
        if inner.mode == "dense":  # untuned, the model is what it was
            return run()[0].transpose(1, 2)
        # The mask does not keep these documents apart: what transformers computes is wrong.
        return _run(name, module, query, key, value, prepared.kept_apart(documents), kwargs)[0].transpose(1, 2)

    if not isinstance(module, SparseLayer):  # outside layer_range
        return run()
    inner = module.inner_attention
    if query.shape[2] < SHORTEST:
        return run()[0], None
    share = share_of(held, query.shape[1], inner)
    reason = dense_reason(module, key, attention_mask, kwargs)
    if reason is not None:
        if inner.gates is not None and module.training:
            raise ValueError(f"gates of heads cannot be learnt from this call: {reason}")
        if inner.mode != "dense" or inner.gates is not None:
            count_dense_call(reason)
        return dense().transpose(1, 2), None
    assert prepared is not None  # else there was a reason
    options: dict[str, Any] = dict(attn_mask=prepared.key_mask, window=prepared.window, cu_seqlens=documents)
    if prepared.chunk is not None:
        options["cu_seqlens"] = chunks_of(documents, prepared.chunk, prepared.k_end, query.device)
    if kwargs.get("s_aux") is not None:
        sinks = kwargs["s_aux"].float()
        options["sinks"] = sinks.detach() if inner.gates is None else sinks
    q, k, v = _of_one_head_dim(query, key[:, :, : prepared.k_end], value[:, :, : prepared.k_end])
    out = inner(q, k, v, dense=dense, is_causal=True, scale=_scale(query, kwargs), share=share, **options)
    return out.transpose(1, 2)[..., : value.shape[-1]], None


def _attend_cached(module: Any, query: Tensor, layer: StreamingLayer, mask: Any, kwargs: dict[str, Any]) -> Tensor:
    """Attention with a StreamingCache, which knows what each head sees; there is no dense one to fall back to."""
    layer.check(getattr(module, "inner_attention", None))
    reason = _unsupported(module, kwargs)
    if query.shape[2] >= SHORTEST:
        reason = dense_reason(module, layer.full.keys, mask, kwargs)
        packed = (
            reason is None and mask.documents_at(kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")) is not None
        )
        if packed or (reason is None and (mask.window is not None or mask.chunk is not None)):
            reason = "sequences are packed" if packed else "the layer has a sliding window or chunks"
    if reason is not None or kwargs.get("s_aux") is not None or deepspeed_ranks() is not None:
        raise ValueError(f"a StreamingCache cannot serve this call: {reason or 'sinks or sequence parallelism'}")
    return layer.attend(query, mask, _scale(query, kwargs)).transpose(1, 2)


def dense_reason(module: Any, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a prefill call of a patched layer has to run on the original attention, or None."""
    if mask is None:
        return "an attention layer was called without the mask that its model prepares"
    if not isinstance(mask, PreparedMask):
        return "the caller gave a 4-D attention mask of its own"
    if mask.dense_reason is not None and not (mask.dense_reason == COMPILED_PATTERN and _packed(mask, kwargs)):
        return mask.dense_reason
    if mask.k_len != key.shape[2]:
        return "the cache returned another number of keys than the mask was made for"
    inner = module.inner_attention
    if module.training and inner.mode == "sparse" and inner.gates is None:
        # Gradient checkpointing runs the first forward without gradients and must see what the second one computes.
        return "the model is in training mode; call model.eval()"
    reason = _unsupported(module, kwargs)
    if reason is not None:
        return reason
    window = kwargs.get("sliding_window")
    if isinstance(window, int) and window < mask.k_end and mask.window is None:
        return "the attention was called with a sliding_window that its mask does not have"
    return None


def _unsupported(module: Any, kwargs: dict[str, Any]) -> str | None:
    """What an attention layer asks for that sparse attention does not know, or None."""
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        return "the attention is not causal"
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            return f"the attention was called with {name}"
    if isinstance(kwargs.get("scaling"), Tensor):
        return "the scale of the attention is a tensor"
    return None


def _packed(mask: PreparedMask, kwargs: dict[str, Any]) -> bool:
    """Whether the caller says where the documents of a row begin."""
    given = kwargs.get("cu_seq_lens_q")
    return isinstance(given, Tensor) and mask.found is not None


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    """The factor on q·k: what the model says; where it says nothing, attention functions take D ** -0.5."""
    scale = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scale is None else scale)


def _of_one_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros after the shorter of q's and v's head dims, which change nothing (multi-head latent attention)."""
    size = max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def _run(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The original attention."""
    if name == "eager":
        return eager_function(type(module))(module, query, key, value, mask, **kwargs)
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if function is None:
        raise ValueError(f"the attention implementation {name!r}, which the model had, is not registered any more")
    seen_as = module if name in ("sdpa", "flex_attention") else _renamed(module, name)
    return function(seen_as, query, key, value, mask, **kwargs)


class _View:
    """An object with some attributes replaced."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _renamed(module: nn.Module, original: str) -> Any:
    """The layer as the original attention knows it: FlashAttention's integration reads the implementation's name."""
    return _View(module, config=_View(module.config, _attn_implementation=original))


def forward_on_interface(kind: type[nn.Module]) -> types.FunctionType | None:
    """The forward of a class of modules, or of one that it derives from, that goes through AttentionInterface."""
    for cls in kind.__mro__:
        forward = inspect.unwrap(vars(cls)["forward"]) if "forward" in vars(cls) else None
        if isinstance(forward, types.FunctionType) and INTERFACE in forward.__code__.co_names:
            return forward
    return None


@constant_when_traced
def eager_function(kind: type[nn.Module]) -> Callable[..., Any]:
    """The function that a layer's class falls back to under the implementation "eager"."""
    forward = forward_on_interface(kind)
    assert forward is not None  # it has called us
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    if len(names) != 1:
        raise ValueError(f"{kind.__name__}.forward must name one eager attention function, it names {names}")
    function: Callable[..., Any] = forward.__globals__[names[0]]
    return function


@constant_when_traced
def default_implementation(kind: type) -> str:
    """What a model whose config has this class runs when nobody names an implementation: "sdpa" or "eager"."""
    file = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
    classes: list[Any] = [cls for cls in vars(file).values() if isinstance(cls, type)] if file else []
    support = [cls._supports_sdpa for cls in classes if getattr(cls, "config_class", None) is kind]
    return "sdpa" if support and all(support) else "eager"


def is_ours(config: Any) -> bool:
    """Whether a config names an attention implementation of this file."""
    name = str(config._attn_implementation)
    return name == NAME or name.startswith(PREFIX)


def changed(config: Any) -> str:
    """Why the layers of a patched model do not run sparse when their config names another implementation."""
    return (
        f"the attention implementation was set to {config._attn_implementation!r} after the model was patched: "
        "patch it again"
    )


def name_for(original: str) -> str:
    """The name of the implementation of a patched model that had another one.

    Upper and lower case are swapped, and "/" is replaced: transformers takes names that contain "flash", "sdpa" or
    "flex_attention" for its own, and names with "/" for kernels of the hub, when a model is made from such a config.
    """
    return NAME if original == NAME else PREFIX + original.swapcase().replace("/", "!")


def original_implementation(config: Any) -> str:
    """The implementation that a model has without this file."""
    name = str(config._attn_implementation)
    return name.removeprefix(PREFIX).replace("!", "/").swapcase() if name.startswith(PREFIX) else name


def register(original: str | None = None) -> str:
    """Register the attention and mask functions that go with an implementation; returns their name.

    Args:
        original: what the model had; None or "spas_attn" for the public name.
    """
    name = NAME if original is None else name_for(original)
    original = None if name == NAME else original
    AttentionInterface.register(name, functools.partial(attend, original))
    AttentionMaskInterface.register(name, functools.partial(_prepare, original))
    return name


def _prepare(original: str | None, **arguments: Any) -> Any:
    """The mask function of an implementation; see :func:`modify_model.masks.prepare_mask`."""
    return prepare_mask(original or default_implementation(type(arguments["config"])), **arguments)


register()  # importing this file is enough, in whatever order it and transformers are imported
