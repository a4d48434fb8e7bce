"""Backends, registered by name: one file for each way of computing a masked attention."""

from . import cpu, reference, sage, sdpa, triton
from .base import Backend, Call, get, names, register

__all__ = ["Backend", "Call", "cpu", "get", "names", "reference", "register", "sage", "sdpa", "triton"]
