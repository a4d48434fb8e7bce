"""How much memory there is, and whether an error says that there was too little."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch

_CPU_ERRORS = ("out of memory", "can't allocate memory", "not enough memory")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; ``sys.maxsize`` where that cannot be told.

    CUDA: what the driver has free and what PyTorch holds unused, within ``set_per_process_memory_fraction``. MPS: what
    is left of the recommended maximum. CPU: what the kernel calls available, within the control group's limit.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        used = torch.cuda.memory_allocated(device)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        return max(0, min(free + held, int(total * share)) - used)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return _free_on_cpu() if device.type == "cpu" else sys.maxsize


def _free_on_cpu() -> int:
    free = sys.maxsize
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, max(0, int(limit) - int((_CGROUP / "memory.current").read_text())))
    except (OSError, ValueError):
        pass  # no control group of version 2
    return free


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; CUDA has a class for it, MPS and CPU only a text."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _CPU_ERRORS)


def release(device: torch.device) -> None:
    """Give unused memory back, after an allocation failed."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
