"""Backends, registered by name: one file for each way of computing a masked attention."""

from . import cpu, flash, flashinfer, flex, reference, sage, sdpa, triton
from .base import Backend, get, names, register

__all__ = [
    "Backend",
    "cpu",
    "flash",
    "flashinfer",
    "flex",
    "get",
    "names",
    "reference",
    "register",
    "sage",
    "sdpa",
    "triton",
]
