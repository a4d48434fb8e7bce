"""What a StreamingCache holds: keys and values in buffers with room to grow, and which of them a query block sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spas_attn.selectors import Streaming

ROOM = 256  # tokens that a buffer has room for beyond those it is made for: growing copies all of it


class Store:
    """Keys and values of the KV heads ``places`` (in rising order) of one layer, each ``[B, H, length, D]``."""

    def __init__(self, places: tuple[int, ...]) -> None:
        self.places = places
        first, last = (places[0], places[-1] + 1) if places else (0, 0)
        self._adjacent = slice(first, last) if last - first == len(places) else None  # a view is enough
        self._buffers: list[Tensor] = []
        self.length = 0

    @property
    def keys(self) -> Tensor:
        return self._buffers[0][:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._buffers[1][:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return sum(x.nbytes for x in self._buffers)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take this store's heads of new keys and values ``[B, Hkv, L, D]``."""
        end, new = self.length + keys.shape[2], (keys, values)
        if not self._buffers:
            self._buffers = [x.new_empty(x.shape[0], len(self.places), end + ROOM, x.shape[-1]) for x in new]
            self._index = torch.tensor(self.places, dtype=torch.long, device=keys.device)
        elif end > self._buffers[0].shape[2]:
            self.keep([slice(0, self.length)], end - self.length)
        for buffer, x in zip(self._buffers, new, strict=True):
            target = buffer[:, :, self.length : end]
            if self._adjacent is None:
                torch.index_select(x, 1, self._index, out=target)
            else:
                target.copy_(x[:, self._adjacent])
        self.length = end

    def keep(self, columns: list[slice | Tensor], more: int = 0) -> None:
        """Keep some columns, in new buffers.

        Args:
            columns: slices, or positions ``[B, n]`` of each row, one after the other.
            more: new ones to make room for.
        """
        made = []
        for buffer in self._buffers:
            parts = [_columns(buffer, part) for part in columns]
            length = sum(part.shape[2] for part in parts)
            new = buffer.new_empty(*buffer.shape[:2], length + more + ROOM, buffer.shape[-1])
            end = 0
            for part in parts:
                new[:, :, end : end + part.shape[2]] = part
                end += part.shape[2]
            made.append(new)
        self._buffers, self.length = made, length

    def drop(self, start: int, count: int) -> None:
        """Leave out ``count`` columns from ``start`` on; buffers that are far too large then are made anew."""
        left = self.length - count
        if self._buffers[0].shape[2] > left + 3 * ROOM:
            self.keep([slice(0, start), slice(start + count, self.length)])
            return
        for buffer in self._buffers:
            buffer[:, :, start:left] = buffer[:, :, start + count : self.length].clone()
        self.length = left

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of the batch."""
        self._buffers = [change(x) for x in self._buffers]


def _columns(x: Tensor, columns: slice | Tensor) -> Tensor:
    if isinstance(columns, slice):
        return x[:, :, columns]
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _first(seen: Tensor) -> Tensor:
    """Position of the first key of each row that may be attended to; behind all where there is none yet."""
    return torch.where(seen.any(-1), seen.to(torch.int8).argmax(-1), seen.shape[-1])


class Tail(Store):
    """The keys and values that streaming heads see: the sink's blocks, and the window's up to the last token.

    Nothing is left out before all rows of the batch have their sink, and as long as sink and window meet. The sink of
    a row that is padded on the left begins at its own first token.

    Attributes:
        rule: which blocks a query block sees.
        tokens: how many came in all.
        begin: position of the first column of the window; None while nothing is left out.
        width: columns of the sink, where something is.
    """

    def __init__(self, rule: Streaming, places: tuple[int, ...]) -> None:
        super().__init__(places)
        self.rule, self.tokens = rule, 0
        self.begin: int | None = None
        self.width = self._least = self._most = rule.sink_end()  # where the rows' sinks end
        self._sinks: tuple[Tensor, ...] | None = None  # begin and end of each row's, int64 [B, 1]; None: not padded
        self._looked = False

    @property
    def layout(self) -> tuple[object, ...]:
        """All that :meth:`rows` and :meth:`held` depend on beside what a forward's layers have in common."""
        return (*(value for value in vars(self.rule).values()), self.begin, self.length, self._buffers[0].device)

    def append(self, keys: Tensor, values: Tensor) -> None:
        super().append(keys, values)
        self.tokens += keys.shape[2]

    def look(self, seen: Tensor | None, firsts: Callable[[Callable[[], list[int]]], list[int]]) -> None:
        """Find out where the rows begin, until all of them have.

        Args:
            seen: keys that may be attended to, bool ``[B or 1, tokens]``, None for all.
            firsts: returns what its argument does, which waits for the device; layers share it.
        """
        if self._looked:
            return
        found = [0] if seen is None else firsts(lambda: _first(seen).tolist())
        self._looked = max(found) < self.tokens
        if not any(found):
            return
        assert seen is not None
        found = found * (len(self.keys) // len(found))
        ends = [self.rule.sink_end(first) for first in found]
        starts = [first // self.rule.block_k * self.rule.block_k for first in found]
        self._sinks = tuple(torch.tensor(x, device=seen.device)[:, None] for x in (starts, ends))
        self._least, self._most = min(ends), max(ends)
        self.width = max(end - start for start, end in zip(starts, ends, strict=True))

    def leave_out(self) -> None:
        """Leave out what the query block of the next token does not see, nor later ones."""
        begin = max(self._window(self.tokens), self._least)
        if self.begin is None:
            if not self._looked or self.tokens < self._most or begin <= self.width:
                return
            sink: slice | Tensor = slice(0, self.width)
            if self._sinks is not None:
                sink = self._positions(0).clamp(max=self.tokens - 1)
            self.keep([sink, slice(begin, self.tokens)])
        elif begin > self.begin:
            self.drop(self.width, begin - self.begin)
        else:
            return
        self.begin = begin

    def crop(self, count: int) -> None:
        """Forget the last tokens; a ValueError where what their query block saw is left out already."""
        tokens = self.tokens - count
        if self.begin is not None and (tokens < self._most or max(self._window(tokens), self._least) < self.begin):
            raise ValueError(
                f"crop to {tokens} tokens goes back before what the streaming heads hold: call the cache's "
                "activate_past_recording() before the tokens that may be taken back"
            )
        self.tokens, self.length = tokens, self.length - count

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        super().each_row(change)
        if self._sinks is not None:
            self._sinks = tuple(map(change, self._sinks))

    def held(self, seen: Tensor) -> Tensor:
        """Of keys that may be attended to ``[B, tokens]``, those held, each once: bool ``[B, length]``."""
        if self.begin is None:
            return seen
        position = self._positions(self.tokens - self.begin)
        held = seen.gather(1, position.clamp(max=self.tokens - 1).expand(len(seen), -1))
        return held if self._sinks is None else held & self._once(position, 0)

    def is_all(self, first: int, last: int) -> bool:
        """Whether rows at these positions, of which none is padded, see all columns before them."""
        if self._sinks is not None or not self._looked:
            return False
        if self.begin is None:
            return self._window(first) <= self.width
        return self._window(last) <= self.begin

    def rows(self, seen: Tensor | None, past: int, count: int, device: torch.device) -> Tensor | None:
        """Which of the columns held up to the last row some rows see.

        Args:
            seen: what they may attend to: keys ``[B, tokens]``, or ``[B, 1, count, tokens]``; None for all.
            past: position of the first row; rows may lie in several query blocks.

        Returns:
            bool, broadcastable to ``[B, H, count, columns]``; None for all of them.
        """
        starts = [self._window(position) for position in range(past, past + count)]
        end = past + count
        if count == 1 and seen is None and self.is_all(past, past):
            return None
        position = (
            torch.arange(end, device=device)[None] if self.begin is None else self._positions(end - self.begin, device)
        )
        query = torch.arange(past, end, device=device)[:, None]
        mask = (position[:, None] <= query) & self._once(
            position[:, None], torch.tensor(starts, device=device)[:, None]
        )
        mask = mask[:, None]  # [B or 1, 1, count, columns]
        if seen is None:
            return mask
        allowed = seen[:, None, None] if seen.dim() == 2 else seen
        index = (
            position[:, None, None].clamp(max=end - 1).expand(max(len(allowed), len(position)), 1, allowed.shape[2], -1)
        )
        return mask & allowed.expand(len(index), 1, -1, -1).gather(3, index)

    def _window(self, position: int) -> int:
        """Where the window of a position's query block begins."""
        return self.rule.window_start(position // self.rule.block_q * self.rule.block_q)

    def _positions(self, count: int, device: torch.device | None = None) -> Tensor:
        """Positions of the columns of the sink, and of the window's first ones, int64 ``[B or 1, width + count]``."""
        device = device or self._buffers[0].device
        sink = torch.arange(self.width, device=device)[None]
        if self._sinks is not None:
            sink = sink + self._sinks[0]
        window = torch.arange(count, device=device) + (self.begin or 0)
        return torch.cat([sink, window.expand(len(sink), -1)], 1)

    def _once(self, position: Tensor, window: Tensor | int) -> Tensor:
        """Whether columns are of the sink or at or after ``window``, where a row's sink may lie in the window too."""
        end: Tensor | int = self._least
        if self._sinks is not None:
            end = self._sinks[1].view(-1, *[1] * (position.dim() - 1))
        if self.begin is None:
            return (position < end) | (position >= window)
        in_sink = torch.arange(position.shape[-1], device=position.device) < self.width
        return torch.where(in_sink, position < end, (position >= window) & (position >= end))
