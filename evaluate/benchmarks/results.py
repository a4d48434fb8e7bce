"""Results of the benchmarks: the row of a table, CSV files, and the picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

QUANTITIES = {"spent": "milliseconds", "tflops": "effective TFLOP/s"}


@dataclass(frozen=True)
class Row:
    """One measurement; milliseconds are medians, None = not measured or not applicable.

    Attributes:
        case, tokens, heads, head_dim, layers: what was computed; ``layers`` is empty for a single attention call, else
            those that ran, and all of the published model where that is more.
        density, kept: shares of the blocks, asked for and computed (forced blocks and rounding up come on top).
        block: sizes of the mask blocks, or "dense".
        ms_total: everything: from q, k, v to the output, or the whole step; None for a provider that got its mask.
        ms_attention: the attention calls within a step: selection, quantisation, kernel; no projections.
        ms_select, ms_quant, ms_kernel: parts of one call, each by itself and without the host's time. In one call
            selection and quantisation share passes over q and k, so that the parts may add up to more than the total.
        ms_graph: the whole call replayed from a CUDA graph: what is left of it without the host.
        us_host: microseconds of host time of one call in eager mode; launches: kernels that it runs.
        speedup, speedup_attention: over the fastest dense row of the same case and run.
        tflops: effective TFLOP/s, of the total where there is one, else of the kernel.
        rel_l1: relative L1 against float32 over the same blocks, on sampled queries.
        peak_GiB: memory allocated at most in a step, weights included.
        peak_MiB: memory that one call allocates at most, its output included; lists_MiB: that of the mask's lists.
        device, versions: what it ran on.
    """

    case: str
    tokens: int | None
    heads: int | None
    head_dim: int | None
    layers: str
    density: float
    kept: float | None
    provider: str
    precision: str
    block: str
    ms_total: float | None = None
    ms_attention: float | None = None
    ms_select: float | None = None
    ms_quant: float | None = None
    ms_kernel: float | None = None
    ms_graph: float | None = None
    us_host: float | None = None
    launches: int | None = None
    speedup: float | None = None
    speedup_attention: float | None = None
    tflops: float | None = None
    rel_l1: float | None = None
    peak_GiB: float | None = None
    peak_MiB: float | None = None
    lists_MiB: float | None = None
    device: str = ""
    versions: str = ""

    @property
    def spent(self) -> float | None:
        """Milliseconds of the total where there is one, else of the kernel."""
        return self.ms_total if self.ms_total is not None else self.ms_kernel


# How the table shows a column; what is not named here it leaves out.
FORMATS = {
    "case": "", "tokens": ",", "layers": "", "provider": "", "precision": "", "block": "", "density": ".1%",
    "kept": ".1%", "ms_total": ".3f", "ms_attention": ".3f", "ms_select": ".3f", "ms_quant": ".3f",
    "ms_kernel": ".3f", "ms_graph": ".3f", "us_host": ".0f", "launches": "", "speedup": ".2f",
    "speedup_attention": ".2f", "tflops": ".4g", "rel_l1": ".2g", "peak_GiB": ".1f", "peak_MiB": ".0f",
    "lists_MiB": ".1f",
}  # fmt: skip


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Rows of one case with their speed-ups over its fastest dense row."""

    def over(row: Row, name: str) -> float | None:
        times = [getattr(other, name) for other in rows if other.block == "dense"]
        own = getattr(row, name)
        fastest = min((ms for ms in times if ms is not None), default=None)
        return None if own is None or fastest is None else fastest / own

    return [replace(row, speedup=over(row, "spent"), speedup_attention=over(row, "ms_attention")) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, without the columns that are empty in all of them."""
    shown = [name for name in FORMATS if any(getattr(row, name) not in (None, "") for row in rows)]
    lines = [shown]
    for row in rows:
        values = ((getattr(row, name), FORMATS[name]) for name in shown)
        lines.append(["-" if value is None else format(value, form) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = {name for name in shown if not FORMATS[name] and name != "launches"}
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if name in texts else '>'}{width}}"
            for name, cell, width in zip(shown, line, widths, strict=True)
        )
        for line in lines
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows, a column for each field; None becomes an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in vars(row).items()})


def read_csv(path: Path) -> list[Row]:
    """Rows that :func:`write_csv` wrote."""
    kinds = {field.name: str(field.type) for field in fields(Row)}  # columns that an older file lacks stay None

    def cell(name: str, text: str) -> Any:
        if kinds[name] == "str":
            return text
        return None if not text else int(text) if kinds[name].startswith("int") else float(text)

    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: cell(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def picture(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds and effective TFLOP/s of attention calls against density, one column of small plots per case.

    Solid: everything from q, k, v to the output. Dashed: the kernel alone, with a given mask. Dotted: dense. There is
    none of whole steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row.tflops is not None]
    if not timed:
        return
    cases = list(dict.fromkeys(row.case for row in timed))
    series = list(dict.fromkeys((row.provider, row.precision) for row in timed))
    # The ten strong colours of the map first, then their light partners.
    colours = {name: plt.get_cmap("tab20")((2 * i) % 20 + i // 10 % 2) for i, name in enumerate(series)}
    across = min(4, len(cases))
    bands = -(-len(cases) // across)
    figure, axes = plt.subplots(
        2 * bands, across, figsize=(4 * across, 5 * bands + 1), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for i, case in enumerate(cases):
        here = [row for row in timed if row.case == case]
        for below, (quantity, label) in enumerate(QUANTITIES.items()):
            axis = axes[2 * (i // across) + below, i % across]
            axis.set_visible(True)
            _curves(axis, here, quantity, colours)
            axis.set_ylabel(label if i % across == 0 else "")
            axis.set_title(case if below == 0 else "")
            axis.set_xlabel("blocks kept" if below else "")
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(2, across), frameon=False)
    figure.suptitle(f"{timed[0].device}, {timed[0].versions}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def growth_picture(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds and memory of one call against its length, dense and sparse, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    sparse = [row for row in rows if row.block != "dense" and row.ms_total is not None]
    series = {"dense": [row for row in rows if row.block == "dense" and row.ms_total is not None], "sparse": sparse}
    for (name, shown), colour in zip(series.items(), ("tab:gray", "tab:blue"), strict=True):
        tokens = [row.tokens for row in shown]
        label = f"{shown[0].provider} {shown[0].precision}" if shown else name
        label += f", {shown[0].density:.0%} of the blocks" if name == "sparse" and shown else ""
        times.plot(tokens, [row.ms_total for row in shown], "o-", color=colour, ms=4, label=label)
        memory.plot(tokens, [row.peak_MiB for row in shown], "o-", color=colour, ms=4)
    tokens = [row.tokens for row in sparse]
    times.plot(tokens, [row.ms_select for row in sparse], "s--", color="tab:orange", ms=4, label="selection alone")
    memory.plot(tokens, [row.lists_MiB for row in sparse], "s--", color="tab:orange", ms=4, label="lists of blocks")
    for axis, label in ((times, "milliseconds"), (memory, "MiB at most, beyond q, k and v")):
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xticks(tokens, [f"{(n or 0) // 1024}K" for n in tokens])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="upper left")
    heads, dim = (sparse[0].heads, sparse[0].head_dim) if sparse else (0, 0)
    figure.suptitle(f"causal, {heads} heads × {dim}; {rows[0].device}, {rows[0].versions}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curves(axis: Any, rows: Sequence[Row], quantity: str, colours: dict[tuple[str, str], Any]) -> None:
    """One small plot: a line for each provider and precision, both axes logarithmic."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    densities = sorted({row.density for row in rows})
    for (provider, precision), colour in colours.items():
        shown = [row for row in rows if (row.provider, row.precision) == (provider, precision)]
        shown.sort(key=lambda row: row.density)
        if not shown:
            continue
        values = [getattr(row, quantity) for row in shown]
        label = f"{provider} {precision}"
        if shown[0].block == "dense":
            axis.plot(densities, values[:1] * len(densities), ":", color=colour, lw=2, label=f"{label} (dense)")
        else:
            alone = shown[0].ms_total is None
            style, label = ("s--", f"{label} (kernel alone)") if alone else ("o-", label)
            axis.plot([row.density for row in shown], values, style, color=colour, ms=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(densities)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, (low * high) ** 0.5 / 2.1), max(high, (low * high) ** 0.5 * 2.1))  # two powers of 2
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.grid(alpha=0.3, which="both")
