"""What the tuning scripts' command lines share: help texts, types of arguments, and one process per GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The examples as they are written, and the default of every option that has a short one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        hidden = default is None or default is False or default == [] or "\n" in str(default)
        return action.help if hidden else super()._get_help_string(action)


def tail_bound(text: str) -> float | None:
    """The type of a --tail argument: a number, or "none" for off."""
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or 'none', got {text!r}") from None


def sparse_backend(device: torch.device | str) -> str:
    """The sparse kernels of a device, for scripts that measure quality: "auto" runs dense where that is faster."""
    return {"cuda": "triton", "cpu": "cpu"}[torch.device(device).type]


def run_parallel(script: str, arguments: Sequence[str]) -> int:
    """Start a script in one process per GPU (two on a processor) with torchrun and wait; returns the exit code."""
    count = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.run([*command, script, *arguments], env=environment).returncode


def join_ranks() -> str:
    """Join the other processes that torchrun started; returns this one's device."""
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return device
