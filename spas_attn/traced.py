"""What torch.compile is told about this library, without importing torch._dynamo (924 modules) for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_traced(function: F) -> F:
    """``torch.compiler.assume_constant_result``: torch.compile calls the function once and keeps its result.

    That decorator imports torch._dynamo to set this one attribute.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
