"""What a tuned file and its statistics say, in the form in which the page and the summary show it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tradeoff import Tradeoff

Head = dict[str, Any]
Entry = dict[str, Any]
ERRORS = ("mean", "tail")  # of a head: its mean error, and the 99.5th percentile of one query's
_LAYER = ("layer_idx", "path", "mean_sparsity", "heads")
_HEAD = ("head", "is_sparse", "sparsity", "l1_total", "tail_total", "runs_dense_because", "cdfthreshd")


@dataclass(frozen=True)
class Record:
    """A calibration.

    Attributes:
        name: of the tuned file.
        info: its ``"_metadata"``.
        layers: its statistics, one entry per layer.
        tradeoff: of the whole model, None where the file has none.
        retargeted: whether the file's thresholds are others than those of the statistics, chosen afterwards.

    Raises:
        ValueError: when the statistics are none.
    """

    name: str
    info: Mapping[str, Any]
    layers: Sequence[Entry]
    tradeoff: Tradeoff | None = None
    retargeted: bool = False

    def __post_init__(self) -> None:
        try:
            entries = [[entry[name] for name in _LAYER] for entry in self.layers]
            heads = [[head[name] for name in _HEAD] for entry in self.layers for head in entry["heads"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the statistics of {self.name!r} are no statistics of a calibration: {error!r}"
            ) from error
        if not entries or not heads:
            raise ValueError(f"the statistics of {self.name!r} hold no layer")

    @property
    def model(self) -> str:
        """Name of the model, as well as it is known."""
        about = self.info.get("about") or {}
        return about.get("model") or self.info.get("model_class") or "a model"

    @property
    def size(self) -> str:
        """How many layers there are, and phases of denoising."""
        layers = len({entry["path"] for entry in self.layers})
        phases = len(self.layers) // layers
        return count(layers, "layer") + (f" in {phases} phases" if phases > 1 else "")

    @property
    def sparsity(self) -> float:
        """Share of the blocks that are left out, mean over layers."""
        return statistics.fmean(entry["mean_sparsity"] for entry in self.layers)

    def heads(self, *, sparse: bool | None = None) -> Iterator[tuple[Entry, Head]]:
        """All heads with their layers, or only those that are sparse (or not)."""
        for entry in self.layers:
            for head in entry["heads"]:
                if sparse in (None, head["is_sparse"]):
                    yield entry, head

    @property
    def bounded(self) -> bool:
        """Whether there are bounds of errors."""
        return any(bound(entry, kind) for entry in self.layers for kind in ERRORS)

    @property
    def prompts(self) -> tuple[int, int] | None:
        """Numbers of prompts that thresholds were fitted to, and that were kept aside for the check."""
        first = self.layers[0]
        if "prompts_fitted" not in first or "prompts_checked" not in first:
            return None
        return first["prompts_fitted"], 0 if first.get("checked_on_the_fitted_calls") else first["prompts_checked"]

    @property
    def lengths(self) -> tuple[int, int] | None:
        """Fewest and most keys of a call."""
        found = [length for entry in self.layers for length in entry.get("lengths") or ()]
        return (min(found), max(found)) if found else None

    def worst(self, kind: str) -> tuple[float, float | None]:
        """The error nearest to its bound (the largest one where nothing bounds it), and that bound."""
        found = [(head[f"{_field(kind)}_total"], bound(entry, kind)) for entry, head in self.heads(sparse=True)]
        return max(found, key=lambda pair: pair[0] / (pair[1] or 1.0), default=(0.0, bound(self.layers[0], kind)))

    def times_of(self, entry: Entry, kind: str = "measured") -> tuple[float, float] | None:
        """Milliseconds of a layer dense and sparse, "measured" or "expected"; None where that is unknown."""
        measured = (self.info.get("measured_ms") or {}).get(unit(entry["path"], entry.get("phase", 0)))
        found = measured if kind == "measured" else entry.get("expected_ms")
        return None if found is None else (float(found[0]), float(found[1]))

    def times(self, kind: str = "measured") -> tuple[float, float] | None:
        """The same of all layers; None unless known of each."""
        found = [self.times_of(entry, kind) for entry in self.layers]
        if not all(found):
            return None
        return sum(pair[0] for pair in found if pair), sum(pair[1] for pair in found if pair)


def _field(kind: str) -> str:
    return {"mean": "l1", "tail": "tail"}[kind]


def achieved(head: Head, kind: str) -> float:
    """A head's error in the check, of everything together."""
    return float(head[f"{_field(kind)}_total"])


def bound(entry: Entry, kind: str) -> float | None:
    """What bounds the errors of a layer's heads in the check; None: nothing."""
    return entry.get({"mean": "pv_l1", "tail": "tail"}[kind])


def number(entry: Entry) -> str:
    """A layer's number, as people read it: of a second transformer with "2:", with phases with their letters."""
    phase = chr(ord("a") + entry["phase"]) if "phase" in entry else ""
    return f"{'2:' if entry['path'].startswith('transformer_2.') else ''}{entry['layer_idx']}{phase}"


def unit(path: str, phase: int) -> str:
    """What stands for a layer, or for one of its phases after the first, in ``measured_ms`` of a tuned file."""
    return f"{path}#{phase}" if phase else path


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f}%"


def ms(value: float) -> str:
    """Milliseconds."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def count(number: int, what: str) -> str:
    """A number of things: "1 head", "2 heads"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
