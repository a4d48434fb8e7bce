"""Every launch of a kernel goes through here, so that a call can be recorded and its launches repeated.

A launch through Triton binds, checks and specialises all arguments again: 22 to 76 µs each on an H100's host, of which
the launch itself is 3 (docs/benchmarks/notes.md). What was launched can be noted with :func:`noting`, per thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple


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
    options: dict[str, Any]
    compiled: Any


class _Noted(threading.local):
    launches: list[Launch] | None = None


_noted = _Noted()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``."""
    compiled = kernel[grid](*args, **options)
    if _noted.launches is not None:
        _noted.launches.append(Launch(kernel, grid, args, options, compiled))


@contextlib.contextmanager
def noting() -> Iterator[list[Launch]]:
    """Note the launches of this thread, in their order."""
    launches: list[Launch] = []
    before, _noted.launches = _noted.launches, launches
    try:
        yield launches
    finally:
        _noted.launches = before
