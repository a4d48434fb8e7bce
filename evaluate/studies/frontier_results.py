"""Results of the study of the frontier: sparsity at equal perplexity with confidence, tables, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from long_results import MARKERS, score
from long_tasks import RETRIEVAL

Row = dict[str, Any]
DENSE = "dense"
AIMS = (0.003, 0.01)  # changes of perplexity
RESAMPLES, SEED = 1000, 0
# What the picture shows of 64 x 64 blocks: scores under one budget, and settings with all the ways to share the error.
SCORES = (
    "means 8", "exact 64", "exact 32", "exact 16, real", "exact 16, real, peak", "exact 8, real",
    "exact 8, real, peak", "oracle", "oracle, peak",
)  # fmt: skip
SHARED = ("means 8", "exact 32", "exact 16, real, peak")


class Line:
    """One setting under one plan: points of rising sparsity.

    Attributes:
        sparsity: ``[points]``, mean over sources.
        nats: by source, loss over the dense model's ``[points, windows]``.
        kl: ``[points]``, mean over sources.
    """

    def __init__(self, cells: Sequence[Row], dense: dict[str, Row]) -> None:
        by_choice: dict[str, list[Row]] = {}
        for cell in cells:
            by_choice.setdefault(cell["setting"], []).append(cell)
        whole = [some for some in by_choice.values() if len(some) == len(dense)]
        whole.sort(key=lambda some: -_mean([cell["density"] for cell in some]))
        self.sparsity = np.array([1 - _mean([cell["density"] for cell in some]) for some in whole])
        self.kl = np.array([_mean([cell["kl"] for cell in some]) for some in whole])
        self.nats = {}  # of no windows where no choice was judged on all sources
        for source, exact in dense.items():
            losses = np.array([_of(some, source)["by_window"] for some in whole]).reshape(-1, len(exact["by_window"]))
            self.nats[source] = losses - np.array(exact["by_window"])

    def change(self, picks: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Change of the perplexity ``[points]``, mean over sources; of the windows picked."""
        found = [nats if picks is None else nats[:, picks[source]] for source, nats in self.nats.items()]
        return np.mean([np.expm1(nats.mean(1)) for nats in found], 0)

    def at(self, aim: float, picks: dict[str, np.ndarray] | None = None) -> float:
        """Sparsity at a change of the perplexity, between two points; NaN outside them."""
        # A curve that dips by chance is crossed where it is crossed first.
        change = np.maximum.accumulate(self.change(picks))
        return float(np.interp(aim, change, self.sparsity, left=math.nan, right=math.nan)) if len(change) else math.nan


def lines(data: Row) -> dict[tuple[str, str], Line]:
    """The lines by setting and plan."""
    cells = [cell for cell in data["cells"] if cell["task"] not in RETRIEVAL]
    dense = {cell["task"]: cell for cell in cells if cell["method"] == DENSE}
    groups: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        if cell["method"] != DENSE:
            groups.setdefault((cell["method"], cell["setting"].split()[0]), []).append(cell)
    return {key: Line(some, dense) for key, some in groups.items()}


def resampled(windows: dict[str, int]) -> list[dict[str, np.ndarray]]:
    """Windows drawn again with replacement, by source, RESAMPLES times."""
    rng = np.random.default_rng(SEED)
    return [{name: rng.integers(0, n, n) for name, n in windows.items()} for _ in range(RESAMPLES)]


def tables(data: Row) -> str:
    """Sparsity at equal perplexity with 90% limits, and what retrieval finds, in Markdown."""
    found = lines(data)
    if not found:
        return "no results yet"
    first = next(iter(found.values()))
    draws = resampled({source: nats.shape[1] for source, nats in first.nats.items()})
    head = ["setting", "plan"]
    for aim in AIMS:
        head += [f"sparsity at {aim:+.1%}", "90% limits", f"over {next(iter(found))[0]}"]
    rows = [head, ["---"] * len(head)]
    reference = {aim: np.array([first.at(aim, picks) for picks in draws]) for aim in AIMS}
    for (name, plan), line in found.items():
        row = [name, plan]
        for aim in AIMS:
            drawn = np.array([line.at(aim, picks) for picks in draws])
            row += [_percent(line.at(aim)), limits(drawn), limits(drawn - reference[aim], "+.1f")]
        rows.append(row)
    return "\n\n".join(_markdown(part) for part in (rows, _retrieval(data)))


def points(data: Row) -> str:
    """Every point: sparsity, change of the perplexity by source, KL; in Markdown."""
    found = lines(data)
    sources = list(next(iter(found.values())).nats) if found else []
    rows = [["setting", "plan", "sparsity", *sources, "mean", "KL"], ["---"] * (5 + len(sources))]
    for (name, plan), line in found.items():
        changes = [np.expm1(nats.mean(1)) for nats in line.nats.values()]
        for at, (sparsity, mean, kl) in enumerate(zip(line.sparsity, line.change(), line.kl, strict=True)):
            each = [f"{change[at]:+.2%}" for change in changes]
            rows.append([name, plan, f"{sparsity:.1%}", *each, f"{mean:+.2%}", f"{kl:.4f}"])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _retrieval(data: Row) -> list[list[str]]:
    cells = [cell for cell in data["cells"] if cell["task"] in RETRIEVAL]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    rows = [["setting", "choice", "density", *tasks], ["---"] * (3 + len(tasks))]
    for key in dict.fromkeys((cell["method"], cell["setting"]) for cell in cells):
        some = [cell for cell in cells if (cell["method"], cell["setting"]) == key]
        scores = {cell["task"]: f"{score(cell):.0%}" for cell in some}
        density = f"{_mean([cell['density'] for cell in some]):.1%}"
        rows.append([*key, density, *(scores.get(task, "–") for task in tasks)])
    return rows


def picture(data: Row, path: Path) -> None:
    """Change of the perplexity against sparsity: ways of scoring, ways of sharing out the error, sizes of blocks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {key: line for key, line in lines(data).items() if len(line.sparsity)}
    large = [key for key in found if key[0].startswith("128")]
    panels = {
        "scores, 64 x 64 blocks, one budget": [(name, "budget") for name in SCORES if (name, "budget") in found],
        "how the error is shared out": [key for key in found if key[0] in SHARED],
        "sizes of blocks (queries x keys)": [*list(found)[:1], *(key for key in large if key[1] == "budget")],
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for axis, (title, keys) in zip(axes, panels.items(), strict=True):
        for number, key in enumerate(keys):
            colour = plt.get_cmap("tab20")(2 * number % 20 + number // 10 % 2)
            style = {"marker": MARKERS[number % len(MARKERS)], "color": colour, "label": ", ".join(key)}
            axis.plot(100 * found[key].sparsity, 100 * found[key].change(), ms=4, lw=1.2, **style)
        for aim in AIMS:
            axis.axhline(100 * aim, color="grey", lw=0.8, ls="--")
        axis.set(title=title, xlabel="blocks left out, percent", ylim=(-0.2, 2.2))
        axis.grid(alpha=0.3)
        if keys:
            axis.legend(fontsize=7, loc="upper left")
    axes[0].set_ylabel("perplexity change on other sources, percent")
    facts = data["facts"]
    figure.suptitle(f"{facts['model']}, {facts['length']:,} tokens, {facts['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _of(cells: Sequence[Row], task: str) -> Row:
    return next(cell for cell in cells if cell["task"] == task)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1%}"


def limits(values: np.ndarray, form: str = ".1f") -> str:
    """The range in which 90% of the values lie, in percent; – where a tenth of them is not known."""
    known = values[~np.isnan(values)]
    if len(known) < 0.9 * len(values):
        return "–"
    low, high = 100 * np.quantile(known, [0.05, 0.95])
    return f"{low:{form}} to {high:{form}}"
