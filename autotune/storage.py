"""Files that appear whole or not at all and are checked when they are read, and digests of contents."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import io
import os
import pickle
import time
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

_STALE = 3600  # seconds after which a temporary file is taken for one of a process that was killed
_PLAIN = (str, bytes, int, float, complex, type(None), Enum, torch.dtype, torch.device, torch.Size)
# What torch.load raises on damaged and foreign files.
_UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, LookupError, OSError,
    AttributeError, TypeError, NotImplementedError,
)  # fmt: skip


def write(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save``, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(buffer.getbuffer(), path)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text in UTF-8, atomically."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes | memoryview, path: str | os.PathLike[str]) -> None:
    """Write to a temporary name beside ``path``, then move into place; an OSError names the path and the reason."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_temporaries(target, _STALE)
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def clear_temporaries(path: Path, age: float = 0.0) -> None:
    """Delete what processes that were killed left behind while writing ``path``, of at least so many seconds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime >= age:
                left.unlink(missing_ok=True)


def read(path: Path) -> Any:
    """``torch.load`` of tensors and plain values only, its checksums verified.

    Raises:
        ValueError: when that fails; the message says why.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message advises to load without weights_only
        raise ValueError("it holds other things than tensors and plain values") from error
    except _UNREADABLE as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0][:200]) from error


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):  # torch before 1.6 wrote none; torch.load rejects what is foreign
        return
    with zipfile.ZipFile(path) as archive:
        size, held = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
        if size > held:  # torch compresses nothing
            raise ValueError(f"its directory promises {size} bytes, more than the {held} of the file")
        if any(entry.external_attr & 0x10 for entry in archive.infolist()):  # torch's reader would read nothing then
            raise ValueError("one of its entries is marked as a folder")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its entry {damaged!r} is wrong")


def digest(item: Any) -> str:
    """A short name for some content, the same in every process.

    Raises:
        ValueError: for objects whose content this function does not know how to read.
    """
    try:
        return f"{type(item).__name__} {hashlib.sha256(_content(item)).hexdigest()}"
    except RecursionError as error:
        raise ValueError(f"a {type(item).__name__} that refers to itself cannot be told from another") from error


def _content(item: Any) -> bytes:
    if isinstance(item, Tensor) and item.layout is torch.strided and not item.is_quantized:
        data = item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{item.dtype} {list(item.shape)} ".encode() + data
    if isinstance(item, _PLAIN):
        return repr(item).encode()
    if isinstance(item, PurePath):  # a file is what it holds, wherever it stands
        return Path(item).read_bytes() if Path(item).is_file() else str(item).encode()
    if isinstance(item, Mapping):  # also what tokenizers return
        return repr([(digest(key), digest(value)) for key, value in item.items()]).encode()
    if isinstance(item, (list, tuple)):
        return repr([digest(value) for value in item]).encode()
    if isinstance(item, (set, frozenset)):
        return repr(sorted(digest(value) for value in item)).encode()
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return digest({f.name: getattr(item, f.name) for f in dataclasses.fields(item)}).encode()
    if hasattr(item, "tobytes") and str(getattr(item, "dtype", "")) != "object":  # arrays and pictures
        facts = [getattr(item, name, None) for name in ("dtype", "shape", "size", "mode")]
        return repr(facts).encode() + item.tobytes()
    if not callable(item) and not hasattr(item, "__next__") and getattr(item, "__dict__", None):
        return digest(vars(item)).encode()
    raise ValueError(f"a {type(item).__name__} cannot be told from another by its content")
