"""A number that grows whenever calls may be decided otherwise than before: no kept decision outlives its reasons."""

from __future__ import annotations

_epoch = 0


def advance() -> None:
    """Say that a backend was registered, a table of measurements was changed, or the like."""
    global _epoch
    _epoch += 1


def now() -> int:
    """The number."""
    return _epoch
