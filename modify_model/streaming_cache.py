"""StreamingCache: a KV cache for models with streaming heads (streaming_layer.py says what it keeps)."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from autotune import SparseAttention
from autotune.module import sparse_modules, transformers_of
from spas_attn.selectors import ByHead

from .families import find_family
from .streaming_layer import Shared, StreamingLayer


class StreamingCache(DynamicCache):
    """The cache of a model with streaming heads, for ``generate(past_key_values=...)`` and forward calls.

    Full heads keep all keys, streaming heads their sink and window; layers without streaming heads have the cache that
    transformers gives them. One cache serves one batch, as any other. Densities of calls with it are not recorded.

    Args:
        model: a model whose heads :func:`modify_model.stream_heads`, or a file saved after that, has set.

    Raises:
        ValueError: when no head streams, or a layer with streaming heads has a cache of its own (a sliding window).
    """

    def __init__(self, model: nn.Module) -> None:
        modules = sparse_modules(model)
        root = transformers_of(model)[0][1]
        config: Any = getattr(root, "config", None)
        super().__init__(config=config.get_text_config(decoder=True))
        shared, found = Shared(), False
        for path, attention, _ in find_family(root).layers(root):
            inner: Any = getattr(attention, "inner_attention", None)
            if not isinstance(inner, SparseAttention) or not isinstance(inner.selector, ByHead) or inner.always_dense:
                continue
            place: Any = attention.layer_idx
            while len(self.layers) <= place:
                self.layers.append(DynamicLayer())
            if type(self.layers[place]) is not DynamicLayer:
                kind = type(self.layers[place]).__name__
                raise ValueError(f"layer {path!r} cannot have streaming heads in a cache: it needs a {kind}")
            self.layers[place], found = StreamingLayer(inner, shared), True
        if not found:
            raise ValueError(
                f"none of the {len(modules)} layers of {type(root).__name__} has streaming heads: call "
                "modify_model.stream_heads(model, table), or load a file saved after it, first"
            )

    def activate_past_recording(self) -> None:
        """Let :meth:`crop` go back as far as here; generate calls it in assisted decoding from transformers 5 on."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes, with the room that buffers have to grow."""
        return sum(
            layer.nbytes if isinstance(layer, StreamingLayer) else layer.keys.nbytes + layer.values.nbytes
            for layer in self.layers
            if layer.is_initialized
        )
