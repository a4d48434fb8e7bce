"""Backends, registered by name: one file for each way of computing a masked attention."""

from . import cpu, flash, flex, reference, sage, sdpa, triton
from .base import Backend, get, names, register

__all__ = ["Backend", "cpu", "flash", "flex", "get", "names", "reference", "register", "sage", "sdpa", "triton"]
