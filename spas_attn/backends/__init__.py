"""Backends, registered by name: one file for each way of computing a masked attention."""

from . import cpu, cudnn, flash, flashinfer, flex, reference, sage, sdpa, triton
from .base import Backend, get, names, register

__all__ = [
    "Backend",
    "cpu",
    "cudnn",
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
