"""A recorded call as a plan: one allocation for all workspaces, the results, and its launches with other addresses.

Nothing is kept between calls but host memory (save by :meth:`Plan.run_static`): workspaces come from torch's caching
allocator, so that streams, graphs being captured and threads each have their own.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import direct
from .recorded import Launch, Place, Recording, Zero

GRAPHS = 128  # addresses of inputs for which a plan keeps a CUDA graph
_ALIGNMENT = 512  # bytes, as torch's allocator aligns
_capturing = threading.Lock()
_pools: dict[tuple[int, int], Any] = {}  # memory of the graphs' workspaces, by stream and GPU


class Layout(NamedTuple):
    """Shape and strides of a tensor, in elements, and its type."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        return cls(tuple(x.shape), tuple(x.stride()), x.dtype)


class Leaf(NamedTuple):
    """A tensor among the arguments of a launch."""

    place: Place
    layout: Layout


@dataclass
class Plan:
    """What repeats a call.

    Attributes:
        device: where it runs.
        constants: tensors that the library keeps, used as they are.
        outputs: layouts of its results.
        workspace: bytes of all workspaces.
        actions: launches, and clearings of a number of bytes at a place; every tensor is a :class:`Leaf`, whose sources
            are the inputs, then the constants, the outputs, and the workspaces' memory.
        about: what the call said of itself beside its results.
        prepared: the launches as the driver takes them; None where they go through Triton.
    """

    device: torch.device
    constants: tuple[Tensor, ...]
    outputs: tuple[Layout, ...]
    workspace: int
    actions: tuple[Launch | tuple[Place, int], ...]
    about: Any
    prepared: tuple[direct.Prepared, ...] | None = None
    _free: list[direct.Parameters] = field(default_factory=list)
    _met: dict[tuple[int, ...], None] = field(default_factory=dict)  # where static inputs lay once
    _graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = field(default_factory=dict)

    def run(
        self, inputs: Sequence[Tensor], addresses: Sequence[int], outputs: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Repeat the call.

        Args:
            inputs: as they were when it was recorded, but for their addresses and contents.
            addresses: theirs.
            outputs: where to write the results; new tensors by default.
        """
        device = self.device
        if outputs is None:
            outputs = tuple([torch.empty_strided(s, t, dtype=kind, device=device) for s, t, kind in self.outputs])
        arena = torch.empty(self.workspace, dtype=torch.uint8, device=device) if self.workspace else None
        launch = functools.partial(self._through_triton, [*inputs, *self.constants, *outputs, arena])
        if self.prepared is not None:
            addresses = [*addresses, *self._constant_addresses, *[x.data_ptr() for x in outputs]]
            if arena is not None:
                addresses.append(arena.data_ptr())
            launch = functools.partial(self._launch, addresses)
        if device.type != "cuda" or torch.cuda.current_device() == device.index:
            launch()
        else:
            with torch.cuda.device(device):
                launch()
        return outputs

    def run_static(self, inputs: Sequence[Tensor], addresses: Sequence[int]) -> tuple[Tensor, ...]:
        """Repeat the call as a CUDA graph, from its second time with inputs at these addresses on.

        The results are memory of the graph: the next call with such inputs at these addresses overwrites them.
        """
        index = self.device.index
        if self.prepared is None or torch.cuda.is_current_stream_capturing():
            return self.run(inputs, addresses)
        key = (torch._C._cuda_getCurrentRawStream(index), *addresses)  # two streams may not share a workspace
        known = self._graphs.get(key)
        if known is not None:
            known[0].replay()
            return known[1]
        outputs = self.run(inputs, addresses)  # not of the pool, where a later graph may take what is free
        with _capturing:
            if key not in self._met:
                _add(self._met, key, None)
                return outputs
            del self._met[key]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(index):
                pool = _pools.setdefault((key[0], index), torch.cuda.graph_pool_handle())
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self.run(inputs, addresses, outputs)
            _add(self._graphs, key, (graph, outputs))
        return outputs

    def __post_init__(self) -> None:
        self._constant_addresses = [x.data_ptr() for x in self.constants]

    def _launch(self, addresses: Sequence[int]) -> None:
        cuda, index = direct.driver(), self.device.index
        assert cuda is not None and self.prepared is not None
        if index not in _thread.devices:
            cuda.ensure_context(index)
            _thread.devices.add(index)
        stream = torch._C._cuda_getCurrentRawStream(index)
        try:
            parameters = self._free.pop()  # one thread's at a time
        except IndexError:
            parameters = direct.Parameters(cuda, self.prepared, lambda leaf: leaf.place)
        parameters.point(addresses, stream)
        launches, launch = iter(parameters.launches), cuda.launch
        for action in self.actions:
            if isinstance(action, Launch):
                code = launch(*next(launches), None)
            else:
                (source, offset), size = action
                code = cuda.clear(addresses[source] + offset, 0, size, stream)
            if code:
                cuda.check(code)
        self._free.append(parameters)

    def _through_triton(self, sources: Sequence[Tensor | None]) -> None:
        for action in self.actions:
            if isinstance(action, Launch):
                launch = _changed(action, lambda leaf: _tensor_at(leaf, sources))
                launch.kernel[launch.grid](*launch.args, **launch.options)
            else:
                place, size = action
                _tensor_at(Leaf(place, Layout((size,), (1,), torch.uint8)), sources).zero_()


def _add(kept: dict[Any, Any], key: Any, value: Any) -> None:
    while len(kept) >= GRAPHS:
        del kept[next(iter(kept))]
    kept[key] = value


class _Thread(threading.local):
    def __init__(self) -> None:
        self.devices: set[int] = set()  # on which this thread has a CUDA context


_thread = _Thread()


def make(recording: Recording, outputs: Sequence[Tensor], about: Any) -> Plan | str:
    """The plan of a recorded call, or why there can be none.

    Args:
        outputs: its results, which it has to have allocated, one tensor each.
        about: see :class:`Plan`.
    """
    if recording.obstacle is not None:
        return f"it runs {recording.obstacle}"
    made = [recording.places.get(id(x)) for x in outputs]
    numbers = [place.source for place in made if place is not None and recording.sources[place.source].allocated]
    if len(set(numbers)) != len(outputs) or not all(_is_whole(x) for x in outputs):
        return "a result is no tensor of its own"
    try:
        leaves = [_leaves_of(action, recording) for action in recording.actions]
    except LookupError as unknown:
        return f"a launch takes memory that is neither an input nor allocated by the call: {unknown}"
    sources = recording.sources
    inputs = [i for i, source in enumerate(sources) if not (source.allocated or source.constant)]
    constants = [i for i, source in enumerate(sources) if source.constant]
    arranged, size = _arrange(recording, leaves, numbers)
    fixed = [*inputs, *constants, *numbers]
    places = {source: Place(new, 0) for new, source in enumerate(fixed)}
    first = len(inputs) + len(constants)  # of the results, behind which the workspaces' own memory comes
    places |= {source: Place(first + shelf, offset) for source, (shelf, offset) in arranged.items()}

    def moved(place: Place) -> Place:
        new = places[place.source]
        return Place(new.source, new.offset + place.offset)

    actions: list[Launch | tuple[Place, int]] = []
    for action in recording.actions:
        if isinstance(action, Launch):
            actions.append(_changed(action, lambda x: Leaf(moved(recording.places[id(x)]), Layout.of(x))))
        elif action.source in places:
            actions.append((places[action.source], sources[action.source].tensor.untyped_storage().nbytes()))
    launches = [action for action in actions if isinstance(action, Launch)]
    prepared = [direct.Prepared.of(one) for one in launches] if direct.driver() else [None]
    return Plan(
        sources[0].tensor.device, tuple(sources[i].tensor for i in constants),
        tuple(Layout.of(x) for x in outputs), size, tuple(actions), about,
        None if None in prepared else tuple(one for one in prepared if one is not None),
    )  # fmt: skip


def _is_whole(x: Tensor) -> bool:
    """Whether a tensor covers all of its storage."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.untyped_storage().nbytes() == (1 + steps if x.numel() else 0) * x.element_size()


def _leaves_of(action: Launch | Zero, recording: Recording) -> set[int]:
    """The sources that an action uses; a LookupError names a kernel that takes an unknown tensor."""
    if isinstance(action, Zero):
        return {action.source}
    used: set[int] = set()

    def note(x: Tensor) -> Tensor:
        if id(x) not in recording.places:
            raise LookupError(action.kernel.__name__)
        used.add(recording.places[id(x)].source)
        return x

    _changed(action, note)
    return used


def _arrange(
    recording: Recording, used: Sequence[set[int]], outputs: Sequence[int]
) -> tuple[dict[int, tuple[int, int]], int]:
    """Where the workspaces lie, and the bytes of the memory that is theirs alone.

    Those never in use at once may share a place; one that is done with before a result is written lies in the result.

    Returns:
        by source: number of the result, or that of results for their own memory; and the offset.
    """
    spans: dict[int, tuple[int, int]] = {}  # first and last action that uses each
    for step, numbers in enumerate(used):
        for number in numbers:
            spans[number] = (spans.get(number, (step, step))[0], step)
    sizes = {n: recording.sources[n].tensor.untyped_storage().nbytes() for n in {*spans, *outputs}}
    shelves: list[dict[int, int]] = [{} for _ in [*outputs, None]]  # offsets, in each result and in the memory
    spaces = [(spans.get(n, (0, 0))[0], sizes[n]) for n in outputs] + [(len(used), sum(sizes.values()) * 2)]
    places: dict[int, tuple[int, int]] = {}
    work = [n for n in spans if recording.sources[n].allocated and n not in outputs]
    for number in sorted(work, key=lambda number: -sizes[number]):
        for place, (shelf, (begun, space)) in enumerate(zip(shelves, spaces, strict=True)):
            offset = _gap(number, shelf, spans, sizes)
            if spans[number][1] < begun and offset + sizes[number] <= space:
                shelf[number], places[number] = offset, (place, offset)
                break
    return places, max([0, *(offset + sizes[number] for number, offset in shelves[-1].items())])


def _gap(number: int, shelf: dict[int, int], spans: dict[int, tuple[int, int]], sizes: dict[int, int]) -> int:
    """The lowest offset at which a workspace overlaps none of those on the shelf that are in use when it is."""
    (first, last), offset = spans[number], 0
    for other in sorted(shelf, key=lambda other: shelf[other]):
        at_once = spans[other][0] <= last and first <= spans[other][1]
        if at_once and offset + sizes[number] > shelf[other]:
            offset = max(offset, -(-(shelf[other] + sizes[other]) // _ALIGNMENT) * _ALIGNMENT)
    return offset


def _changed(launch: Launch, change: Callable[[Any], Any]) -> Launch:
    """A launch with ``change`` of every tensor among its arguments, or what stands for one."""
    options = {name: _mapped(x, change) for name, x in launch.options.items()}
    return launch._replace(args=_mapped(launch.args, change), options=options)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (Tensor, Leaf)):
        return change(value)
    if isinstance(value, tuple):
        items = [_mapped(x, change) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if hasattr(value, "block_shape") and hasattr(value, "base"):  # a tensor descriptor
        changed = copy.copy(value)
        changed.base = change(value.base)
        return changed
    if hasattr(value, "data_ptr"):
        raise LookupError(type(value).__name__)
    return value


def _tensor_at(leaf: Leaf, sources: Sequence[Tensor | None]) -> Tensor:
    """The tensor that stands at a place."""
    (number, offset), (shape, strides, dtype) = leaf
    source = sources[number]
    assert source is not None
    storage = source.untyped_storage()
    start = source.storage_offset() * source.element_size() + offset
    empty = torch.empty(0, dtype=dtype, device=source.device)
    return empty.set_(storage, start // empty.element_size(), shape, strides)
