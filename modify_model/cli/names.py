"""What a --model_name stands for: a language model or a diffusion pipeline, in a folder, a file, the hub, or tiny."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .arguments import one_line
from .tiny import LLAMA, PREFIX, TINY

LANGUAGE, DIFFUSION = "language model", "diffusion pipeline"


def kind_of(name: str, wanted: str | None = None) -> str:
    """LANGUAGE or DIFFUSION. If one of them is ``wanted``, a name on the hub is taken for it, without a look there.

    Raises:
        ValueError: when the name can be neither, or is not the one wanted; the message says why.
    """
    kind = _local_kind(name) or wanted or _hub_kind(name)
    if wanted not in (None, kind):
        raise ValueError(f"{name!r} is a {kind}, and this script runs a {wanted}")
    return kind


def _local_kind(name: str) -> str | None:
    """The kind of a folder, a file or a tiny model; None for what may be on the hub."""
    path = Path(name)
    if name.startswith(PREFIX):
        if name.removeprefix(PREFIX) not in (LLAMA, *TINY):
            raise ValueError(f"tiny models are {', '.join(PREFIX + known for known in (LLAMA, *TINY))}, got {name!r}")
        return LANGUAGE if name == PREFIX + LLAMA else DIFFUSION
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no file {name!r}")
        if importlib.util.find_spec("gguf") is None:
            raise ValueError("reading a .gguf file needs a package: pip install gguf")
        return LANGUAGE
    if path.is_dir():
        for index, kind in (("model_index.json", DIFFUSION), ("config.json", LANGUAGE)):
            if (path / index).is_file():
                return kind
        raise ValueError(f"no model in folder {name!r}: it holds neither config.json nor model_index.json")
    if not name or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"no folder {name!r}, and it cannot be a name on the hub")
    return None


def _hub_kind(name: str) -> str:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):  # pipelines have none; works offline
        return LANGUAGE
    try:
        hf_hub_download(name, "model_index.json")
    except LocalEntryNotFoundError as error:
        raise ValueError(f"cannot look up {name!r} on the hub: {one_line(error)}") from error
    except EntryNotFoundError:
        return LANGUAGE
    except (OSError, ValueError) as error:
        raise ValueError(f"no folder {name!r}, and no such model on the hub: {one_line(error)}") from error
    return DIFFUSION
