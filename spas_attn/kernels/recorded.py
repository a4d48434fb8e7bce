"""Every launch of a kernel goes through here, so that a call can be recorded and its launches repeated (plans.py).

A launch through Triton binds, checks and specialises all arguments again: 22 to 76 µs each on an H100's host, of which
the launch itself is 5 (docs/benchmarks/notes.md). A call whose work on the GPU is nothing but allocations
(``torch.empty``, ``torch.zeros``), views and launches through :func:`launch` can be recorded once and repeated without
its Python. Any other operator is an obstacle: such a call always runs as it is written.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Place(NamedTuple):
    """Where the first element of a tensor lies: ``offset`` bytes from that of a source of the recording."""

    source: int
    offset: int


@dataclass
class Source:
    """A piece of memory that launches read or write.

    Attributes:
        tensor: the tensor that was given or allocated.
        allocated: the call made it (a result or a workspace); else it was given (an input or a constant).
        constant: it was given by the library, not by the caller, and is the same in every call.
    """

    tensor: Tensor
    allocated: bool = False
    constant: bool = False


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: numbers of programs.
        args, options: what it was called with.
        compiled: the compiled kernel that ran; None under Triton's interpreter.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    compiled: Any


class Zero(NamedTuple):
    """All bytes of a source become 0."""

    source: int


@dataclass
class Recording:
    """What a call did, in its order.

    Attributes:
        sources: memory it used; first its inputs, in the order in which they were given.
        places: of the tensors that came by, by their ``id``; ``kept`` holds these, so that no id is given twice.
        actions: launches and clearings.
        obstacle: the first operator that cannot be recorded, None where all can.
    """

    sources: list[Source]
    places: dict[int, Place]
    kept: list[Any] = field(default_factory=list)
    actions: list[Launch | Zero] = field(default_factory=list)
    obstacle: str | None = None

    @classmethod
    def of(cls, inputs: Sequence[Tensor]) -> Recording:
        return cls([Source(x) for x in inputs], {id(x): Place(i, 0) for i, x in enumerate(inputs)}, list(inputs))

    def add(self, source: Source) -> int:
        """The number of a new source."""
        self.sources.append(source)
        self._found(source.tensor, Place(len(self.sources) - 1, 0))
        return len(self.sources) - 1

    def seen(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note one operator of torch."""
        views = result if isinstance(result, (list, tuple)) else [result]
        if func.is_view and args and isinstance(args[0], Tensor) and all(_share_memory(x, args[0]) for x in views):
            base = self.places.get(id(args[0]))
            for view in views:
                if base is not None:
                    self._found(view, Place(base.source, base.offset + _start(view) - _start(args[0])))
        elif func.overloadpacket in _EMPTY | _ZEROS:
            number = self.add(Source(result, allocated=True))
            if func.overloadpacket in _ZEROS:
                self.actions.append(Zero(number))
        elif self.obstacle is None:
            self.obstacle = str(func)

    def _found(self, tensor: Tensor, place: Place) -> None:
        self.places[id(tensor)] = place
        self.kept.append(tensor)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether a view is one: `contiguous`, `reshape` and `to` count as views to torch also where they copy."""
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _start(x: Tensor) -> int:
    return int(x.storage_offset()) * x.element_size()


_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_ZEROS = {_aten.zeros, _aten.zeros_like, _aten.new_zeros}


class _Here(threading.local):
    recorder: Recorder | None = None


_here = _Here()


class Recorder(TorchDispatchMode):
    """Records what the calls of this thread do inside a ``with``, while they do it."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.recording = Recording.of(inputs)
        self._launching = False

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._before, _here.recorder = _here.recorder, self
        return self

    def __exit__(self, *error: Any) -> None:
        _here.recorder = self._before
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._launching:
            self.recording.seen(func, args, kwargs or {}, result)
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Launch and note it; what the launch itself does with tensors (Triton's interpreter copies them) is not."""
        self._launching = True
        try:
            compiled = kernel[grid](*args, **options)
        finally:
            self._launching = False
        self.recording.actions.append(Launch(kernel, grid, args, options, compiled))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, noted where the call is recorded."""
    if _here.recorder is None:
        kernel[grid](*args, **options)
    else:
        _here.recorder.launch(kernel, grid, args, options)


def constant(tensor: Tensor) -> Tensor:
    """``tensor``, which the library keeps for all calls that are alike: a recording may keep it too."""
    if _here.recorder is not None and id(tensor) not in _here.recorder.recording.places:
        _here.recorder.recording.add(Source(tensor, constant=True))
    return tensor
