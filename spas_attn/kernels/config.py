"""Which tile sizes, warps and pipeline stages a forward launch uses: a table, and what shared memory allows.

Kernels are not autotuned: a choice that depends on shapes and hardware alone is reproducible, costs no first call, and
works under Triton's interpreter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

INTERPRETER_SHARED_MEMORY = 1 << 30  # Triton's interpreter has no such limit
_DEFAULT_SHARED_MEMORY = 101_376  # RTX 30 and 40 series; what is assumed when the driver does not tell
_RESERVED = 2048  # scratch of reductions and barriers


@dataclass(frozen=True)
class Config:
    """One launch configuration.

    Attributes:
        block_m, block_n: query rows and keys of a kernel tile.
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_memory(self, kind: str, dim: int) -> int:
        """Bytes needed: Q once, K and V for every pipeline stage.

        An upper bound but for ``_RESERVED`` (Triton 3.9, all rows of the table compiled for sm_80, sm_89 and sm_90).
        """
        qk_bytes, v_bytes = _BYTES[kind]
        tile = self.block_n * dim
        return self.block_m * dim * qk_bytes + max(1, self.num_stages) * tile * (qk_bytes + v_bytes)


_BYTES = {"int8": (1, 2), "half": (2, 2), "float": (4, 4)}  # bytes of an element of (Q and K, V)

# Bytes of an element of P where a product of whole mask blocks passes it through shared memory (sm_80, sm_89).
_SCRATCH = {"int8": 2, "half": 0, "float": 4}

# Best first; the first that the mask's blocks and the shared memory allow is taken. "half" follows what FlexAttention
# uses on H100 and A100; "int8" the trials in gpu.md (64 queries x 128 keys; 2 stages leave room for two programs on a
# multiprocessor of an H200). "float" has no matrix unit: larger tiles spill registers. Compiled for sm_90 by Triton 3.6
# and 3.9, the first of each row spills at most 48 bytes. None has been compared with others on a GPU yet.
_TABLE: dict[tuple[str, int], tuple[Config, ...]] = {
    ("half", 64): (Config(128, 128, 8, 3), Config(128, 64, 4, 3), Config(64, 128, 4, 3), Config(64, 64, 4, 3)),
    ("half", 128): (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("half", 256): (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    ("int8", 64): (Config(64, 128, 4, 3), Config(64, 64, 4, 3)),
    ("int8", 128): (Config(64, 128, 4, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    ("int8", 256): (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    ("float", 64): (Config(64, 32, 8, 2),),
    ("float", 128): (Config(32, 32, 8, 1),),
    ("float", 256): (Config(16, 16, 4, 1),),
}


@functools.cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on the device."""
    if device.type != "cuda":
        return INTERPRETER_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", _DEFAULT_SHARED_MEMORY)


def choose(kind: str, dim: int, limit: int, blocks: tuple[int, int] | None = None) -> Config:
    """The configuration of a launch without PV skip.

    Args:
        kind: "int8", "half" or "float": what Q and K are held in.
        dim: padded head dim, a power of two.
        limit: bytes of shared memory.
        blocks: the mask's block sizes, which tiles have to divide; None without a mask.
    """
    rows = _TABLE[kind, max(64, dim)]
    for config in rows:
        if blocks is not None and (config.block_m > blocks[0] or config.block_n > blocks[1]):
            continue
        if config.shared_memory(kind, dim) <= limit - _RESERVED:
            return config
    return rows[-1]


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
