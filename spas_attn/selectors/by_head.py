"""ByHead: Streaming in some heads, another selector in the rest (DuoAttention, arXiv 2410.10819)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..call import Call
from ..checks import PerHead
from .base import Selector
from .streaming import Streaming

_KEPT = 8  # lists of streaming heads that are remembered, by what they depend on
_lists: dict[tuple[object, ...], BlockMask] = {}
_places: dict[tuple[object, ...], Tensor] = {}


@dataclass
class ByHead(Selector):
    """Keeps what ``streaming`` keeps in the streaming heads, and what ``rest`` keeps in the other, full ones.

    A calibration tunes the full heads; the streaming ones stay as they are, whatever their error
    (:attr:`Selector.fixed_heads`).

    Attributes:
        streams: for each query head whether it streams. Heads of one KV head that differ are selected for in plain
            torch.
        streaming: the rule of the streaming heads.
        rest: the rule of the full heads, of the same block sizes.
    """

    streams: tuple[bool, ...]
    streaming: Streaming
    rest: Selector

    def __post_init__(self) -> None:
        self.streams = tuple(self.streams)
        if not self.streams or not all(isinstance(x, bool) for x in self.streams):
            raise TypeError(f"streams must hold True or False for each query head, got {self.streams!r}")
        for name, kind in (("streaming", Streaming), ("rest", Selector)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        if not self.sink or self.local or self.dense_heads is not None:
            raise ValueError("sink, local and dense_heads belong to the parts of ByHead, not to ByHead")
        for name in ("block_q", "block_k"):
            a, b = getattr(self.streaming, name), getattr(self.rest, name)
            if a != b:
                raise ValueError(f"streaming and rest need one {name}, got {a} and {b}")
            setattr(self, name, a)
        self.tuned, self.candidates = self.rest.tuned, self.rest.candidates  # type: ignore[misc]
        self.selection_ms = self.rest.selection_ms  # type: ignore[misc]
        heads = range(len(self.streams))
        places = (tuple(i for i in heads if self.streams[i]), tuple(i for i in heads if not self.streams[i]))
        # Made here, because the constructors read tensors, which a call must not wait for.
        parts = zip(places, (self.streaming, self.rest), strict=True)
        self._parts = tuple((own, for_heads(part, own, len(self.streams))) for own, part in parts if own)

    @property
    def fits_packing(self) -> bool:
        return self.rest.fits_packing

    @property
    def threshold(self) -> PerHead:
        return self.rest.threshold

    @property
    def fixed_heads(self) -> tuple[bool, ...]:
        return self.streams

    def tuned_to(self, threshold: Tensor, sparse: Tensor) -> Selector:
        streaming = self.streaming
        all_stream = sparse | ~torch.tensor(self.streams, device=sparse.device)
        if torch.compiler.is_compiling() or not bool(all_stream.all()):  # else the lists depend on lengths alone
            streaming = dataclasses.replace(streaming, dense_heads=~all_stream)
        return dataclasses.replace(self, streaming=streaming, rest=self.rest.tuned_to(threshold, sparse))

    def levels(self, call: Call) -> Tensor:
        return torch.where(self._flags(call), self.streaming._ruled(call), self.rest._ruled(call))

    def forced(self, call: Call) -> Tensor:
        return torch.where(self._flags(call), self.streaming.forced(call), self.rest.forced(call))

    def mask_of(self, call: Call) -> BlockMask:
        return self.joined(call, lambda part, own: part.mask_of(own))

    def joined(self, call: Call, select: Callable[[Selector, Call], BlockMask]) -> BlockMask:
        """The kept blocks of a call of one sequence, where ``select`` chooses those of the full heads by themselves."""
        group, heads = call.group, self._flags(call).shape[0]
        if any(self.streams[i] is not self.streams[i - i % group] for i in range(heads)):
            return super().mask_of(call)
        made = []
        for places, part in self._parts:
            k = pick(call.k, tuple(i // group for i in places[::group]))
            own = call.replace(q=pick(call.q, places), k=k, v=k, sinks=None, pv_threshold=None)
            made.append(static_mask(part, own) if self.streams[places[0]] else select(part, own))
        if len(made) == 1:
            return made[0]
        shape, like = (call.q.shape[0], heads), made[0]
        counts = like.counts.new_empty(*shape, *like.counts.shape[2:])
        indices = like.indices.new_empty(*shape, *like.indices.shape[2:])
        for (places, _), mask in zip(self._parts, made, strict=True):
            where = head_index(places, call.q.device)
            counts[:, where], indices[:, where] = mask.counts, mask.indices
        return BlockMask(counts, indices, self.block_q, self.block_k, call.q_len, call.k_len, trusted=True)

    def _flags(self, call: Call) -> Tensor:
        """Whether each head streams, bool ``[Hq, 1, 1]``."""
        if len(self.streams) != call.q.shape[1]:
            raise ValueError(f"streams must have a value for each of {call.q.shape[1]} heads, got {len(self.streams)}")
        return torch.tensor(self.streams, device=call.q.device)[:, None, None]


def static_mask(rule: Selector, call: Call) -> BlockMask:
    """What a Streaming rule keeps of a call; where that depends on lengths alone, one head's lists, which are
    remembered, stand for all heads and batches.
    """
    assert isinstance(rule, Streaming)
    plain = not isinstance(rule.sink_tokens, Tensor) and not isinstance(rule.local_tokens, Tensor)
    if not plain or rule.dense_heads is not None or call.key_mask is not None or call.document_start is not None:
        return rule.mask_of(call)
    batch, heads = call.q.shape[:2]
    key = (tuple(vars(rule).items()), call.q_len, call.k_len, call.is_causal, call.window, *_place(call.q.device))
    one = call.replace(q=call.q[:1, :1], k=call.k[:1, :1], v=call.k[:1, :1])
    if _is_traced(call.q.device):
        mask = rule.mask_of(one)
    elif key in _lists:
        mask = _lists[key]
    else:
        while len(_lists) >= _KEPT:
            del _lists[next(iter(_lists))]
        with torch.inference_mode(False):  # what is made in that mode serves no call outside of it
            mask = _lists[key] = rule.mask_of(one)
    counts, indices = mask.counts.expand(batch, heads, -1), mask.indices.expand(batch, heads, -1, -1)
    return BlockMask(counts, indices, rule.block_q, rule.block_k, call.q_len, call.k_len, trusted=True)


def for_heads(selector: Selector, places: tuple[int, ...], heads: int) -> Selector:
    """A selector for some of the ``heads`` that it has values for."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(selector):
        value = getattr(selector, f.name)
        if isinstance(value, Selector):
            changes[f.name] = for_heads(value, places, heads)
        elif isinstance(value, Tensor) and value.dim() == 1 and len(value) == heads:
            changes[f.name] = value.index_select(0, head_index(places, value.device))
        elif isinstance(value, tuple) and f.name in ("pattern", "streams") and len(value) == heads:
            changes[f.name] = tuple(value[i] for i in places)
    return dataclasses.replace(selector, **changes) if changes else selector


def pick(x: Tensor, places: tuple[int, ...]) -> Tensor:
    """Some heads of ``[B, H, ...]``, in rising order; a view where they stand next to each other."""
    first, last = places[0], places[-1] + 1
    if last - first == len(places):
        return x[:, first:last]
    return x.index_select(1, head_index(places, x.device))


def head_index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Places as int64 on a device; made once, as a call must not wait for copies."""
    if _is_traced(device):
        return torch.tensor(places, device=device)
    key = (places, *_place(device))
    if key not in _places:
        if len(_places) >= 1024:
            _places.clear()
        with torch.inference_mode(False):
            _places[key] = torch.tensor(places, device=device)
    return _places[key]


def _place(device: torch.device) -> tuple[object, ...]:
    """Device and stream: another stream could read what is remembered before it is written."""
    return (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


def _is_traced(device: torch.device) -> bool:
    """Whether what is made now belongs to a graph: of torch.compile, or one that is captured."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
