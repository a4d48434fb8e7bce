"""The driver of the sweeps: for every selector and pair of bounds calibrate, measure, and write a row.

Every setting is a real calibration, and is judged on inputs that no calibration saw. Error curves are computed once per
selector and taken up again from its checkpoint. OUT.json is written after every setting.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

import autotune
from autotune import Grid
from modify_model import patch, restore
from modify_model.cli.arguments import sparse_backend
from modify_model.cli.parallel import guarded
from spas_attn import fallback_counts
from spas_attn.selectors import MeanSimilarity, Selector

Row = dict[str, Any]
Bounds = tuple[float, float | None]  # l1, tail
FILTERS = Grid(sim=(-1.0, 0.2, 0.35, 0.5))
MARKERS = "os^vDP*Xhd<"


@dataclass(frozen=True)
class Setting:
    """A selector with its grid, the bounds to measure, and how many first denoising steps run dense."""

    selector: Selector
    bounds: Sequence[Bounds] = ()
    grid: Grid = field(default_factory=Grid)
    dense_first: int = 0


def means(pool: int, block: int, **options: Any) -> MeanSimilarity:
    """The selector that scores means of ``pool`` tokens, with square blocks."""
    return MeanSimilarity(pool=pool, block_q=block, block_k=block, **options)


class Sweep:
    """What is swept: a model with its calibration, its measure of quality, and its picture.

    Attributes:
        settings: by the name that the table shows.
        out: where results go by default.
        columns: what the table shows of a row, and how.
        model: the model or pipeline; facts: what holds for all results.
    """

    settings: ClassVar[dict[str, Setting]]
    out: ClassVar[str]
    columns: ClassVar[dict[str, str]]
    model: Any
    facts: Row

    add_arguments: Callable[[argparse.ArgumentParser], None]  # beside --out, --plot and --selectors
    variants: Callable[[], Iterator[Row]]  # prepares the model for all settings, once or several times; columns of rows
    items: Callable[[], tuple[Sequence[Any], dict[str, Any]]]  # what a calibration runs, and its options
    observe: Callable[[Any], None]  # runs an item
    measure: Callable[[float, float | None], Row]  # judges the model tuned with an l1 and a tail bound
    draw: Callable[[Row, Any], Any]  # the picture of facts and results, by pyplot, as a figure

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def bounds(self, setting: Setting) -> Sequence[Bounds]:
        """The pairs of bounds to measure."""
        return setting.bounds

    def patch_options(self, setting: Setting) -> dict[str, Any]:
        """Options of ``patch`` beside bounds, selector and backend."""
        return {}


def calibrate(sweep: Sweep, grid: Grid, keep: Path) -> list[Row]:
    """Calibrate; curves that ``keep`` holds are not computed again. Returns the statistics of all heads."""
    items, options = sweep.items()
    work, saved = keep.with_suffix(".work"), keep.with_name(keep.name + ".rank0")
    current, resume = work.with_name(work.name + ".rank0"), saved.exists()
    if resume:
        shutil.copy(saved, current)
    with autotune.calibrate(sweep.model, grid=grid, checkpoint=work, resume=resume, **options) as calibration:
        for item in calibration.prompts(items):
            # When the next pass begins, the checkpoint holds the curves of all prompts.
            if calibration.phase != "curves" and not saved.exists():
                shutil.copy(current, saved)
            sweep.observe(item)
    return [head for entry in calibration.statistics for head in entry["heads"]]


def measured(sweep: Sweep, name: str, l1: float, tail: float | None, keep: Path) -> Row:
    """The row of one setting and pair of bounds."""
    setting = sweep.settings[name]
    options = {"l1": l1, "pv_l1": 1.2 * l1, "tail": tail, "backend": sparse_backend(sweep.facts["device_type"])}
    patch(sweep.model, selector=setting.selector, **options, **sweep.patch_options(setting))
    began = time.perf_counter()
    heads = calibrate(sweep, setting.grid, keep)
    seconds = time.perf_counter() - began
    sparse = [head for head in heads if head["is_sparse"]]
    errors = {
        name: max((head[key] for head in sparse), default=0.0)
        for name, key in (("mean_error", "l1_total"), ("tail_error", "tail_total"))
    }
    row = {"selector": name, "l1": l1, "tail": tail, "seconds": round(seconds, 1)}
    return row | {"sparse_heads": len(sparse) / len(heads)} | errors | sweep.measure(l1, tail)


@torch.no_grad()
def run(sweep: Sweep, names: Sequence[str], path: Path) -> None:
    """Run everything, writing the results after every setting."""
    results: list[Row] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for variant in sweep.variants():
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(names):
                restore(sweep.model)
                for l1, tail in sweep.bounds(sweep.settings[name]):
                    row = measured(sweep, name, l1, tail, Path(folder) / f"curves{number}")
                    results.append(row | variant)
                    path.write_text(json.dumps({"facts": sweep.facts, "results": results}, indent=1) + "\n", "utf-8")
                    print(table(sweep.columns, results).splitlines()[-1], flush=True)
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls fell back to dense attention: {reason}")


def table(columns: dict[str, str], rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown."""
    cells = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    for row in rows:
        values = ((row[name], form) for name, form in columns.items())
        cells.append(["–" if value is None or value != value else format(value, form) for value, form in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def line(axis: Any, rows: Sequence[Row], y: Callable[[Row], float], number: int, **style: Any) -> None:
    """A line of a picture over the sparsity in percent; selectors differ by marker and colour."""
    from matplotlib import colormaps

    rows = sorted(rows, key=lambda row: row["sparsity"])
    colour, marker = colormaps["tab20"](2 * number % 20 + number // 10), MARKERS[number % len(MARKERS)]
    x = [100 * row["sparsity"] for row in rows]
    axis.plot(x, [y(row) for row in rows], color=colour, marker=marker, markersize=4, **style)


def main(kind: type[Sweep], text: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run a sweep's command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(kind.out), help="OUT.json and OUT.png are written")
    parser.add_argument("--plot", action="store_true", help="only print the table and draw the picture from OUT.json")
    names = list(kind.settings)
    parser.add_argument("--selectors", nargs="+", choices=names, metavar="NAME", default=names, help="default: all")
    kind.add_arguments(parser)
    args = parser.parse_args(arguments)
    return guarded(kind.__name__, lambda: _main(kind, args))


def _main(kind: type[Sweep], args: argparse.Namespace) -> int:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = args.out.with_name(args.out.name + ".json")
    if not args.plot:
        run(kind(args), args.selectors, path)
    data = json.loads(path.read_text("utf-8"))
    print(table(kind.columns, data["results"]))
    kind.draw(data, plt).savefig(args.out.with_name(args.out.name + ".png"), dpi=130)
    plt.close("all")
    return 0
