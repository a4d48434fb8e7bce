"""The cost model: times measured per GPU that say which backend is fastest, so that sparse is never slower than dense.

``python -m spas_attn.measure`` measures a GPU and writes such a table. Two are read: the packaged
``cost_model.json``, and the user's own, which wins: the file named by the environment variable
``SPAS_ATTN_COST_MODEL``, else ``~/.cache/spas_attn/cost_model.json`` (``$XDG_CACHE_HOME`` is honoured).

Every time is modelled by one line, in milliseconds:

    base + per_token · tokens + per_pair · pairs

where tokens = B · Hq · (Lq + Lk), in millions, and pairs = B · Hq · Lq · Lk, in thousand millions; a sparse kernel gets
pairs · density. A sparse call costs selection and kernel (quantisation included), a dense one its kernel. Causal and
other calls have lines of their own. The decision looks at shapes and the expected density, never at a call's mask.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import epoch
from .call import Call
from .traced import constant_when_traced

FORMAT = 1
PACKAGED = Path(__file__).with_name("cost_model.json")
ENVIRONMENT = "SPAS_ATTN_COST_MODEL"
# Of a selector that does not know how much it will keep. Low, so that dense wins only where it nearly always does.
ASSUMED_DENSITY = 0.25


@dataclass(frozen=True)
class Line:
    """Milliseconds as a linear function of the work; see the module's text for the units."""

    base: float
    per_token: float
    per_pair: float

    def __call__(self, work: Work, density: float = 1.0) -> float:
        return _ms((self.base, self.per_token, self.per_pair), work, density)


@dataclass(frozen=True)
class Work:
    """How much a call has to do."""

    tokens: float  # millions
    pairs: float  # thousand millions

    @classmethod
    def of(cls, batch_heads: int, q_len: int, k_len: int) -> Work:
        """The work of ``batch_heads`` = B · Hq heads."""
        return cls(batch_heads * (q_len + k_len) * 1e-6, batch_heads * q_len * k_len * 1e-9)


@dataclass(frozen=True)
class Row:
    """What was measured on one GPU for one head dim and size of mask blocks, causal or not.

    Attributes:
        device: the GPU's name; capability: its compute capability.
        head_dim, is_causal: of the calls; blocks: sizes of the mask's blocks, queries and keys.
        dense: lines of exact dense backends by name.
        select: the line of selection (ExactKeys; TopK with pool 16 where ``blocks`` is not in a file).
        sparse: lines of the sparse kernels by "backend/precision", quantisation included.
        measured: date; versions: of torch, triton and so on.
    """

    device: str
    capability: tuple[int, int]
    head_dim: int
    is_causal: bool
    dense: dict[str, Line]
    select: Line
    sparse: dict[str, Line]
    measured: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    blocks: tuple[int, int] = (128, 128)

    def __str__(self) -> str:
        causal = ", causal" if self.is_causal else ""
        blocks = f", blocks {self.blocks[0]} x {self.blocks[1]}"
        when = self.measured or "at an unknown date"
        return f"{self.device}, head dim {self.head_dim}{causal}{blocks}, measured {when}"


@dataclass(frozen=True)
class Prediction:
    """What the table expects of a call.

    Attributes:
        sparse: milliseconds by backend name, selection included when the call selects.
        dense: milliseconds by backend name.
        source: which measurement this is from.
        density: the share of blocks that was assumed, and whether it was known.
    """

    sparse: dict[str, float]
    dense: dict[str, float]
    source: str
    density: float
    known: bool

    def numbers(self) -> str:
        """The expected times, as ``explain`` shows them."""
        if torch.compiler.is_compiling():
            return self.source  # lengths may be symbols, which have no digits to show
        parts = [f"{name} {ms:.2f} ms" for name, ms in self.sparse.items()]
        parts += [f"dense {name} {ms:.2f} ms" for name, ms in self.dense.items()]
        known = "expected density" if self.known else "density unknown, taken as"
        return f"{', '.join(parts)} ({known} {self.density:.0%}; {self.source})"


def predict(call: Call, density: float | None, *, selects: bool, extra: float = 0.0) -> Prediction | None:
    """Expected times of a call on its CUDA device; None when nothing was measured on a GPU like it.

    Args:
        call: its shapes, causality and precision count.
        density: expected share of kept blocks, None when unknown.
        selects: whether the call's selection has to be paid for (a given mask has none).
        extra: milliseconds that its selection takes beyond the measured one (``Selector.selection_ms``).
    """
    batch, heads, q_len, head_dim = call.q.shape
    found = _measured(call.q.device.index, head_dim, call.is_causal, call.blocks or (128, 128))
    if found is None:
        return None
    dense, selection, sparse, source = found
    work = Work.of(batch * heads, q_len, call.k_len)
    kept = ASSUMED_DENSITY if density is None else density
    select = _ms(selection, work, 1.0) + extra if selects else 0.0
    return Prediction(
        {name: select + _ms(line, work, kept) for name, of, line in sparse if of == call.precision},
        {name: _ms(line, work, 1.0) for name, line in dense},
        source,
        kept,
        density is not None,
    )


_Numbers = tuple[float, float, float]
# Dense lines by name, the line of selection, sparse lines by name and precision, where they are from.
_Plain = tuple[tuple[tuple[str, _Numbers], ...], _Numbers, tuple[tuple[str, str, _Numbers], ...], str]


def _ms(line: _Numbers, work: Work, density: float) -> float:
    return line[0] + line[1] * work.tokens + line[2] * work.pairs * density


@constant_when_traced
def _measured(index: int | None, head_dim: int, is_causal: bool, blocks: tuple[int, int]) -> _Plain | None:
    """What the tables say, in tuples of numbers: constants that torch.compile traces through."""
    return _measured_on(torch.cuda.current_device() if index is None else index, head_dim, is_causal, blocks)


@functools.cache
def _measured_on(index: int, head_dim: int, is_causal: bool, blocks: tuple[int, int]) -> _Plain | None:
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    found = nearest(rows(), name, capability, head_dim, is_causal, blocks)
    if found is None:
        return None
    row, note = found
    dense = tuple((name, astuple(line)) for name, line in row.dense.items())
    sparse = tuple((*name.split("/"), astuple(line)) for name, line in row.sparse.items())
    return dense, astuple(row.select), sparse, f"{row}{note}"  # type: ignore[return-value]


def nearest(
    table: tuple[Row, ...],
    name: str,
    capability: tuple[int, int],
    head_dim: int,
    is_causal: bool,
    blocks: tuple[int, int] = (128, 128),
) -> tuple[Row, str] | None:
    """The row that speaks for a GPU, and what is not exact about it; None when no architecture comes near.

    Rows of the same GPU come before those of the same compute capability, and those before the same major one; then
    the nearest head dim, larger ones first; then the nearest size of blocks; then the earlier row (the user's own
    table).
    """

    def distance(row: Row) -> tuple[int, bool, int, float]:
        device = 0 if row.device == name else 1 if row.capability == capability else 2
        apart = abs(math.log2(row.blocks[0] / blocks[0])) + abs(math.log2(row.blocks[1] / blocks[1]))
        return device, row.head_dim < head_dim, abs(row.head_dim - head_dim), apart

    close = [row for row in table if row.is_causal == is_causal and row.capability[0] == capability[0]]
    if not close:
        return None
    row = min(close, key=distance)
    notes = [] if row.device == name else [f"nearest to {name}"]
    notes += [] if row.head_dim == head_dim else [f"nearest to head dim {head_dim}"]
    notes += [] if row.blocks == blocks else [f"nearest to blocks {blocks[0]} x {blocks[1]}"]
    return row, f" ({', '.join(notes)})" if notes else ""


@functools.cache
def rows() -> tuple[Row, ...]:
    """All measured rows, the user's own first; read once, :func:`forget` makes the next call read again."""
    own = user_table()
    return (*(read(own) if own.exists() else ()), *read(PACKAGED))


def forget() -> None:
    """Read the tables anew at the next call."""
    rows.cache_clear()
    _measured_on.cache_clear()
    epoch.advance()


def user_table() -> Path:
    """Where the user's own table is read from, and written to by ``measure``."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "spas_attn" / "cost_model.json"


def read(path: Path) -> tuple[Row, ...]:
    """The rows of a table; a ValueError names the file when it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, known here: {FORMAT}")
        return tuple(_row(entry) for entry in content["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of spas_attn.measure: {type(error).__name__}: {error}") from error


def _row(entry: dict[str, Any]) -> Row:
    major, minor = entry["capability"]
    lines = {name: {key: Line(*value) for key, value in entry[name].items()} for name in ("dense", "sparse")}
    block_q, block_k = entry.get("blocks", (128, 128))
    plain = {"capability": (major, minor), "blocks": (block_q, block_k), "select": Line(*entry["select"])}
    return Row(**{**entry, **lines, **plain})


def write(table: tuple[Row, ...], path: Path) -> None:
    """Write a table that :func:`read` reads; the folder is made."""
    entries = []
    for row in table:
        entry = {**asdict(row), "select": _numbers(row.select)}
        for name in ("dense", "sparse"):
            entry[name] = {key: _numbers(line) for key, line in getattr(row, name).items()}
        entries.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "rows": entries}, indent=1) + "\n", encoding="utf-8")


def _numbers(line: Line) -> list[float]:
    return [float(f"{x:.4g}") for x in astuple(line)]
