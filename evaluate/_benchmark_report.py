"""Results of the benchmarks: rows of a table, CSV files, and the picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "flash-attn-4", "sageattention", "spas_sage_attn")


@dataclass(frozen=True)
class Row:
    """One measurement; milliseconds are medians, None = not measured or not applicable.

    Attributes:
        case, density, provider, precision, block: what was measured; density is the share of blocks asked for.
        ms_total: everything from q, k, v to the output; None for a provider that was given its mask.
        ms_select, ms_quant, ms_kernel: parts measured by themselves. In one call selection and quantisation share
            passes over q and k, so that the parts may add up to more than the total.
        tflops: effective TFLOP/s, of the total where there is one, else of the kernel.
        rel_l1: relative L1 against float32 over the same blocks, on sampled queries.
        device, versions: what it ran on.
    """

    case: str
    density: float
    provider: str
    precision: str
    block: str
    ms_total: float | None
    ms_select: float | None
    ms_quant: float | None
    ms_kernel: float | None
    tflops: float | None
    rel_l1: float | None
    device: str
    versions: str

    TITLE = (
        f"{'case':<18} {'density':>7} {'provider':<18} {'precision':<10} {'total':>8} {'select':>7} {'quant':>7} "
        f"{'kernel':>8} {'TFLOP/s':>8} {'rel. L1':>8}"
    )

    def __str__(self) -> str:
        def number(x: float | None, width: int, digits: int = 3) -> str:
            return f"{'-' if x is None else format(x, f'.{digits}f'):>{width}}"

        return (
            f"{self.case:<18} {self.density:>7.1%} {self.provider:<18} {self.precision:<10} {number(self.ms_total, 8)} "
            f"{number(self.ms_select, 7)} {number(self.ms_quant, 7)} {number(self.ms_kernel, 8)} "
            f"{number(self.tflops, 8, 1)} {number(self.rel_l1, 8, 4)}"
        )


def versions() -> str:
    """Versions of what the times depend on, as one line."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join(["torch " + torch.__version__, *(entry for entry in found if not entry.startswith("torch "))])


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Write dataclasses of one class, a column for each field; None becomes an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        for row in rows:
            cells = {name: f"{x:.5g}" if isinstance(x, float) else x for name, x in asdict(row).items()}
            writer.writerow(cells)


def read_csv(path: Path) -> list[Row]:
    """Rows of attention measurements that :func:`write_csv` wrote."""
    numbers = {"density", "ms_total", "ms_select", "ms_quant", "ms_kernel", "tflops", "rel_l1"}

    def cell(name: str, text: str) -> Any:
        return text if name not in numbers else float(text) if text else None

    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: cell(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def picture(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds and effective TFLOP/s against density, one column of small plots per case.

    Solid: everything from q, k, v to the output. Dashed: the kernel alone, with a given mask. Dotted: dense.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    timed = [row for row in rows if row.tflops is not None]
    cases = list(dict.fromkeys(row.case for row in timed))
    series = list(dict.fromkeys((row.provider, row.precision) for row in timed))
    # The ten strong colours of the map first, then their light partners.
    colours = {name: plt.get_cmap("tab20")((2 * i) % 20 + i // 10 % 2) for i, name in enumerate(series)}
    across = min(4, len(cases))
    bands = -(-len(cases) // across)
    figure, axes = plt.subplots(2 * bands, across, figsize=(4 * across, 6 * bands), squeeze=False, sharex=True)
    for axis in axes.flat:
        axis.set_visible(False)
    for i, case in enumerate(cases):
        for below, (quantity, label) in enumerate((("ms", "milliseconds"), ("tflops", "effective TFLOP/s"))):
            axis = axes[2 * (i // across) + below, i % across]
            axis.set_visible(True)
            here = [row for row in timed if row.case == case]
            densities = sorted({row.density for row in here})
            for name in series:
                shown = [row for row in here if (row.provider, row.precision) == name]
                _line(axis, shown, quantity, colours[name], " ".join(name), densities)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_xticks(densities)
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, (low * high) ** 0.5 / 2.1), max(high, (low * high) ** 0.5 * 2.1))  # two powers of 2
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.tick_params(labelbottom=True)
            axis.grid(alpha=0.3, which="both")
            axis.set_ylabel(label if i % across == 0 else "")
            axis.set_title(case if below == 0 else "")
            axis.set_xlabel("blocks kept" if below else "")
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(4, max(2, across + 1)), frameon=False)
    figure.suptitle(f"{timed[0].device}, {timed[0].versions}", fontsize=9)
    legend = 0.25 * -(-len(handles) // min(4, max(2, across + 1))) / (6 * bands)
    figure.tight_layout(rect=(0, legend + 0.02, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis: Any, rows: list[Row], quantity: str, colour: Any, label: str, densities: list[float]) -> None:
    if not rows:
        return
    times = [row.ms_total if row.ms_total is not None else row.ms_kernel for row in rows]
    values = times if quantity == "ms" else [row.tflops for row in rows]
    if rows[0].block == "dense":
        axis.plot(densities, values[:1] * len(densities), ":", color=colour, label=f"{label} (dense)")
    else:
        alone = rows[0].ms_total is None
        style = "s--" if alone else "o-"
        points = sorted(zip((row.density for row in rows), values, strict=True))
        axis.plot(*zip(*points, strict=True), style, color=colour, ms=3, label=label + " (kernel alone)" * alone)
