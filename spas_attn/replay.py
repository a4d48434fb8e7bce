"""Calls that were seen before run again from a plan, without the checks, decisions and launchers of the first time.

A call's signature is everything that those depend on: the shapes, strides, types, devices and alignment of its tensors,
its options, the selector's fields. The first call of a signature runs as it is written, so do all that need anything
but kernels of this library; the second is recorded (kernels/recorded.py), and from the third on its plan is run
(kernels/plans.py): same launches, same bits. Checks that read a tensor's values belong to the caller.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import epoch
from .block_mask import BlockMask
from .kernels import plans
from .kernels.recorded import Recorder
from .selectors import Selector, Union

T = TypeVar("T")
LIMIT = 256  # signatures that are remembered; those unused for longest are forgotten
DEVICES = {"cuda"}  # types of devices on which calls are recorded (tests add the CPU, with Triton's interpreter)
_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype})
_TENSORS = frozenset({Tensor, torch.nn.Parameter})


@dataclass
class _Entry:
    """What is known of a signature: its plan, or why there is none and what was said of it; when it was asked for."""

    plan: plans.Plan | None = None
    obstacle: str | None = None
    about: Any = None
    used: int = 0


_entries: dict[tuple[Any, ...], _Entry] = {}
_lock = threading.Lock()
_clock = 0


class _Unknown(Exception):
    """A value that says nothing a signature could hold."""


@dataclass
class Request:
    """A call whose signature is known.

    Attributes:
        entry: what is known of it.
        tensors, addresses: of the call, each once.
        due: it is to be recorded.
    """

    entry: _Entry
    tensors: list[Tensor]
    addresses: list[int]
    due: bool = False
    _recorder: Recorder | None = None

    @property
    def plan(self) -> plans.Plan | None:
        """What repeats such calls; None where they run as they are written."""
        return self.entry.plan

    @property
    def about(self) -> Any:
        """What :meth:`keep` was told of a call that cannot be recorded; None of others."""
        return self.entry.about

    def run(self, static: bool = False) -> tuple[Tensor, ...]:
        """The results, from the plan; ``static``: as a CUDA graph (:meth:`plans.Plan.run_static`)."""
        assert self.entry.plan is not None
        run = self.entry.plan.run_static if static else self.entry.plan.run
        return run(self.tensors, self.addresses)

    def watch(self, compute: Callable[[], T]) -> T:
        """``compute()``, recorded if that is due."""
        if self.due:
            try:
                with Recorder(self.tensors) as recorder:
                    result = compute()
            except torch.cuda.OutOfMemoryError:  # a recording holds every workspace to its end
                self.entry.obstacle = "it does not fit into memory while it is recorded"
            else:
                self._recorder = recorder
                return result
        return compute()

    def keep(self, outputs: Sequence[Tensor], about: Any = None, obstacle: str | None = None) -> None:
        """Make a plan of what was watched.

        Args:
            outputs: its results, each a tensor that it allocated.
            about: what the plan is to remember, or where there can be none, the signature.
            obstacle: why there can be no plan.
        """
        if self._recorder is None:
            return
        made = obstacle or plans.make(self._recorder.recording, outputs, about)
        if isinstance(made, str):
            self.entry.obstacle, self.entry.about = made, about
        else:
            self.entry.plan = made


def request(q: Tensor, *values: Any) -> Request | None:
    """Look up a call by its values, tensors among them; None for a call that has to run as it is written.

    Args:
        q: the tensor that says where the call runs.
        values: all that the call depends on, ``q`` first: tensors, numbers, names, selectors, block masks, and
            tuples, lists and dicts of such.
    """
    global _clock
    if type(q) not in _TENSORS or q.device.type not in DEVICES or _is_watched():
        return None
    key: list[Any] = [epoch.now()]
    tensors: list[Tensor] = []
    addresses: list[int] = []
    try:
        _describe(values, key, tensors, addresses)
    except (_Unknown, RuntimeError):  # of tensors without strides or memory
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    signature = tuple(key)
    entry = _entries.get(signature)
    _clock += 1
    if entry is None:
        _remember(signature)
        return None
    entry.used = _clock
    if entry.plan is not None:
        return Request(entry, tensors, addresses)
    due = entry.obstacle is None and not (q.is_cuda and torch.cuda.is_current_stream_capturing())
    return Request(entry, tensors, addresses, due)


def replayed(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """``function``, whose arguments (the first is a tensor) are all that its results depend on, with plans."""

    @functools.wraps(function)
    def run(q: Tensor, *others: Any) -> tuple[Tensor, ...]:
        found = request(q, q, function.__qualname__, *others)
        if found is None:
            return function(q, *others)
        if found.plan is not None:
            return found.run()
        results = found.watch(lambda: function(q, *others))
        found.keep(results)
        return results

    return run


def forget() -> None:
    """Forget all plans."""
    with _lock:
        _entries.clear()


def summary() -> dict[str, int]:
    """How many signatures are remembered with a plan, as yet unrecorded, and by each obstacle."""
    return dict(Counter("plan" if e.plan else e.obstacle or "seen once" for e in list(_entries.values())))


def _is_watched() -> bool:
    """Whether someone looks at the operators of torch that run: a mode, a transform, a recording."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._functorch.peek_interpreter_stack() is not None


def _remember(signature: tuple[Any, ...]) -> None:
    with _lock:
        if signature in _entries:
            return
        if len(_entries) >= LIMIT:
            del _entries[min(_entries, key=lambda key: _entries[key].used)]
        _entries[signature] = _Entry(used=_clock)


def _describe(values: Iterable[Any], key: list[Any], tensors: list[Tensor], addresses: list[int]) -> None:
    """Append to ``key`` all that the values' use depends on, and to ``tensors`` those that come by, each once."""
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            key += (kind, value)  # 1, 1.0 and True are equal
        elif kind in _TENSORS:
            for place, known in enumerate(tensors):
                if known is value:
                    key += (Tensor, place)
                    break
            else:
                tensors.append(value)
                address = value.data_ptr()
                addresses.append(address)
                key += (value.shape, value.stride(), value.dtype, value.device, address % 16)
        elif kind is tuple or kind is list:
            key += (tuple, len(value))
            _describe(value, key, tensors, addresses)
        elif kind is dict:
            key += (dict, tuple(value))
            _describe_all(list(value.values()), key, tensors, addresses)
        elif isinstance(value, (Selector, BlockMask)):
            key.append(kind)
            if kind is Union and tensors[0].is_cuda:  # what is made of its Tokens is kept per stream
                key.append(torch._C._cuda_getCurrentRawStream(tensors[0].device.index))
            _describe_all(list(vars(value).values()), key, tensors, addresses)
        else:
            raise _Unknown


def _describe_all(values: list[Any], key: list[Any], tensors: list[Tensor], addresses: list[int]) -> None:
    """:func:`_describe` for values of which most are plain, faster."""
    kinds = tuple(map(type, values))
    others = []
    if not _PLAIN.issuperset(kinds):
        for place, kind in enumerate(kinds):
            if kind not in _PLAIN:
                others.append(values[place])
                values[place] = None
    key += (kinds, tuple(values))
    if others:
        _describe(others, key, tensors, addresses)
