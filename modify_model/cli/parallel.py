"""One process per GPU, and exit codes: how a command line runs once its arguments are checked."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from .arguments import USER_ERROR, one_line


def guarded(name: str, work: Callable[[], int], hint: Callable[[], str] = lambda: "") -> int:
    """Run a command of that name; what the user can mend is told in one line, with a hint after an interruption.

    Returns the exit code: of ``work``, 2 for errors of the user, 130 after an interruption.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
            return work()
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"{name}: error: {one_line(error, 2000)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"\ninterrupted{hint()}", file=sys.stderr)
        return 130


def is_child() -> bool:
    """Whether this process is one of those that :func:`run_parallel` started."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run_parallel(program: Sequence[str], arguments: Sequence[str]) -> int:
    """Run a program (a script, or "--module" and a name) in one process per GPU (two on a CPU); its exit code."""
    count = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    command = [sys.executable, "-m", "modify_model.cli.parallel", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.run([*command, *program, *arguments], env=environment).returncode


def join_ranks() -> str:
    """Join the other processes that torchrun started; returns this one's device."""
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return device


def _how(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"with exit code {code}"


def launch(arguments: Sequence[str]) -> int:
    """torchrun, with the exit code of the process that failed first; torchrun's own is always 1, after a traceback."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code != USER_ERROR:  # else the process has said what is wrong
            print(
                f"{error}\nrank {rank} ended first, {_how(code)}; a calibration goes on with --resume", file=sys.stderr
            )
        return code if code > 0 else 1  # killed by a signal: below 0
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
