"""Results of the study of streaming heads: quality with confidence beside KV memory, tables, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frontier_results import resampled
from long_results import MARKERS

Row = dict[str, Any]
DENSE = "dense"
BLOCK = 128  # of a streaming head's rule
Z = 1.96  # of 95% limits
HEAD = ["heads", "streaming", "sink + window", "KV memory", "perplexity", "limits"]


def kv_memory(sparsity: float, sink: int, window: int, length: int) -> float:
    """Share of a full cache's entries that is held after ``length`` tokens, when a share of the KV heads streams.

    A streaming head holds whole blocks: those of the sink, and those from the first one on that the next token's block
    sees in its window. `StreamingCache` holds the same (``held`` of the results).
    """
    begin = max(0, length // BLOCK * BLOCK - window + 1) // BLOCK * BLOCK
    held = min(length, -(-sink // BLOCK) * BLOCK + length - begin)
    return 1 - sparsity * (1 - held / length)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% limits of a share found in ``count`` independent trials (Wilson's score interval)."""
    middle, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (middle - spread) / (1 + Z**2 / count), (middle + spread) / (1 + Z**2 / count)


class Point:
    """One choice of heads at one sparsity, sink and window; several random choices are one point.

    Attributes:
        name, sparsity, sink, window: what it is.
        memory: share of a full cache.
        nats: by source, loss over the dense model's ``[windows]``.
        found: by task, (share, prompts).
        spread: by task, the least and greatest share of random choices.
    """

    def __init__(self, name: str, setting: str, cells: Sequence[Row], dense: dict[str, Row]) -> None:
        self.name = name
        sparsity, _, sizes = setting.partition(" ")
        self.sparsity = float(sparsity)
        self.sink, self.window = map(int, sizes.split("+"))
        self.memory = kv_memory(self.sparsity, self.sink, self.window, cells[0]["length"])
        self.nats: dict[str, np.ndarray] = {}
        self.found: dict[str, tuple[float, int]] = {}
        self.spread: dict[str, tuple[float, float]] = {}
        for task in dict.fromkeys(cell["task"] for cell in cells):
            some = [cell for cell in cells if cell["task"] == task]
            if "by_window" in some[0]:
                self.nats[task] = np.mean([cell["by_window"] for cell in some], 0) - dense[task]["by_window"]
            else:
                shares = [cell["exact"] for cell in some]
                self.found[task] = float(np.mean(shares)), sum(cell["samples"] for cell in some)
                self.spread[task] = min(shares), max(shares)

    def change(self, picks: dict[str, np.ndarray] | None = None) -> float:
        """Change of the perplexity, mean over sources; of the windows picked."""
        some = [nats if picks is None else nats[picks[source]] for source, nats in self.nats.items()]
        return float(np.mean([np.expm1(nats.mean()) for nats in some]))


def points(data: Row) -> tuple[dict[str, Row], list[Point]]:
    """The dense model's cells by task, and all points."""
    dense = {cell["task"]: cell for cell in data["cells"] if cell["method"] == DENSE}
    groups: dict[tuple[str, str], list[Row]] = {}
    for cell in data["cells"]:
        if cell["method"] != DENSE:
            name = "random" if cell["method"].startswith("random") else cell["method"]
            groups.setdefault((name, cell["setting"]), []).append(cell)
    found = [Point(*key, cells, dense) for key, cells in groups.items() if {c["task"] for c in cells} == set(dense)]
    order = list(dict.fromkeys(point.name for point in found))
    return dense, sorted(found, key=lambda p: (p.window, p.sink, p.sparsity, order.index(p.name)))


def tables(data: Row) -> str:
    """All points with their limits, and how the gates separate, in Markdown."""
    dense, found = points(data)
    tasks = [task for task, cell in dense.items() if "exact" in cell]
    windows = {task: len(cell["by_window"]) for task, cell in dense.items() if "by_window" in cell}
    rows = [[*HEAD, *tasks], ["---"] * (len(HEAD) + len(tasks))]
    rows.append([DENSE, "0%", "–", "100%", "–", "–", *(_share(dense[t]["exact"], dense[t]["samples"]) for t in tasks)])
    draws = resampled(windows)
    for point in found:
        low, high = np.quantile([point.change(picks) for picks in draws], [0.025, 0.975])
        rows.append([
            point.name, f"{point.sparsity:.0%}", f"{point.sink} + {point.window}", f"{point.memory:.0%}",
            f"{point.change():+.2%}", f"{low:+.2%} to {high:+.2%}", *(_share(*point.found[task]) for task in tasks),
        ])  # fmt: skip
    return "\n\n".join("\n".join("| " + " | ".join(row) + " |" for row in part) for part in (rows, _separation(data)))


def _share(share: float, count: int) -> str:
    low, high = wilson(share, count)
    return f"{share:.0%} ({low:.0%} to {high:.0%})".replace("% to", " to")


def _separation(data: Row) -> list[list[str]]:
    """Quantiles of the gates of every training."""
    rows = [["gates", "steps, seconds", "10%", "25%", "50%", "75%", "90%", "between .25 and .75", "verdict"]]
    rows.append(["---"] * len(rows[0]))
    for name, facts in data["settings"].items():
        if "gates" in facts:
            values = np.array(facts["gates"]).ravel()
            quantiles = [f"{x:.2f}" for x in np.quantile(values, [0.1, 0.25, 0.5, 0.75, 0.9])]
            undecided = f"{np.mean((values > 0.25) & (values < 0.75)):.0%}"
            said = next(iter(facts["separation"].values()))["warning"]
            steps = f"{facts['steps']}, {facts['seconds']:.0f} s"
            rows.append([name, steps, *quantiles, undecided, said or "they separate"])
    return rows


def picture(data: Row, path: Path) -> None:
    """Retrieval and perplexity against the memory of the KV cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense, found = points(data)
    tasks = [task for task, cell in dense.items() if "exact" in cell]
    window = (found[0].sink, found[0].window) if found else ()
    found = [point for point in found if (point.sink, point.window) == window]
    figure, axes = plt.subplots(1, len(tasks) + 1, figsize=(4.2 * (len(tasks) + 1), 4.4), layout="constrained")
    for number, name in enumerate(dict.fromkeys(point.name for point in found)):
        own = sorted((point for point in found if point.name == name), key=lambda point: -point.memory)
        style = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number}", "label": name, "ms": 5, "lw": 1.3}
        x = [100, *(100 * point.memory for point in own)]
        axes[0].plot(x, [0, *(100 * point.change() for point in own)], **style)
        for axis, task in zip(axes[1:], tasks, strict=True):
            y = [100 * dense[task]["exact"], *(100 * point.found[task][0] for point in own)]
            limits = np.array([wilson(dense[task]["exact"], dense[task]["samples"]),
                               *(wilson(*point.found[task]) for point in own)])  # fmt: skip
            axis.errorbar(x, y, np.abs(100 * limits.T - y), elinewidth=0.6, **style)
    axes[0].set_ylabel("perplexity change on other sources, percent")
    axes[0].set_yscale("symlog", linthresh=1)
    for axis, title in zip(axes, ["perplexity", *tasks], strict=True):
        axis.set(title=title, xlabel="KV cache, percent of dense")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    for axis in axes[1:]:
        axis.set(ylabel="answers found, percent", ylim=(-3, 103))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    facts = data["facts"]
    where = f"sink {window[0]}, window {window[1]}" if window else ""
    figure.suptitle(f"{facts['model']}, {facts['length']:,} tokens, {where}, {facts['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
