"""Checkpoints of the curve pass: an interrupted calibration goes on with the first unfinished prompt.

Every rank writes a file of its own, ``<name>.rank<n>``, after each of its prompts.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .accumulate import Tally
from .module import transformers_of
from .storage import digest, read, write

Saved = list[tuple[Tally | None, tuple[int, int] | None]]  # curves and lengths, layer by layer
_SAMPLE = 64  # values of each parameter that tell one model from another


class Checkpoint:
    """The files of one calibration.

    Args:
        path: their common name.
        facts: everything the curves depend on; files made under other facts are rejected.
    """

    def __init__(self, path: str | os.PathLike[str], facts: Any) -> None:
        self.path = Path(path)
        self.fingerprint = digest(facts)

    def file(self, rank: int) -> Path:
        """The file of one rank."""
        return self.path.with_name(f"{self.path.name}.rank{rank}")

    def save(self, rank: int, layers: Saved) -> None:
        """Write one rank's file."""
        plain = [(None if tally is None else dict(vars(tally)), lengths) for tally, lengths in layers]
        write({"fingerprint": self.fingerprint, "layers": plain, "digest": digest(plain)}, self.file(rank))

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
        damaged = f"checkpoint {str(path)!r} is damaged: delete it or run without resume"
        try:
            content = read(path)
        except ValueError as error:
            raise ValueError(f"{damaged} ({error})") from error
        if not isinstance(content, dict) or not {"fingerprint", "layers", "digest"} <= content.keys():
            raise ValueError(f"{str(path)!r} is not a checkpoint of a calibration")
        if content["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another calibration (other model, prompts, selector, grid or "
                "seed): delete it or run without resume"
            )
        if content["digest"] != digest(content["layers"]):
            raise ValueError(damaged)
        return [(None if plain is None else _tally(plain), lengths) for plain, lengths in content["layers"]]

    def remove(self, *, but: Path | None = None) -> None:
        """Delete the files of all ranks, except one, and what killed processes left of them."""
        for path in self._files():
            if path != but:
                path.unlink(missing_ok=True)
        for path in self.path.parent.glob(f".{glob.escape(self.path.name)}.rank*.tmp"):
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.path.parent.glob(glob.escape(self.path.name) + ".rank*"))


def _tally(plain: dict[str, Any]) -> Tally:
    tally = Tally(plain["heads"], plain["candidates"])
    for name, value in plain.items():
        setattr(tally, name, value)
    return tally


def identity(model: Any) -> list[Any]:
    """Tells one model from another of the same class: some values of every parameter and buffer, and their shapes."""
    return [(type(part).__name__, [_sample(x) for x in _tensors(part)]) for _, part in transformers_of(model)]


def _tensors(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]


def _sample(x: Tensor) -> tuple[str, list[int], Tensor | None]:
    if x.device.type == "meta":  # offloaded
        return str(x.dtype), list(x.shape), None
    flat = x.detach().reshape(-1)
    return str(x.dtype), list(x.shape), flat[:: max(1, len(flat) // _SAMPLE)].clone()
