"""What command lines share: types of arguments, and checks of names, paths and devices before anything is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
USER_ERROR = 2  # the exit code when an argument, a model or a file cannot be used


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The examples as they are written, and the default of every option that has a short one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        hidden = default in (None, False, ...) or default == [] or "\n" in str(default)
        return action.help if hidden else super()._get_help_string(action)


def whole(least: int, most: int = 1_000_000) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least ``least`` and at most ``most``."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {number}")
        return number

    return read


def tail_bound(text: str) -> float | None:
    """The type of a --tail argument: a number, or "none" for off."""
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or 'none', got {text!r}") from None


def layer_range(text: str) -> tuple[int, int]:
    """The type of a --layer_range argument: "16,32" is layers 16 to 31."""
    try:
        start, stop = (int(part) for part in text.split(","))
    except ValueError:
        start = stop = -1
    if not 0 <= start < stop:
        raise argparse.ArgumentTypeError(f"expected start,stop such as 16,32, got {text!r}")
    return start, stop


def check_output(option: str, text: str, *, folder: bool = False) -> None:
    """Reject, before any work, a path that cannot be written; a ValueError says why."""
    reason = _obstacle(text, folder)
    if reason is not None:
        kind = "folder" if folder else "file"
        raise ValueError(f"--{option} must name a {kind} that can be written, got {text!r}: {reason}")


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


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, by default the GPU if there is one; a ValueError when it cannot be used."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        float(torch.zeros(1, device=found))  # "meta" has no values
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {str(device)!r} cannot be used: {one_line(error, 120)}") from error
    return found


def as_dtype(dtype: str | torch.dtype, device: torch.device, usual: torch.dtype | str) -> torch.dtype | str:
    """The dtype of a name of DTYPES; "auto" is ``usual``, and float32 on a CPU, where half precision is slow."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else usual
    return getattr(torch, dtype)


def sparse_backend(device: torch.device | str) -> str:
    """The sparse kernels of a device, for scripts that measure quality: "auto" runs dense where that is faster."""
    return {"cuda": "triton", "cpu": "cpu"}[torch.device(device).type]


def unreadable() -> tuple[type[Exception], ...]:
    """What the loaders of transformers and diffusers raise on models that are missing, damaged or foreign."""
    from safetensors import SafetensorError

    return OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError


def one_line(error: Exception, length: int = 400) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())[:length] or type(error).__name__
