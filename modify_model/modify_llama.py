"""LLaMA (transformers 4.56 to 5.x): SparseLlamaAttention in place of LlamaAttention.

The layer keeps the installed version's own ``LlamaAttention.forward``: projections, RoPE, cache update and output
projection are the model's own code, and q, k and v arrive here through transformers' AttentionInterface. A patched
model's implementation is called ``spas_attn_<original>``; what its masks say is in masks.py.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama import modeling_llama

from autotune import SparseAttention, enable_tune_mode
from spas_attn.selectors import MeanSimilarity

from .families import Family, Layer, count_dense_call, find_modules, register
from .masks import SHORTEST, PreparedMask, prepare_mask
from .patching import patch

__all__ = ["SparseLlamaAttention", "enable_tune_mode", "set_spas_sage_attn_llama"]

PREFIX = "spas_attn_"
BATCHING = "init_continuous_batching"  # what generate_batch() calls before anything else
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


class SparseLlamaAttention(modeling_llama.LlamaAttention):
    """LlamaAttention whose attention proper runs through ``inner_attention``: a patched layer is given this class."""

    inner_attention: SparseAttention

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
    seen_as = module if original in ("eager", "sdpa", "flex_attention") else _renamed(module, original)

    def run() -> tuple[Tensor, Tensor | None]:
        mask = attention_mask if prepared is None else prepared.original
        return function(seen_as, query, key, value, mask, **kwargs)

    def dense() -> Tensor:
        return run()[0].transpose(1, 2)

    if not isinstance(module, SparseLlamaAttention):  # outside layer_range
        return run()
    if query.shape[2] < SHORTEST:
        return run()[0], None
    reason = dense_reason(module, key, attention_mask, kwargs)
    if reason is not None:
        if module.inner_attention.mode != "dense":
            count_dense_call(reason)
        return run()[0], None
    assert prepared is not None  # else there was a reason
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


class _View:
    """An object with some attributes replaced."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _renamed(module: nn.Module, original: str) -> Any:
    """The layer as the original attention knows it: FlashAttention's integration reads the implementation's name."""
    return _View(module, config=_View(module.config, _attn_implementation=original))


def refuse_batching(*args: Any, **kwargs: Any) -> None:
    """Stands for continuous batching in a patched model: it calls attention with the new tokens of all requests."""
    raise ValueError(
        "continuous batching (generate_batch) does not run with sparse attention: "
        "use generate(), or call modify_model.restore(model) first"
    )


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


def _changed(config: Any) -> str:
    return (
        f"the attention implementation was set to {config._attn_implementation!r} after the model was patched: "
        "patch it again"
    )


def _become(attention: Any, kind: type[nn.Module]) -> None:
    """Change the class of a layer, which keeps its parameters, attributes and hooks."""
    attention.__class__ = kind
    if "_old_forward" in vars(attention):  # accelerate has wrapped the forward of this instance
        attention._old_forward = types.MethodType(kind.forward, attention)


@dataclass(frozen=True)
class LlamaFamily(Family):
    """LLaMA, whose attention layers change their class."""

    def layers(self, model: nn.Module) -> list[Layer]:
        return [Layer(path, attention) for path, attention in find_modules(model, "LlamaAttention")]

    def heads(self, attention: Any) -> tuple[int, int]:
        return int(attention.config.num_attention_heads), int(attention.head_dim)

    def unsupported(self, attention: nn.Module) -> str | None:
        if type(attention).forward is not modeling_llama.LlamaAttention.forward:
            return f"{type(attention).__name__} has a forward of its own"
        return None

    def install(self, layer: Layer, inner: SparseAttention) -> None:
        attention: Any = layer.attention
        attention.inner_attention, attention._original_class = inner, type(attention)
        _become(attention, SparseLlamaAttention)

    def remove(self, attention: Any) -> None:
        _become(attention, attention._original_class)
        del attention.inner_attention, attention._original_class

    # Small blocks and fine scores: at equal perplexity 64 x 64 with pool 8 drops 5 to 7 points more than 128 x 128 with
    # pool 16 and copies names better (docs/benchmarks/README.md). For prompts of 32K tokens and more on a GPU,
    # 128 x 128 is cheaper to select and to compute: patch(model, selector=MeanSimilarity()).
    def defaults(self) -> dict[str, Any]:
        return {"selector": MeanSimilarity(pool=8, block_q=64, block_k=64)}

    def switch(self, model: nn.Module, on: bool, dense_steps: tuple[float, float] | None = None) -> None:
        for config in _configs(model):
            original = original_implementation(config)
            config._attn_implementation = register_implementation(original) if on else original
        for module in model.modules():
            if hasattr(type(module), BATCHING):
                vars(module).pop(BATCHING, None)
                vars(module).update({BATCHING: refuse_batching} if on else {})

    def problem(self, model: nn.Module) -> str | None:
        return next((_changed(config) for config in _configs(model) if not is_ours(config)), None)


register(LlamaFamily("LLaMA", ("LlamaModel",)))
