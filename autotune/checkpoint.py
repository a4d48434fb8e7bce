"""Checkpoints of the curve pass: an interrupted calibration goes on with the first unfinished prompt.

Every rank writes a file of its own, ``<name>.rank<n>``, after each of its prompts.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from .curves import Tally
from .module import transformers_of
from .state_dict import read, write_atomically

Saved = list[tuple[Tally | None, tuple[int, int] | None]]  # curves and lengths, layer by layer


class Checkpoint:
    """The files of one calibration.

    Args:
        path: their common name.
        facts: everything the curves depend on; files made under other facts are refused.
    """

    def __init__(self, path: str | os.PathLike[str], facts: Any) -> None:
        self.path = Path(path)
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()

    def file(self, rank: int) -> Path:
        """The file of one rank."""
        return self.path.with_name(f"{self.path.name}.rank{rank}")

    def save(self, rank: int, layers: Saved) -> None:
        """Write one rank's file."""
        plain = [(None if tally is None else dict(vars(tally)), lengths) for tally, lengths in layers]
        write_atomically({"fingerprint": self.fingerprint, "layers": plain}, self.file(rank))

    def load(self) -> list[Saved]:
        """What the files of all ranks hold; no two of them share a prompt.

        Raises:
            ValueError: when a file is damaged or belongs to another calibration.
        """
        found: list[tuple[set[int], Saved]] = []
        for path in self._files():
            layers = self._load(path)
            prompts = {prompt for tally, _ in layers if tally is not None for prompt in tally.sums}
            found.append((prompts, layers))
        found.sort(key=lambda pair: -len(pair[0]))
        known: set[int] = set()
        kept = []
        for prompts, layers in found:
            # Rank 0 takes over the files of all ranks on resume; killed before it removes them, it leaves copies.
            if prompts <= known:
                continue
            if prompts & known:
                raise ValueError(f"the checkpoints {str(self.path)!r} count prompts {sorted(prompts & known)} twice")
            known |= prompts
            kept.append(layers)
        return kept

    def _load(self, path: Path) -> Saved:
        try:
            content = read(path)
        except ValueError as error:
            raise ValueError(
                f"checkpoint {str(path)!r} is damaged: delete it or run without resume ({error})"
            ) from error
        if not isinstance(content, dict) or not {"fingerprint", "layers"} <= content.keys():
            raise ValueError(f"{str(path)!r} is not a checkpoint of a calibration")
        if content["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another calibration (other model, prompts, selector, grid or "
                "seed): delete it or run without resume"
            )
        return [(None if plain is None else _tally(plain), lengths) for plain, lengths in content["layers"]]

    def remove(self, *, but: Path | None = None) -> None:
        """Delete the files of all ranks, except one."""
        for path in self._files():
            if path != but:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.path.parent.glob(glob.escape(self.path.name) + ".rank*"))


def _tally(plain: dict[str, Any]) -> Tally:
    tally = Tally(plain["heads"], plain["candidates"])
    for name, value in plain.items():
        setattr(tally, name, value)
    return tally


def identity(model: Any) -> str:
    """Tells one model from another of the same class: the beginning of its first and last parameter."""
    found = []
    for _, part in transformers_of(model):
        parameters = [parameter for parameter in part.parameters() if parameter.device.type != "meta"]
        ends = [parameter.detach().reshape(-1)[:256] for parameter in (*parameters[:1], *parameters[-1:])]
        found.append(type(part).__name__ + digest(ends))
    return "".join(found)


def digest(item: Any) -> str:
    """A short name for a prompt's content, the same in every process."""
    if isinstance(item, Tensor):
        data = item.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes()
        return f"{item.dtype}{list(item.shape)}{hashlib.sha256(data).hexdigest()}"
    if isinstance(item, Mapping):  # also what tokenizers return
        return repr([(key, digest(value)) for key, value in item.items()])
    if isinstance(item, (list, tuple)):
        return repr([digest(value) for value in item])
    if isinstance(item, (str, bytes, int, float, type(None))):
        return repr(item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return type(item).__name__ + digest({f.name: getattr(item, f.name) for f in dataclasses.fields(item)})
    if hasattr(item, "tobytes"):  # arrays and pictures
        return type(item).__name__ + hashlib.sha256(item.tobytes()).hexdigest()
    return type(item).__name__
