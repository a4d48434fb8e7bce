"""LLaMA (transformers 4.56 to 5.x): SparseLlamaAttention in place of LlamaAttention.

The layer keeps the installed version's own ``LlamaAttention.forward``: projections, RoPE, cache update and output
projection are the model's own code, and q, k and v arrive here through transformers' AttentionInterface. That one call
and the mask beside it are all there is to adapt.

transformers builds the mask once per forward, with the mask function registered under the name of the attention
implementation; under a name without one, the mask is silently None even for padded batches. So a patched model's
implementation is called ``spas_attn_<original>``, and its mask function hands every layer a :class:`PreparedMask`:
the very mask that the original attention would have received, and beside it what sparse attention needs to know
(key padding, last key, window). Recognising that in a 4-D mask afterwards would need a host synchronisation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.models.llama import modeling_llama

from autotune import SparseAttention, enable_tune_mode
from spas_attn.block_mask import BLOCK_SIZES
from spas_attn.selectors import MeanSimilarity

from .patching import Family, count_dense_call, find_modules, hand_back, patch, register, take_over

__all__ = ["SparseLlamaAttention", "enable_tune_mode", "set_spas_sage_attn_llama"]

PREFIX = "spas_attn_"
# With fewer queries than the smallest block a call is a decoding step: dense, as it should be, and not counted.
SHORTEST = min(BLOCK_SIZES)
# Without a cache and a mask, transformers cannot tell packed sequences from one sequence inside a graph.
COMPILED_PATTERN = (
    "a mask pattern that torch.compile hides; without a cache, pass an attention_mask to show that nothing is packed"
)
# Arguments of attention functions, given by other models or by the user, that change the result.
UNSUPPORTED = ("softcap", "position_bias", "s_aux", "sliding_window", "cache", "cu_seq_lens_q")


def set_spas_sage_attn_llama(
    model: nn.Module,
    l1: float = 0.06,
    pv_l1: float = 0.07,
    tail: float | None = 0.5,
    layer_range: tuple[int, int] | None = None,
    verbose: bool = False,
) -> nn.Module:
    """Patch a LLaMA model in place; arguments and errors as in :func:`modify_model.patch`.

    ``layer_range=(start, stop)`` makes only layers start to stop - 1 sparse.
    """
    if not isinstance(model, nn.Module) or not find_modules(model, "LlamaAttention"):
        raise ValueError(f"model must contain LlamaAttention layers, got {type(model).__name__}")
    return patch(model, l1=l1, pv_l1=pv_l1, tail=tail, layer_range=layer_range, verbose=verbose)


class PreparedMask(NamedTuple):
    """What the layers of a patched model receive as ``attention_mask``.

    A tuple, because every carrier of layer arguments knows tuples: accelerate moves the tensors inside to the layer's
    device, torch.compile traces them, gradient checkpointing passes them on. An attribute on the mask tensor would
    get lost on the way (and the mask may be None).

    Attributes:
        original: the mask that the original attention receives: a tensor, a flex BlockMask or None.
        key_mask: key padding, bool ``[B, k_end]``, True = attend; None when no key is hidden.
        k_len: number of keys, with the unused slots of a static cache.
        k_end: number of keys in use; queries are aligned to the last of them.
        window: sliding window in tokens, or None.
        dense_reason: why the pattern is not causal + window + key padding, or None.
    """

    original: Any
    key_mask: Tensor | None
    k_len: int
    k_end: int
    window: int | None
    dense_reason: str | None

    # With a static cache, generate() prepares the mask before it calls the model. It and the model take whatever is
    # not a 2-D tensor for a finished mask; these two are what they ask of it.
    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> PreparedMask:
        return self


class SparseLlamaAttention(modeling_llama.LlamaAttention):
    """LlamaAttention whose attention proper runs through ``inner_attention``.

    It is made from a LlamaAttention and shares its projections and attributes.
    """

    inner_attention: SparseAttention

    def __init__(self, original: nn.Module, inner_attention: SparseAttention) -> None:
        nn.Module.__init__(self)  # not LlamaAttention's: the projections exist already
        take_over(self, original)
        self.inner_attention = inner_attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As ``LlamaAttention.forward``; a ValueError on ``output_attentions=True``."""
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True needs the full attention matrix, which sparse attention never forms: "
                "call modify_model.restore(model) first"
            )
        if self.inner_attention.mode != "dense" and not is_ours(self.config):
            count_dense_call(_changed(self.config))
        return super().forward(hidden_states, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register_implementation(original_implementation(self.config))  # a pickle may come to a new process


def attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a patched model, as transformers calls it.

    Args:
        original: name of the implementation that the model had.
        module: the attention layer, patched or not.
        query: ``[B, Hq, Lq, D]``.
        key, value: ``[B, Hkv, Lk, D]``.
        attention_mask: a PreparedMask, or whatever the original attention would have received.

    Returns:
        ``[B, Lq, Hq, D]``, and the attention weights if the original attention gives any and the layer is not patched.
    """
    function = modeling_llama.ALL_ATTENTION_FUNCTIONS.get(original, modeling_llama.eager_attention_forward)
    prepared = attention_mask if isinstance(attention_mask, PreparedMask) else None
    mask = attention_mask if prepared is None else prepared.original
    seen_as = module if original in ("eager", "sdpa", "flex_attention") else _renamed(module, original)
    if not isinstance(module, SparseLlamaAttention):  # outside layer_range
        return function(seen_as, query, key, value, mask, **kwargs)

    def dense() -> Tensor:
        return function(seen_as, query, key, value, mask, **kwargs)[0].transpose(1, 2)

    if query.shape[2] < SHORTEST:
        return dense().transpose(1, 2), None
    reason = dense_reason(module, key, attention_mask, kwargs)
    if reason is not None or prepared is None:
        if module.inner_attention.mode != "dense":
            count_dense_call(reason)
        return dense().transpose(1, 2), None
    out = module.inner_attention(
        query,
        key[:, :, : prepared.k_end],
        value[:, :, : prepared.k_end],
        dense=dense,
        is_causal=True,
        scale=kwargs.get("scaling") or module.scaling,
        attn_mask=prepared.key_mask,
        window=prepared.window,
    )
    return out.transpose(1, 2), None


def dense_reason(module: SparseLlamaAttention, key: Tensor, mask: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a prefill call of a patched layer has to run on the original attention, or None."""
    if mask is None:
        return "an attention layer was called without the mask that its model prepares"
    if not isinstance(mask, PreparedMask):
        return "the caller gave a 4-D attention mask of its own"
    if mask.dense_reason is not None:
        return mask.dense_reason
    if mask.k_len != key.shape[2]:
        return "the cache returned another number of keys than the mask was made for"
    if module.training and module.inner_attention.mode == "sparse":
        # Gradient checkpointing runs the first forward without gradients and must see what the second one computes.
        return "the model is in training mode; call model.eval()"
    if kwargs.get("is_causal") is False or not module.is_causal:
        return "the attention is not causal"
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            return f"the attention was called with {name}"
    return None


def prepare_mask(original: str, **arguments: Any) -> Any:
    """The mask function of a patched model, as transformers calls it.

    Args:
        original: name of the implementation that the model had; its mask function makes the mask.
        arguments: what the installed version passes to mask functions, handed on as it came.

    Returns:
        A PreparedMask, or for a decoding step the original mask itself.
    """
    padding = arguments.get("attention_mask")
    if isinstance(padding, PreparedMask):  # prepared by generate(), and now the model asks again
        return padding
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
    mask = None if make is None else make(**arguments)
    q_length, q_offset = _queries(arguments)
    if q_length < SHORTEST:
        return mask
    k_len, k_offset = arguments["kv_length"], arguments.get("kv_offset", 0)
    k_end: int | None
    if mask is None and make is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]:
        # It has looked: nothing is padded, and the queries are the first tokens (a static cache may be longer).
        padding, k_end = None, q_length
    else:
        k_end = _last_key(q_length, q_offset, k_len, k_offset)
    window, reason = _pattern(arguments)
    if k_end is None:
        k_end, reason = k_len, reason or "a static cache inside torch.compile hides how many keys are in use"
    if padding is not None:
        padding = padding[:, k_offset : k_offset + k_end]
        padding = nn.functional.pad(padding, (0, k_end - padding.shape[1]))
    return PreparedMask(mask, padding, k_len, k_end, window, reason)


def _queries(arguments: dict[str, Any]) -> tuple[int, int | Tensor]:
    """Number of queries and position of the first one; the one thing that versions of transformers name differently
    (``cache_position`` up to 5.0, ``q_length`` and ``q_offset`` later).
    """
    if "cache_position" in arguments:
        return arguments["cache_position"].shape[0], arguments["cache_position"][0]
    return arguments["q_length"], arguments.get("q_offset", 0)


def _last_key(q_length: int, q_offset: int | Tensor, k_len: int, k_offset: int) -> int | None:
    """Number of keys up to the last query, None if that cannot be known.

    A tensor as ``q_offset`` is read once per forward, and only for a chunk of a longer prompt or a static cache.
    """
    if k_len == q_length:
        return k_len
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling():
            return None
        q_offset = int(q_offset)
    return min(q_offset + q_length - k_offset, k_len)


def _pattern(arguments: dict[str, Any]) -> tuple[int | None, str | None]:
    """The sliding window of a mask, or why it is something else than causal + window + key padding."""
    function = arguments.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return None, None
    if torch.compiler.is_compiling():
        return None, COMPILED_PATTERN
    parts = _joined(function)
    if set(parts) == {"causal_mask_function", "sliding_window_overlay.<locals>.inner_mask"}:
        return arguments["local_size"], None
    # 4.56 to 4.57 give this to single sequences too; later versions do the same check before (without a cache only).
    packed = parts.get("packed_sequence_mask_function.<locals>.inner_mask")
    if packed is not None and len(parts) == 2 and "causal_mask_function" in parts:
        sequences = packed.__closure__[0].cell_contents
        if bool((sequences[:, -1] == 0).all()):
            return None, None
    return None, "packed position_ids or another mask pattern that is not causal + window + key padding"


def _joined(function: Any) -> dict[str, Any]:
    """The parts, by qualified name, of a mask function made by transformers' ``and_masks``; else empty."""
    if function.__qualname__ != "and_masks.<locals>.and_mask":
        return {}
    parts = next(cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, tuple))
    return {part.__qualname__: part for part in parts}


class _View:
    """An object with some attributes replaced."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _renamed(module: nn.Module, original: str) -> Any:
    """The layer as the original attention knows it: FlashAttention's integration reads the implementation's name."""
    return _View(module, config=_View(module.config, _attn_implementation=original))


def is_ours(config: Any) -> bool:
    """Whether a config names an attention implementation of this file."""
    return str(config._attn_implementation).startswith(PREFIX)


def original_implementation(config: Any) -> str:
    """The implementation that a model has without this file."""
    return str(config._attn_implementation).removeprefix(PREFIX)


def register_implementation(original: str) -> str:
    """Register the attention and mask functions that go with an implementation; returns their name."""
    name = PREFIX + original
    AttentionInterface.register(name, functools.partial(attend, original))
    AttentionMaskInterface.register(name, functools.partial(prepare_mask, original))
    return name


def _configs(model: nn.Module) -> Iterator[Any]:
    """The config objects that decide how the LLaMA layers of a model attend."""
    modules = [module for name in ("LlamaModel", "LlamaAttention") for _, module in find_modules(model, name)]
    yield from {id(module.config): module.config for module in modules}.values()


def _switch(model: nn.Module, on: bool) -> None:
    for config in _configs(model):
        original = original_implementation(config)
        config._attn_implementation = register_implementation(original) if on else original


def _changed(config: Any) -> str:
    return (
        f"the attention implementation was set to {config._attn_implementation!r} after the model was patched: "
        "patch it again"
    )


def _problem(model: nn.Module) -> str | None:
    return next((_changed(config) for config in _configs(model) if not is_ours(config)), None)


def _num_heads(attention: Any) -> int:
    return int(attention.config.num_attention_heads)


def _install(attention: nn.Module, inner: SparseAttention) -> tuple[nn.Module, nn.Module]:
    return SparseLlamaAttention(attention, inner), attention


def _remove(attention: nn.Module, original: nn.Module) -> nn.Module:
    hand_back(attention, original)
    return original


# Small blocks and fine scores: at equal perplexity 64 x 64 with pool 8 drops 5 to 7 points more than 128 x 128 with
# pool 16 and copies names better (docs/benchmarks/README.md). For prompts of 32K tokens and more on a GPU, 128 x 128 is
# cheaper to select and to compute: patch(model, selector=MeanSimilarity()).
register(
    Family(
        name="LLaMA",
        model_classes=("LlamaModel",),
        layers=lambda model: find_modules(model, "LlamaAttention"),
        num_heads=_num_heads,
        head_dim=lambda attention: int(attention.head_dim),  # type: ignore[arg-type]
        install=_install,
        remove=_remove,
        defaults=lambda: {"selector": MeanSimilarity(pool=8, block_q=64, block_k=64)},
        switch=_switch,
        problem=_problem,
    )
)
