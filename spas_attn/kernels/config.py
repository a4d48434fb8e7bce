"""Which tile sizes, warps and pipeline stages a forward launch uses: a table, and what shared memory allows.

Kernels are not autotuned: a choice that depends on shapes and hardware alone is reproducible, costs no first call, and
works under Triton's interpreter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..traced import constant_when_traced

INTERPRETER_SHARED_MEMORY = 1 << 30  # Triton's interpreter has no such limit
_DEFAULT_SHARED_MEMORY = 101_376  # RTX 30 and 40 series; what is assumed when the driver does not tell
_RESERVED = 2048  # scratch of reductions and barriers


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Attributes:
        block_m, block_n: query rows and keys of a kernel tile.
        num_warps, num_stages: Triton's launch options.
        registers: the most a thread may use, so that one program more fits on a multiprocessor; None for no limit.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    def shared_memory(self, kind: str, dim: int) -> int:
        """Bytes needed: Q once, K and V for every pipeline stage.

        An upper bound but for ``_RESERVED`` (Triton 3.6, all rows of the tables compiled for every architecture).
        """
        q_bytes, k_bytes, v_bytes = _BYTES[kind]
        tile = self.block_n * dim
        return self.block_m * dim * q_bytes + max(1, self.num_stages) * tile * (k_bytes + v_bytes)


# What Q and K, and P and V, are held in: "int8" is int8 beside 16 bits, "fp8" int8 beside fp8.
_BYTES = {"fp8": (1, 1, 1), "int8": (1, 1, 2), "half": (2, 2, 2), "float": (4, 4, 4)}

# Bytes of an element of P where a product of whole mask blocks passes it through shared memory (sm_80, sm_89).
_SCRATCH = {"fp8": 1, "int8": 2, "half": 0, "float": 4}

_Table = dict[tuple[str, int], tuple[Config, ...]]

# In each row best first; the first that the mask's blocks and the shared memory allow is taken.
# Measured on an H200 (docs/benchmarks/notes.md). Tiles of 64 queries and 4 warps win because several programs share a
# multiprocessor and one's exponentials run beside another's matrix products; the register limits buy one program more.
_HOPPER: _Table = {
    ("fp8", 64): (Config(64, 128, 4, 4, 128), Config(64, 64, 4, 3)),
    ("fp8", 128): (Config(64, 128, 4, 3, 168), Config(64, 64, 4, 3, 168)),
    ("fp8", 256): (Config(64, 64, 4, 2),),
    ("int8", 64): (Config(64, 128, 4, 3, 128), Config(64, 64, 4, 3)),
    ("int8", 128): (Config(64, 64, 4, 3, 168),),
    ("int8", 256): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("half", 64): (Config(64, 128, 4, 2, 168), Config(64, 64, 4, 3)),
    ("half", 128): (Config(128, 64, 4, 3), Config(64, 64, 4, 3, 168)),
    ("half", 256): (Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
}

# Not measured: compiled by Triton 3.6 for sm_80, 86, 89, 100 and 120, spilling little (most under causality at head dim
# 256, 1.2 KB a thread), within 101,376 bytes (RTX 30 to 50 series) and 166,912 (A100).
_GENERAL: _Table = {
    ("fp8", 64): (Config(64, 64, 4, 3),),
    ("fp8", 128): (Config(64, 128, 8, 2), Config(64, 64, 8, 2)),
    ("fp8", 256): (Config(64, 32, 8, 2),),
    ("int8", 64): (Config(64, 128, 4, 3), Config(64, 64, 4, 3)),
    ("int8", 128): (Config(128, 64, 8, 2), Config(64, 64, 4, 3)),
    ("int8", 256): (Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
    ("half", 64): (Config(128, 128, 8, 3), Config(128, 64, 4, 3), Config(64, 128, 4, 3), Config(64, 64, 4, 3)),
    ("half", 128): (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("half", 256): (Config(64, 32, 8, 2),),
    # No matrix unit computes fp32: larger tiles spill registers.
    ("float", 64): (Config(64, 32, 8, 2),),
    ("float", 128): (Config(32, 32, 8, 1),),
    ("float", 256): (Config(16, 16, 4, 1),),
}
_TABLES = {9: _HOPPER}  # by major compute capability


@constant_when_traced
@functools.cache
def _facts(index: int) -> tuple[int, int, int]:
    """Compute capability of a GPU, and the bytes of shared memory that one program may use."""
    properties = torch.cuda.get_device_properties(index)
    memory = getattr(properties, "shared_memory_per_block_optin", _DEFAULT_SHARED_MEMORY)
    return properties.major, properties.minor, memory


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on the device."""
    return _facts(device.index or 0)[2] if device.type == "cuda" else INTERPRETER_SHARED_MEMORY


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter, which can do everything, counts as Hopper."""
    return _facts(device.index or 0)[:2] if device.type == "cuda" else (9, 0)


def choose(
    kind: str, dim: int, limit: int, blocks: tuple[int, int] | None = None, architecture: tuple[int, int] = (9, 0)
) -> Config:
    """The configuration of a launch without PV skip.

    Args:
        kind: "fp8", "int8", "half" or "float": what Q, K and V are held in.
        dim: padded head dim, a power of two.
        limit: bytes of shared memory.
        blocks: the mask's block sizes, which tiles have to divide; None without a mask.
        architecture: compute capability of the GPU.
    """
    key = kind, max(64, dim)
    rows = _TABLES.get(architecture[0], _GENERAL).get(key, _GENERAL[key])
    for config in rows:
        if blocks is not None and (config.block_m > blocks[0] or config.block_n > blocks[1]):
            continue
        if config.shared_memory(kind, dim) <= limit - _RESERVED:
            return config
    return rows[-1]


def skip_pays(kind: str, dim: int, architecture: tuple[int, int] = (9, 0)) -> bool:
    """Whether PV skip can save time at all: its tiles are whole mask blocks, which may cost more than it saves.

    On Hopper it cost 20 to 75% where nothing was skipped and won little where everything was, save for 16 bits at
    head dim 64 (docs/benchmarks/notes.md). Other architectures were not measured.
    """
    return architecture[0] != 9 or kind == "float" or (kind, max(64, dim)) == ("half", 64)


def choose_whole_blocks(kind: str, dim: int, limit: int, blocks: tuple[int, int]) -> Config | None:
    """The configuration of a launch with PV skip, whose tiles are the mask's blocks; None if that does not fit."""
    if kind == "float" and dim > 128:
        return None  # it would run from spilled registers
    warps = 16 if kind == "float" else 8 if blocks[0] == 128 or dim > 128 else 4
    scratch = blocks[0] * blocks[1] * _SCRATCH[kind]
    for stages in (2, 1):
        config = Config(blocks[0], blocks[1], warps, stages)
        if config.shared_memory(kind, dim) + scratch <= limit - _RESERVED:
            return config
    return None
