"""StreamingLayer: keys and values of one attention layer, in a cache whose streaming heads hold no more than they see.

A streaming head sees whole blocks: those of the sink, and those of the window of a query's block
(:class:`spas_attn.selectors.Streaming`). The layer keeps exactly these, so that a decoding step attends to the keys
that the rows of its position attend to in prefill, in chunks of any length too. Keys carry their positions (RoPE), so
what lies between sink and window can be left out: the rule holds for what is left as if it were the whole sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from autotune import SparseAttention
from spas_attn import block_sparse_attention
from spas_attn.call import Call
from spas_attn.selectors import ByHead, Streaming
from spas_attn.selectors.by_head import for_heads

from .masks import SHORTEST, PreparedMask
from .streaming_attention import allowed, causal, few_rows, grouped, of_all_heads, of_heads
from .streaming_store import Store, Tail

WRONG_ATTENTION = (
    "a StreamingCache serves the model it was made for, patched and running sparse attention: this model is not "
    "patched, or its attention implementation was changed after that (modify_model.verify(model) tells)"
)


class Handed:
    """What a layer of the cache gives its attention in place of keys, and of values: whatever uses it as a tensor, an
    attention that knows nothing of streaming heads, gets a ValueError.
    """

    def __init__(self, layer: StreamingLayer) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        raise ValueError(WRONG_ATTENTION)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(WRONG_ATTENTION)


class Shared:
    """What all layers of a forward need and one of them makes."""

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return Shared()

    def clear(self) -> None:
        """Forget the last forward."""
        self._of: tuple[Any, ...] = (None,)
        self._made: dict[Any, Any] = {}

    def once(self, forward: tuple[Any, ...], key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; made once for each key of a forward, known by its mask (an object) and numbers."""
        if self._of[0] is not forward[0] or self._of[1:] != forward[1:]:
            self._of, self._made = forward, {}
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class StreamingLayer(CacheLayerMixin):
    """The keys and values of one attention layer: all of the full heads', sink and window of the streaming ones'.

    Args:
        inner: the layer's attention; its heads and thresholds are those of now.
        shared: by the layers of one cache.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, inner: SparseAttention, shared: Shared) -> None:
        super().__init__()
        selector = inner.selector
        assert isinstance(selector, ByHead) and inner.tuned is not None
        heads, kv_heads = len(selector.streams), inner.kv_heads or len(selector.streams)
        self.group = heads // kv_heads
        streams = selector.streams[:: self.group]
        if any(selector.streams[i] is not streams[i // self.group] for i in range(heads)):
            raise ValueError("query heads of one KV head must all stream, or none of them, to have a cache in common")
        sparse = inner.tuned.is_sparse.tolist()
        if inner.mode != "sparse" or any(y and not x for x, y in zip(sparse, selector.streams, strict=True)):
            raise ValueError("the streaming heads must run sparse: call modify_model.stream_heads(model, table) again")
        if selector.streaming.dense_heads is not None:
            raise ValueError("dense_heads of the streaming rule must be None, for streaming heads to have a window")
        self.inner, self.shared = inner, shared
        self.selector, self.tuned = inner.selector, inner.tuned
        self.kv = tuple(tuple(i for i in range(kv_heads) if streams[i] is kind) for kind in (False, True))
        self.queries = tuple(tuple(i for i in range(heads) if selector.streams[i] is kind) for kind in (False, True))
        # Full heads first, as their attention is computed, and back.
        self.order = (*self.queries[0], *self.queries[1])
        self.inverse = tuple(sorted(range(heads), key=self.order.__getitem__))
        self.in_order = self.order == tuple(range(heads))
        self.attention = of_heads(inner, self.queries[0]) if self.queries[0] else None
        self.rule: Streaming = for_heads(selector.streaming, self.queries[1], heads)  # type: ignore[assignment]
        self.full, self.tail = Store(self.kv[0]), Tail(self.rule, self.kv[1])
        self.tokens, self.record_past = 0, False

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingLayer:
        """With keys of its own, of the same model: how a prompt that many requests share is kept."""
        made = copy.copy(self)
        for name in ("full", "tail", "shared"):
            setattr(made, name, copy.deepcopy(getattr(self, name), memo))
        return made

    # -- what transformers asks of a layer of a cache -----------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.places = [torch.tensor(x, device=self.device) for x in (self.order, self.inverse)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the keys and values of new tokens ``[B, Hkv, L, D]``; returns what only a patched layer can use."""
        if key_states.shape[1] * self.group != len(self.inverse) or key_states.shape[-1] != value_states.shape[-1]:
            raise ValueError(
                f"a StreamingCache needs keys and values of {len(self.inverse) // self.group} heads and one head dim, "
                f"got {tuple(key_states.shape)} and {tuple(value_states.shape)}"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("a StreamingCache carries no gradients: call the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.full.append(key_states, value_states)
        self.tail.append(key_states, value_states)
        self.tokens += key_states.shape[2]
        return Handed(self), Handed(self)

    def get_seq_length(self, *args: Any) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Keys of the full heads, which the masks are made for; up to transformers 5.0 the positions come."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.tokens + int(new), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.0

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return self.full.nbytes + self.tail.nbytes

    def reset(self) -> None:
        self.full, self.tail, self.tokens = Store(self.kv[0]), Tail(self.rule, self.kv[1]), 0
        self.is_initialized = False
        self.shared.clear()

    def activate_past_recording(self) -> None:
        """From now on nothing is left out until :meth:`crop`, which may then go back as far."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: ``-n``, or (up to transformers 5.0) all but the first n.

        Raises:
            ValueError: on going back to where the streaming heads have no keys any more.
        """
        length = tokens_to_remove if tokens_to_remove > 0 else self.tokens + tokens_to_remove
        removed = max(0, self.tokens - length)
        self.tail.crop(removed)
        self.full.length -= removed
        self.tokens -= removed
        self.tail.leave_out()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each_row(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        raise ValueError("a StreamingCache stays on the device of its model: offloading is not supported")

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        self.shared.clear()
        self.full.each_row(change)
        self.tail.each_row(change)

    # -- the attention of its layer -----------------------------------------------------------------------------------

    def check(self, inner: SparseAttention | None) -> None:
        """Reject the attention of another layer, and of this one with other heads or thresholds."""
        if inner is not self.inner:
            raise ValueError("this StreamingCache was made for another model: make one of this model")
        if inner.selector is not self.selector or inner.tuned is not self.tuned or inner.mode != "sparse":
            raise ValueError(
                "the heads or thresholds of the model were changed after this StreamingCache was made: make a new one"
            )

    def attend(self, query: Tensor, mask: Any, scale: float) -> Tensor:
        """Attention of the last tokens taken.

        Args:
            query: ``[B, Hq, Lq, D]``, of those tokens.
            mask: a PreparedMask; of fewer tokens than a block what transformers makes for sdpa, eager, FlashAttention.

        Returns:
            ``[B, Hq, Lq, D]``.
        """
        last = self.tokens - 1
        if mask is None and query.shape[2] == 1 and self.tail.is_all(last, last):
            return self._step(query, scale)
        forward = (mask, self.tokens, query.shape[2], query.device)

        def once(key: Any, make: Callable[[], Any]) -> Any:
            return self.shared.once(forward, key, make)

        if isinstance(mask, PreparedMask):
            seen = keys = mask.key_mask
        else:
            seen = once("seen", lambda: allowed(mask, query.shape[2], self.tokens, query.device))
            keys = None if seen is None else seen[:, 0, -1]
        self.tail.look(keys, lambda make: once("first", make))
        full = len(self.queries[0])
        q = query if self.in_order else query.index_select(1, self.places[0])
        parts = [] if self.attention is None else [self._full(q[:, :full], seen, scale, once)]
        parts.append(self._streaming(q[:, full:], seen, scale, once))
        if not self.record_past:
            self.tail.leave_out()
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return out if self.in_order else out.index_select(1, self.places[1])

    def _step(self, query: Tensor, scale: float) -> Tensor:
        """One token, for which every head sees all keys held: few operations, as these are host time."""
        batch, heads, _, dim = query.shape
        q = query if self.in_order else query.index_select(1, self.places[0])
        q, full, tail = q.reshape(batch, -1, self.group, dim), self.full, self.tail
        count = len(full.places)
        out = few_rows(q[:, count:], tail.keys, tail.values, None, scale)
        if count:
            out = torch.cat((few_rows(q[:, :count], full.keys, full.values, None, scale), out), 1)
        if not self.record_past:
            tail.leave_out()
        out = out.reshape(batch, heads, 1, dim)
        return out if self.in_order else out.index_select(1, self.places[1])

    def _full(self, q: Tensor, seen: Tensor | None, scale: float, once: Callable[..., Any]) -> Tensor:
        k, v = self.full.keys, self.full.values
        if q.shape[2] < SHORTEST:
            return grouped(q, k, v, seen, scale)
        assert self.attention is not None
        return self.attention(
            q, k, v, dense=lambda: causal(q, k, v, seen, scale, once), is_causal=True, scale=scale, attn_mask=seen
        )

    def _streaming(self, q: Tensor, seen: Tensor | None, scale: float, once: Callable[..., Any]) -> Tensor:
        """The rows of a query block that the last call left unfinished by themselves, the others in whole blocks."""
        tail, length = self.tail, q.shape[2]
        past = self.tokens - length
        short = length if length < SHORTEST else min(-past % self.rule.block_q, length)
        parts = []
        if short:
            rows = once(("rows", *tail.layout), lambda: tail.rows(seen, past, short, q.device))
            k, v = (x[:, :, : tail.length - (length - short)] for x in (tail.keys, tail.values))
            parts.append(grouped(q[:, :, :short], k, v, rows, scale))
        if short < length:
            q, k, v = q[:, :, short:], tail.keys, tail.values
            held = None if seen is None else tail.held(seen)
            one = Call(q[:, :1], k[:, :1], k[:, :1], True, scale, held)
            blocks = once(("blocks", *tail.layout), lambda: self.rule.mask_of(one))
            inner: Any = self.inner
            parts.append(
                block_sparse_attention(
                    q, k, v, of_all_heads(blocks, q), is_causal=True, scale=scale, attn_mask=held,
                    backend=inner.backend, precision=inner.precision, error_bound=inner.pv_l1,
                )
            )  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
