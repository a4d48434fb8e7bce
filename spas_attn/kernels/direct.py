"""Launches of compiled kernels straight through the CUDA driver, with parameters that were laid out before.

Triton's own launchers differ from version to version and bind every argument again. What a compiled kernel takes does
not: the arguments that are no constants, in their order, then pointers to scratch memory. That is checked against the
kernel's PTX, so that a version of Triton that does otherwise is served through its own launcher (``Prepared.of`` gives
None). Tested with Triton 3.6 and 3.9.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .recorded import Launch

_MAP = 128  # bytes of a CUtensorMap, which has to lie at a multiple of 64
_CELL = 8  # bytes of the memory that one other parameter lies in
_FORMATS = {
    "i1": "<?", "u1": "<?", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q",
    "u64": "<Q", "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip
# The driver numbers the types of tensor maps otherwise than Triton's metadata (bf16, fp32, fp64).
_MAP_TYPES = {8: 10, 9: 8, 10: 9}
_PTX_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[busf](\d+)\s[^,\[]*(?:\[(\d+)\])?")


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *[(f"grid_{axis}", ctypes.c_uint) for axis in "xyz"],
        *[(f"block_{axis}", ctypes.c_uint) for axis in "xyz"],
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("number", ctypes.c_uint),
    ]


class Driver:
    """The functions of libcuda that are called here; every one raises a RuntimeError when it fails."""

    def __init__(self, library: Any) -> None:
        self._library = library
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self.launch: Callable[..., int] = self._function("cuLaunchKernelEx", pointer, pointer, pointer, pointer)
        self.replace_address = self._function("cuTensorMapReplaceAddress", pointer, pointer)
        self.clear = self._function("cuMemsetD8Async", pointer, ctypes.c_ubyte, ctypes.c_size_t, pointer)
        self._encode = self._function(
            "cuTensorMapEncodeTiled", pointer, ctypes.c_int, number, pointer, pointer, pointer, pointer, pointer,
            ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
        )  # fmt: skip
        self._current = self._function("cuCtxGetCurrent", pointer)
        self._set_current = self._function("cuCtxSetCurrent", pointer)
        self._retain = self._function("cuDevicePrimaryCtxRetain", pointer, ctypes.c_int)

    def _function(self, name: str, *arguments: Any) -> Callable[..., int]:
        function = getattr(self._library, name)
        function.argtypes, function.restype = list(arguments), ctypes.c_int
        return function

    def check(self, code: int) -> None:
        """A RuntimeError for a code that is no success."""
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {code}: {(text.value or b'unknown').decode()}")

    def ensure_context(self, index: int) -> None:
        """Give a thread that has no CUDA context yet the one that torch uses on the GPU ``index``."""
        context = ctypes.c_void_p()
        self.check(self._current(ctypes.byref(context)))
        if context.value is None:
            self.check(self._retain(ctypes.byref(context), index))
            self.check(self._set_current(context))

    def encode(self, at: int, pointer: int, descriptor: Any, meta: dict[str, Any]) -> None:
        """Write the tensor map of one of Triton's host-side descriptors to the address ``at``."""
        shape, strides, box = list(descriptor.shape), list(descriptor.strides), list(meta["block_size"])
        rank, size = len(shape), meta["elem_size"]
        kind = _MAP_TYPES.get(meta["elem_type"], meta["elem_type"])
        sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
        steps = (ctypes.c_uint64 * rank)(*[size * s for s in reversed(strides[:-1])])  # the innermost one is 1
        boxes, ones = (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank)
        nan = int(getattr(descriptor, "padding", "zero") == "nan")
        # No interleaving, and second-level cache lines of 128 bytes (2), as Triton has them.
        self.check(self._encode(at, kind, rank, pointer, sizes, steps, boxes, ones, 0, meta["swizzle"], 2, nan))


@functools.cache
def driver() -> Driver | None:
    """The driver of this machine, None where there is none that has all functions."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError):
        return None


class Pointer(NamedTuple):
    """A tensor among the parameters, or what stands for one."""

    tensor: Any


class Map(NamedTuple):
    """A tensor descriptor among the parameters, and what the kernel was compiled for."""

    descriptor: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A launch as the driver takes it.

    Attributes:
        function: the CUfunction.
        grid: three numbers of programs; threads: of one program; shared: its bytes of shared memory.
        parameters: in the kernel's order; numbers are packed already.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: tuple[bytes | Pointer | Map, ...]

    @classmethod
    def of(cls, launch: Launch) -> Prepared | None:
        """None for a launch that needs more than this file does, or of a Triton whose objects are not those known."""
        if launch.compiled is None:
            return None
        try:
            return cls._of(launch)
        except (AttributeError, LookupError, TypeError, struct.error):
            return None

    @classmethod
    def _of(cls, launch: Launch) -> Prepared | None:
        compiled, facts = launch.compiled, launch.compiled.metadata
        if getattr(facts, "num_ctas", 1) != 1 or any(getattr(facts, name, 0) for name in _UNSERVED):
            return None
        parameters = _parameters(launch, list(getattr(facts, "tensordesc_meta", None) or []))
        sizes = _ptx_sizes(compiled.asm["ptx"])
        if parameters is None or not _agree([_size(x) for x in parameters], sizes):
            return None
        scratch = (bytes(_CELL),) * (len(sizes) - len(parameters))
        grid = (*launch.grid, 1, 1)[:3]
        return cls(compiled.function, grid, 32 * facts.num_warps, facts.shared, (*parameters, *scratch))  # type: ignore[arg-type]


_UNSERVED = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")


def _parameters(launch: Launch, metas: list[dict[str, Any]]) -> list[bytes | Pointer | Map] | None:
    found: list[bytes | Pointer | Map] = []

    def add(kind: Any, value: Any) -> bool:
        """Append one argument of this type of the signature; False where it is not understood."""
        if isinstance(kind, tuple):
            return len(kind) == len(value) and all(add(k, x) for k, x in zip(kind, value, strict=True))
        if kind == "constexpr":
            return True
        if kind.startswith("tensordesc"):
            meta = metas.pop(0) if metas else None
            if meta is None or meta.get("is_im2col") or meta["fp4_padded"] or getattr(value, "round_f32_to_tf32", 0):
                return False
            found.append(Map(value, meta))
            found.extend(struct.pack("<i", x) for x in value.shape)
            found.extend(struct.pack("<q", x) for x in value.strides)
            return True
        if kind.startswith("*"):
            found.append(Pointer(value))
            return True
        if kind in _FORMATS:
            found.append(struct.pack(_FORMATS[kind], value))
        return kind in _FORMATS

    kinds = launch.compiled.src.signature
    bound = launch.kernel.signature.bind(
        *launch.args, **{name: x for name, x in launch.options.items() if name in launch.kernel.signature.parameters}
    )
    bound.apply_defaults()
    if list(kinds) != list(bound.arguments):
        return None
    return found if all(add(kind, bound.arguments[name]) for name, kind in kinds.items()) else None


def _size(parameter: bytes | Pointer | Map) -> int:
    return len(parameter) if isinstance(parameter, bytes) else _MAP if isinstance(parameter, Map) else _CELL


def _ptx_sizes(ptx: str) -> list[int]:
    """Bytes of the parameters of the (only) kernel."""
    entry = re.search(r"\.entry\s+[\w$]+\s*\((.*?)\)\s*[\n{.]", ptx, re.DOTALL)
    found = _PTX_PARAMETER.findall(entry.group(1)) if entry else []
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def _agree(ours: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether a kernel takes these parameters and at most two pointers to scratch memory behind them."""
    behind = list(kernel[len(ours) :])
    return list(kernel[: len(ours)]) == list(ours) and len(behind) <= 2 and all(size == _CELL for size in behind)


class Parameters:
    """Memory that holds the parameters of several launches; one thread at a time uses it.

    Args:
        prepared: the launches.
        place: the source of the memory of a tensor, and the offset in bytes from its start.
    """

    def __init__(self, cuda: Driver, prepared: Sequence[Prepared], place: Callable[[Any], tuple[int, int]]) -> None:
        self._cuda, self._stream = cuda, 0
        every = [x for one in prepared for x in one.parameters]
        maps = sum(isinstance(x, Map) for x in every)
        self._memory = ctypes.create_string_buffer(_MAP * (maps + 1) + _CELL * len(every))
        at_map = -(-ctypes.addressof(self._memory) // _MAP) * _MAP
        at_cell = first_cell = at_map + _MAP * maps
        self._cells = (ctypes.c_uint64 * len(every)).from_address(first_cell)
        self._pointers: dict[int, int] = {}
        self._patches: dict[int, list[tuple[int, int]]] = {}  # by source: cell, offset
        self._maps: dict[int, list[tuple[int, int]]] = {}  # by source: address of the map, offset
        self._unmapped: dict[int, tuple[int, Map]] = {}  # maps that no address was put into yet: offset, map
        self._arrays, self._configs = [], []
        for one in prepared:
            addresses = []
            for parameter in one.parameters:
                if isinstance(parameter, Map):
                    source, offset = place(parameter.descriptor.base)
                    self._maps.setdefault(source, []).append((at_map, offset))
                    self._unmapped[at_map] = (offset, parameter)
                    addresses.append(at_map)
                    at_map += _MAP
                    continue
                if isinstance(parameter, Pointer):
                    source, offset = place(parameter.tensor)
                    self._patches.setdefault(source, []).append(((at_cell - first_cell) // _CELL, offset))
                else:
                    ctypes.memmove(at_cell, parameter, len(parameter))
                addresses.append(at_cell)
                at_cell += _CELL
            self._arrays.append((ctypes.c_void_p * len(addresses))(*addresses))
            self._configs.append(Config(*one.grid, one.threads, 1, 1, one.shared, None, None, 0))
        self.launches = [
            (ctypes.addressof(config), one.function, ctypes.addressof(array))
            for config, one, array in zip(self._configs, prepared, self._arrays, strict=True)
        ]

    def point(self, addresses: Sequence[int], stream: int) -> None:
        """Set the addresses of all sources, by their number, and the stream; what is as before is left."""
        if stream != self._stream:
            for config in self._configs:
                config.stream = stream
            self._stream = stream
        pointers, cells = self._pointers, self._cells
        for source, address in enumerate(addresses):
            if pointers.get(source) == address:
                continue
            for cell, offset in self._patches.get(source, ()):
                cells[cell] = address + offset
            for at, offset in self._maps.get(source, ()):
                unmapped = self._unmapped.pop(at, None)
                if unmapped is None:
                    self._cuda.check(self._cuda.replace_address(at, address + offset))
                else:
                    self._cuda.encode(at, address + offset, *unmapped[1])
            pointers[source] = address
