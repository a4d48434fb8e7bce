"""What loading a language model and loading a pipeline share: devices, dtypes, and where a model may come from."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, by default the GPU if there is one; a ValueError when it cannot be used."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is none of DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def check_source(name: str, what: str, index: str, owner: bool) -> None:
    """Refuse a name that can be neither a folder with ``what`` nor one on the hub; a ValueError says why.

    Args:
        name: a folder, or a name on the hub.
        what: what is to be loaded, for the message.
        index: the file that a folder of it holds.
        owner: names on the hub always have an owner ("owner/name").
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / index).is_file():
            raise ValueError(f"no {what} in folder {name!r}: it holds no {index}")
    elif folder.is_absolute() or name.startswith((".", "~")) or not owner <= name.count("/") <= 1:
        raise ValueError(f"no folder {name!r}, and it cannot be a name on the hub")
