"""What the tuning scripts' command lines share: help texts, checks of arguments, saving, and one process per GPU."""

from __future__ import annotations

import argparse
import glob
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from autotune.calibration import Calibration
from autotune.report import statistics_path

USER_ERROR = 2  # the exit code when an argument, a model or a file cannot be used


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


def check_output(option: str, text: str, *, folder: bool = False) -> None:
    """Refuse, before any work, a path that cannot be written; a ValueError says why."""
    reason = _obstacle(text, folder)
    if reason is not None:
        kind = "folder" if folder else "file"
        raise ValueError(f"--{option} must name a {kind} that can be written, got {text!r}: {reason}")


def check_tuned_output(text: str) -> None:
    """As :func:`check_output`, for --model_out_path: its statistics are written beside it."""
    check_output("model_out_path", text)
    statistics = str(statistics_path(text))
    reason = _obstacle(statistics, folder=False)
    if reason is not None:
        raise ValueError(f"--model_out_path {text!r}: its statistics go to {statistics!r}, and {reason}")


def _obstacle(text: str, folder: bool) -> str | None:
    """Why a file, or files in a folder, cannot be written there; None when nothing stands in the way."""
    if not text:
        return "that is empty"
    path = Path(text)
    try:
        if not folder and (path.is_dir() or text.endswith("/")):
            return "that is a folder"
        place = path if folder else path.parent
        while not (place.exists() or place.is_symlink()):  # folders that are missing are made
            place = place.parent
        if not place.is_dir():
            return f"{str(place)!r} is no folder"
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return f"{error.strerror}"
    return None if os.access(place, os.W_OK | os.X_OK) else f"the folder {str(place)!r} may not be written to"


def checkpoint_of(tuned: str, resume: bool, say: bool) -> str:
    """Where --tune keeps the finished prompts of a tuned file; with --resume, ``say`` that there are none."""
    partial = Path(tuned + ".partial")
    if say and resume and not any(partial.parent.glob(glob.escape(partial.name) + ".rank*")):
        print(f"nothing to resume at {str(partial) + '.rank*'!r}: the calibration starts anew", flush=True)
    return str(partial)


def save(calibration: Calibration, path: str) -> Path:
    """Save a finished calibration, whose checkpoint outlives a failure; returns the path of the statistics."""
    try:
        return calibration.save(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise ValueError(
            f"cannot write {path!r}: {' '.join(str(error).split())[:400]}; the calibration is kept in "
            f"{path + '.partial.rank*'!r}: clear the way, and the same command with --resume goes on from there"
        ) from error


def sparse_backend(device: torch.device | str) -> str:
    """The sparse kernels of a device, for scripts that measure quality: "auto" runs dense where that is faster."""
    return {"cuda": "triton", "cpu": "cpu"}[torch.device(device).type]


def run_parallel(script: str, arguments: Sequence[str]) -> int:
    """Start a script in one process per GPU (two on a processor) with torchrun and wait; returns the exit code."""
    count = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    command = [sys.executable, __file__, "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.run([*command, script, *arguments], env=environment).returncode


def run_script(
    script: str,
    args: argparse.Namespace,
    given: Sequence[str],
    check: Callable[[], object],
    work: Callable[[bool], None],
    goes_on: bool,
    errors: tuple[type[Exception], ...] = (ValueError, OSError),
) -> int:
    """Run a tuning script after its arguments were read; returns the exit code.

    Args:
        script: its path.
        args, given: the arguments, read and as they came.
        check: refuses with a ValueError, before --parallel_tune starts processes, what each of them would refuse.
        work: does everything in one process, told whether it is one of several.
        goes_on: after --parallel_tune, this process goes on with the tuned file.
        errors: what is the user's to mend, and is told in one line.
    """
    distributed = "RANK" in os.environ
    try:
        if args.parallel_tune and not distributed:
            check()
            code = run_parallel(script, given)
            if code or not goes_on:
                return code
            args.tune = False
        work(distributed)
    except errors as error:
        hint = ": run with --tune first" if str(error).startswith("no tuned file") else ""
        print(f"{Path(script).name}: error: {error}{hint}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on from the last finished sample" if args.tune else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    return 0


def launch(arguments: Sequence[str]) -> int:
    """torchrun, with the exit code of the process that failed first; torchrun's own is always 1, after a traceback."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code != USER_ERROR:  # the process has said what is wrong
            print(error, file=sys.stderr)
        return code if code > 0 else 1  # killed by a signal: below 0
    return 0


def join_ranks() -> str:
    """Join the other processes that torchrun started; returns this one's device."""
    gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return device


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
