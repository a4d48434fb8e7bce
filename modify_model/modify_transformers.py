"""Any model of transformers whose attention goes through AttentionInterface, found by structure, not by name.

An attention layer is a module whose forward calls transformers' AttentionInterface, that is causal and has a place in
the cache (``layer_idx``). So vision towers, encoders, cross-attention and the linear-attention layers of hybrid models
are left alone, and of a model with several configs only the text's changes its implementation.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from autotune import SparseAttention
from spas_attn.selectors import ExactKeys

from .families import ANY_TRANSFORMERS, Family, Layer, register
from .interface import changed, forward_on_interface, is_ours, original_implementation, sparse_class
from .interface import register as register_implementation

BATCHING = "init_continuous_batching"  # what generate_batch() calls before anything else


@dataclass(frozen=True)
class TransformersFamily(Family):
    """Models of transformers, whose attention layers change their class."""

    def layers(self, model: nn.Module) -> list[Layer]:
        return [Layer(path, module) for path, module in model.named_modules() if is_attention(module)]

    def label(self, model: nn.Module) -> str:
        layers: list[Any] = self.layers(model)
        return str(layers[0].attention.config.model_type) if layers else self.name

    def heads(self, attention: Any) -> tuple[int, int]:
        config = attention.config
        own = (getattr(attention, name, None) for name in ("num_heads", "num_attention_heads"))
        heads = next((int(x) for x in own if isinstance(x, int)), config.num_attention_heads)
        # Multi-head latent attention: its head_dim, where it has one, is that of the rotated part.
        sizes = (getattr(attention, "qk_head_dim", None), getattr(attention, "head_dim", None))
        size = next((x for x in sizes if x), None) or config.hidden_size // heads
        return int(heads), max(int(size), int(getattr(attention, "v_head_dim", None) or 0))

    def kv_heads(self, attention: Any) -> int:
        # Under multi-head latent attention every query head has keys of its own, whatever the config says.
        group = 1 if hasattr(attention, "kv_lora_rank") else getattr(attention, "num_key_value_groups", 1)
        return self.heads(attention)[0] // int(group)

    def unsupported(self, attention: nn.Module) -> str | None:
        forward = forward_on_interface(type(attention))
        source = inspect.getsource(forward) if forward is not None else ""
        name = type(attention).__name__
        # Sparse attention of the model's own, say: it reads the finished mask, or decides by the implementation's name
        # (other than FlashAttention's, for which some pad their values).
        if re.search(r'\battention_mask(\.|\[)|_attn_implementation (==|in|not in) (?!"flash)', source):
            return f"{name}.forward works on the attention mask itself, or looks at the implementation's name"
        return None

    def install(self, layer: Layer, inner: SparseAttention) -> None:
        attention: Any = layer.attention
        attention.inner_attention, attention._original_class = inner, type(attention)
        _become(attention, sparse_class(type(attention)))

    def remove(self, attention: Any) -> None:
        _become(attention, attention._original_class)
        del attention.inner_attention, attention._original_class

    # Small blocks, and every 16th query against exact keys: on a published model at 8,192 tokens 74% of the blocks left
    # out at +0.3% perplexity where pooled keys (pool 8) have 62 to 67%, and cheaper to select
    # (docs/benchmarks/smollm2.md). The threshold is what a calibration finds for half of the heads at 70%.
    def defaults(self) -> dict[str, Any]:
        return {"selector": ExactKeys(0.995, pool=16, queries="sample", rank="peak", block_q=64, block_k=64)}

    def switch(self, model: nn.Module, on: bool, dense_steps: tuple[float, float] | None = None) -> None:
        for config in self._configs(model):
            original = original_implementation(config)
            # A mapping, so that configs inside this one (of a vision tower) keep theirs.
            config._attn_implementation = {"": register_implementation(original) if on else original}
        for module in model.modules():
            if hasattr(type(module), BATCHING):
                vars(module).pop(BATCHING, None)
                vars(module).update({BATCHING: refuse_batching} if on else {})

    def problem(self, model: nn.Module) -> str | None:
        return next((changed(config) for config in self._configs(model) if not is_ours(config)), None)

    def missing(self, model: nn.Module) -> str:
        return (
            "sparse attention needs causal attention layers that go through transformers' AttentionInterface (in files "
            "that use ALL_ATTENTION_FUNCTIONS), and none of its layers does"
        )

    def _configs(self, model: nn.Module) -> Iterator[Any]:
        """The config objects that decide how the attention layers of a model attend, and what masks they get."""
        layers: list[Any] = self.layers(model)
        kinds = {type(layer.attention.config) for layer in layers}
        found = {id(layer.attention.config): layer.attention.config for layer in layers}
        for path, module in model.named_modules():
            above = any(layer.path.startswith(f"{path}." if path else "") for layer in layers)
            config: Any = getattr(module, "config", None)
            if not above or not hasattr(config, "get_text_config"):
                continue
            # generate() prepares masks by the text's config as the outermost config holds it, which may be a copy.
            for one in (config, config.get_text_config(decoder=True)):
                if type(one) in kinds:
                    found[id(one)] = one
        yield from found.values()


def is_attention(module: nn.Module) -> bool:
    """Whether a module is a causal attention layer that goes through transformers' AttentionInterface."""
    return (
        forward_on_interface(type(module)) is not None
        and getattr(module, "layer_idx", None) is not None
        and getattr(module, "is_causal", True) is True
        and getattr(module, "config", None) is not None
    )


def refuse_batching(*args: Any, **kwargs: Any) -> None:
    """Stands for continuous batching in a patched model: it calls attention with the new tokens of all requests."""
    raise ValueError(
        "continuous batching (generate_batch) does not run with sparse attention: "
        "use generate(), or call modify_model.restore(model) first"
    )


def _become(attention: Any, kind: type[nn.Module]) -> None:
    """Change the class of a layer, which keeps its parameters, attributes and hooks."""
    attention.__class__ = kind
    if "_old_forward" in vars(attention):  # accelerate has wrapped the forward of this instance
        attention._old_forward = types.MethodType(kind.forward, attention)


register(TransformersFamily("transformers", (ANY_TRANSFORMERS,)))
