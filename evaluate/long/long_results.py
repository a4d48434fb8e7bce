"""Results of the evaluation on long prompts: a file that grows cell by cell, tables, the page's text, a picture."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from long_tasks import RETRIEVAL

from modify_model.cli.arguments import check_output

Row = dict[str, Any]
SOLVED = 0.8  # a task whose dense score is lower says nothing about a sparse method
MARK = "<!-- results -->"
MARKERS = "os^vDP*Xhd<"
KEY = ("method", "setting", "length", "task")


class Results:
    """The cells of one evaluation, written to a file after each of them.

    Args:
        path: the JSON file; cells that it holds are not computed again.
        facts: what all cells depend on.

    Raises:
        ValueError: when the file holds cells of another evaluation.
    """

    def __init__(self, path: Path, facts: Row) -> None:
        self.path, self.facts, self.cells, self.settings = path, facts, [], {}
        if path.exists():
            content = read(path)
            known = content["facts"]
            differs = [name for name in facts if name in known and known[name] != facts[name]]
            if differs:
                what = ", ".join(f"{name} {known[name]!r}, not {facts[name]!r}" for name in differs)
                raise ValueError(f"{str(path)!r} holds results with {what}: give another --out or remove it")
            self.facts, self.cells, self.settings = known | facts, content["cells"], content["settings"]

    def find(self, method: str, setting: str, length: int, task: str) -> Row | None:
        """The cell, if it is there."""
        key = (method, setting, length, task)
        return next((cell for cell in self.cells if tuple(cell[name] for name in KEY) == key), None)

    def add(self, cell: Row) -> None:
        """Add a cell and write the file."""
        self.cells.append(cell)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"facts": self.facts, "settings": self.settings, "cells": self.cells}
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        beside.replace(self.path)


def stored(args: argparse.Namespace, evaluate: Callable[[argparse.Namespace, Path], None]) -> Row:
    """What stands in the JSON file of ``args.out``, after what is left to do (with ``args.plot`` nothing is done).

    Args:
        evaluate: goes on with the evaluation and writes the file, whose path it gets.
    """
    path = args.out.with_name(args.out.name + ".json")
    check_output("out", str(path))
    if not args.plot:
        evaluate(args, path)
    return read(path)


def read(path: Path) -> Row:
    """A file of results; a ValueError when it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
        for name in ("facts", "settings", "cells"):
            content[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} holds no results of this program: {error}") from error
    return content


def score(cell: Row) -> float:
    """What counts of a retrieval cell: answers found, or of the task "copy" the share of their tokens."""
    return cell["tokens"] if cell["task"] == "copy" else cell["exact"]


def summaries(cells: Sequence[Row]) -> list[Row]:
    """One row for every length, method and setting: density, perplexity change by text, and the score of every task.

    A task that the dense model does not solve has no score (None): no evidence.
    """
    dense = {(cell["length"], cell["task"]): cell for cell in cells if cell["method"] == "dense"}
    rows: dict[tuple[Any, ...], Row] = {}
    for cell in cells:
        key = (cell["length"], cell["method"], cell["setting"])
        row = rows.setdefault(key, dict(zip(("length", "method", "setting"), key, strict=True)) | {"densities": []})
        row["densities"].append(cell["density"])
        exact = dense.get((cell["length"], cell["task"]))
        if cell["task"] in RETRIEVAL:
            row[cell["task"]] = score(cell) if exact is not None and score(exact) >= SOLVED else None
        elif exact is not None:
            row[cell["task"]] = math.exp(cell["nats"] - exact["nats"]) - 1
    for row in rows.values():
        found = row.pop("densities")
        row["density"] = sum(found) / len(found)
    order = list(dict.fromkeys(row["method"] for row in rows.values()))
    return sorted(rows.values(), key=lambda row: (row["length"], order.index(row["method"]), -row["density"]))


def table(cells: Sequence[Row]) -> str:
    """The summaries as a table in Markdown; "no evidence" where the dense model does not solve a task."""
    rows = summaries(cells)
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    head = ["length", "method", "setting", "density"]
    head += [task if task in RETRIEVAL else f"perplexity, {task}" for task in tasks]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [f"{row['length']:,}", row["method"], row["setting"], f"{row['density']:.1%}"]
        for task in tasks:
            if task not in row:
                line.append("–")
            elif row[task] is None:
                line.append("no evidence")
            else:
                line.append(f"{row[task]:.0%}" if task in RETRIEVAL else f"{row[task]:+.2%}")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_position(cells: Sequence[Row]) -> str:
    """Perplexity change by position in the window, as a table in Markdown."""
    chosen = [cell for cell in cells if cell["task"] not in RETRIEVAL]
    dense = {(cell["length"], cell["task"]): cell for cell in chosen if cell["method"] == "dense"}
    parts = len(chosen[0]["by_position"]) if chosen else 0
    head = ["length", "text", "method", "setting", *(f"{i + 1}/{parts}" for i in range(parts))]
    lines = [head, ["---"] * len(head)]
    for cell in chosen:
        exact = dense.get((cell["length"], cell["task"]))
        if exact is None:
            continue
        line = [f"{cell['length']:,}", cell["task"], cell["method"], cell["setting"]]
        pairs = zip(cell["by_position"], exact["by_position"], strict=True)
        own = cell is exact
        lines.append([*line, *(f"{math.exp(x):.2f}" if own else f"{math.exp(x - y) - 1:+.2%}" for x, y in pairs)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(data: Row) -> str:
    """What stands on the page of results: facts, the table, and perplexity by position."""
    facts = data["facts"]
    dense = [cell for cell in data["cells"] if cell["method"] == "dense"]
    exact = ", ".join(
        f"{cell['task']} {score(cell):.0%}" + (f" ({cell['size']} pairs)" if cell.get("size") else "")
        if cell["task"] in RETRIEVAL
        else f"{cell['task']} perplexity {cell['perplexity']:.2f}"
        for cell in dense
    )
    shown = "; ".join(f"{name} {value}" for name, value in facts.items())
    parts = [f"{shown}.", f"Dense: {exact}.", table(data["cells"]), "### By position", by_position(data["cells"])]
    return "\n\n".join(parts)


def fill_page(path: Path, text: str) -> None:
    """Put a text between the two marks of a page; a ValueError when they are not there."""
    parts = path.read_text("utf-8").split(MARK)
    if len(parts) != 3:
        raise ValueError(f"{str(path)!r} must have two lines {MARK!r}, with the results between them")
    path.write_text(f"{parts[0]}{MARK}\n\n{text}\n\n{MARK}{parts[2]}", "utf-8")


def picture(data: Row, path: Path) -> None:
    """Perplexity change and retrieval against density, at the greatest length; hollow: as published."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = data["cells"]
    length = max(cell["length"] for cell in cells)
    rows = [row for row in summaries(cells) if row["length"] == length and row["method"] != "dense"]
    texts = [t for t in dict.fromkeys(cell["task"] for cell in cells) if t not in RETRIEVAL]
    # Tasks that every row has a score of: means over different tasks would not be comparable.
    tasks = [t for t in RETRIEVAL if all(row.get(t) is not None for row in rows)]
    found = f"answers found ({', '.join(tasks) or 'no task in common'}), percent"
    measures = {
        "perplexity change, percent": lambda row: _mean([100 * row[t] for t in texts if t in row]),
        found: lambda row: _mean([100 * row[t] for t in tasks]),
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, (label, measure) in zip(axes, measures.items(), strict=True):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            _curve(axis, [row for row in rows if row["method"] == method], measure, method, number)
        axis.set_xlabel("density: blocks computed, percent")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("symlog", linthresh=1)
    axes[0].set_yticks([0, 0.5, 1, 2, 5, 10], ["0", "0.5", "1", "2", "5", "10"])
    axes[0].axhline(0, color="grey", lw=0.8)
    if tasks:
        exact = [score(c) for c in cells if c["method"] == "dense" and c["length"] == length and c["task"] in tasks]
        axes[1].axhline(100 * (_mean(exact) or 0), color="grey", lw=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    facts = data["facts"]
    figure.suptitle(f"{facts['model']}, {length:,} tokens, {facts['device']}; hollow: as published", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(axis: Any, rows: Sequence[Row], measure: Any, method: str, number: int) -> None:
    from matplotlib import colormaps

    colour, marker = colormaps["tab10"](number % 10), MARKERS[number % len(MARKERS)]
    points = [(100 * row["density"], measure(row), row["setting"]) for row in rows]
    points = sorted(point for point in points if point[1] is not None)
    line = [point for point in points if point[2] != "published"]
    wide = 2.5 if method.startswith("calibrated") else 1.2
    if points:
        x, y, _ = zip(*(line or points), strict=True)
        axis.plot(x, y, color=colour, marker=marker, ms=5, lw=wide, label=method)
    for x, y, setting in points:
        if setting == "published":
            axis.plot([x], [y], color=colour, marker=marker, ms=9, fillstyle="none", ls="none")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
