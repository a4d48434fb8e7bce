"""Checkpoints of the curve pass: an interrupted calibration goes on with the first unfinished prompt.

Every rank writes a file of its own, ``<name>.rank<n>``, after each of its prompts.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .accumulate import Tally
from .module import sparse_modules
from .passes import CurvePass
from .paths import transformers_of
from .storage import digest, read, write
from .tradeoff import Shape

# Curves, lengths and the shape of the longest call, layer by layer.
Saved = list[tuple[Tally | None, tuple[int, int] | None, Shape | None]]
_SAMPLE = 64  # values of each parameter that tell one model from another


class Checkpoint:
    """The files of one calibration.

    Args:
        path: their common name.
        model, sampled, prompts: everything the curves depend on (``sampled``: what is looked at and tried); files made
            with others are rejected.

    Raises:
        ValueError: when the prompts cannot be told from others.
    """

    def __init__(self, path: str | os.PathLike[str], model: Any, sampled: Any, prompts: Sequence[Any]) -> None:
        self.path = Path(path)
        modules = sparse_modules(model).items()
        selectors = [(name, m.selector.to_dict(), m.text_sink, m.dense_steps) for name, m in modules]
        try:
            self.fingerprint = digest((identity(model), selectors, sampled, prompts))
        except ValueError as error:
            raise ValueError(f"no checkpoint can be kept of these prompts: {error}") from error

    def file(self, rank: int) -> Path:
        """The file of one rank."""
        return self.path.with_name(f"{self.path.name}.rank{rank}")

    def save(self, curves: CurvePass) -> None:
        """Write this rank's file."""
        pairs = zip(curves.sums, curves.work.layers, strict=True)
        plain = [(None if tally is None else dict(vars(tally)), layer.lengths, layer.shape) for tally, layer in pairs]
        write({"fingerprint": self.fingerprint, "layers": plain, "digest": digest(plain)}, self.file(curves.work.rank))

    def begin(self, curves: CurvePass, resume: bool) -> set[int]:
        """Take over the finished prompts of an interrupted run, or drop them; returns their numbers."""
        work, done = curves.work, set[int]()
        for saved in self.load() if resume else []:
            for layer, (tally, lengths, shape) in zip(work.layers, saved, strict=True):
                layer.saw(*(lengths or ()))
                layer.grow(shape)
                if tally is not None:
                    done |= tally.sums.keys()
                    if work.rank == 0:  # the sum over ranks has each prompt once
                        curves.count(layer, tally)
        work.gather(None)  # all have read
        if work.rank == 0:
            if done:
                self.save(curves)
            self.remove(but=self.file(0) if done else None)
        work.gather(None)
        return done

    def load(self) -> list[Saved]:
        """What the files of all ranks hold; no two of them share a prompt.

        Raises:
            ValueError: when a file is damaged or belongs to another calibration.
        """
        found: list[tuple[set[int], Saved]] = []
        for path in self._files():
            layers = self._load(path)
            prompts = {prompt for tally, *_ in layers if tally is not None for prompt in tally.sums}
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
        return [(None if plain is None else _tally(plain), *seen) for plain, *seen in content["layers"]]

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
    parts = [part for _, part in transformers_of(model)]
    return [(type(part).__name__, [_sample(x) for x in (*part.parameters(), *part.buffers())]) for part in parts]


def _sample(x: Tensor) -> tuple[str, list[int], Tensor | None]:
    if x.device.type == "meta":  # offloaded
        return str(x.dtype), list(x.shape), None
    flat = x.detach().reshape(-1)
    return str(x.dtype), list(x.shape), flat[:: max(1, len(flat) // _SAMPLE)].clone()
