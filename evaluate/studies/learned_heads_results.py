"""Results of the study of streaming heads: quality with confidence beside KV memory, tables, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frontier_results import resampled
from long_results import MARKERS
from retrieval import PAIRS
from torch import Tensor

from modify_model import StreamingCache
from modify_model.streaming_layer import StreamingLayer

Row = dict[str, Any]
DENSE = "dense"
BLOCK = 128  # of a streaming head's rule
Z = 1.96  # of 95% limits
HEAD = ["heads", "streaming", "sink + window", "KV memory", "perplexity (95% limits)"]
KEYS, NEEDLES = "keys and values", "needles, pass keys"  # groups of tasks


def kv_memory(sparsity: float, sink: int, window: int, length: int) -> float:
    """Share of a full cache's entries that is held after ``length`` tokens, when a share of the KV heads streams.

    A streaming head holds whole blocks: those of the sink, and those from the first one on that the next token's block
    sees in its window. `StreamingCache` holds the same (``held`` of the results).
    """
    begin = max(0, length // BLOCK * BLOCK - window + 1) // BLOCK * BLOCK
    held = min(length, -(-sink // BLOCK) * BLOCK + length - begin)
    return 1 - sparsity * (1 - held / length)


def held(model: Any, ids: Tensor) -> float:
    """Entries that a StreamingCache holds after some tokens ``[1, L]``, as a share of a full cache's."""
    cache = StreamingCache(model)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = full = 0
    for layer in cache.layers:
        parts = [layer.full, layer.tail] if isinstance(layer, StreamingLayer) else [layer]
        held += sum(part.keys.shape[1] * part.keys.shape[2] for part in parts)
        full += sum(part.keys.shape[1] for part in parts) * ids.shape[1]
    return held / full


def wilson(share: float, count: int) -> tuple[float, float]:
    """95% limits of a share found in ``count`` independent trials (Wilson's score interval)."""
    middle, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return (middle - spread) / (1 + Z**2 / count), (middle + spread) / (1 + Z**2 / count)


class Point:
    """One choice of heads at one sparsity, sink and window; choices that differ in their seed are one point.

    Attributes:
        name, sparsity, sink, window: what it is.
        memory: share of a full cache.
        nats: by seed and source, loss over the dense model's ``[windows]``.
        found: by group of tasks, answers found of each seed.
        prompts: by group of tasks, how many one seed had.
    """

    def __init__(self, name: str, setting: str, cells: Sequence[Row], dense: dict[str, Row]) -> None:
        self.name = name
        sparsity, _, sizes = setting.partition(" ")
        self.sparsity = float(sparsity)
        self.sink, self.window = map(int, sizes.split("+"))
        self.memory = kv_memory(self.sparsity, self.sink, self.window, cells[0]["length"])
        self.nats: list[dict[str, np.ndarray]] = []
        self.found: dict[str, list[float]] = {}
        for seed in dict.fromkeys(cell["method"] for cell in cells):
            own = [cell for cell in cells if cell["method"] == seed]
            losses = {cell["task"]: np.array(cell["by_window"]) for cell in own if "by_window" in cell}
            self.nats.append({task: nats - dense[task]["by_window"] for task, nats in losses.items()})
            answered = grouped(own)
            self.prompts = {group: count for group, (_, count) in answered.items()}
            for group, (count, _) in answered.items():
                self.found.setdefault(group, []).append(count)

    def changes(self, picks: dict[str, np.ndarray] | None = None) -> list[float]:
        """Change of the perplexity of each seed, mean over sources; of the windows picked."""
        picked = [[x if picks is None else x[picks[source]] for source, x in nats.items()] for nats in self.nats]
        return [float(np.mean([np.expm1(nats.mean()) for nats in some])) for some in picked]

    def change_limits(self, draws: Sequence[dict[str, np.ndarray]]) -> tuple[float, float]:
        """95% limits of the change by windows drawn again; of several seeds the least and the greatest."""
        if len(self.nats) > 1:
            return min(self.changes()), max(self.changes())
        low, high = np.quantile([self.changes(picks)[0] for picks in draws], [0.025, 0.975])
        return float(low), float(high)

    def share(self, group: str) -> tuple[float, float, float]:
        """Share of answers found, and its 95% limits; of several seeds the least and the greatest."""
        shares = [count / self.prompts[group] for count in self.found[group]]
        if len(shares) > 1:
            return float(np.mean(shares)), min(shares), max(shares)
        return (shares[0], *wilson(shares[0], self.prompts[group]))


def grouped(cells: Sequence[Row]) -> dict[str, tuple[float, int]]:
    """Answers found and prompts, by group of tasks."""
    found: dict[str, tuple[float, int]] = {}
    for cell in cells:
        if "exact" in cell:
            group = KEYS if cell["task"] in PAIRS else NEEDLES
            hits, count = found.get(group, (0.0, 0))
            found[group] = hits + cell["exact"] * cell["samples"], count + cell["samples"]
    return found


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


def tables(data: Row, served: int | None = None) -> str:
    """Points with their limits, and how the gates separate, in Markdown; of the first ``served`` sinks and windows."""
    dense, found = points(data)
    answered = grouped([*dense.values()])
    rows = [[*HEAD, *answered], ["---"] * (len(HEAD) + len(answered))]
    exact = [(hits / count, *wilson(hits / count, count)) for hits, count in answered.values()]
    rows.append([DENSE, "0%", "–", "100%", "–", *map(_limited, exact)])
    draws = resampled({task: len(cell["by_window"]) for task, cell in dense.items() if "by_window" in cell})
    sizes = list(dict.fromkeys((point.sink, point.window) for point in found))[:served]
    for point in found:
        if (point.sink, point.window) in sizes:
            change, (low, high) = float(np.mean(point.changes())), point.change_limits(draws)
            rows.append([
                point.name, f"{point.sparsity:.0%}", f"{point.sink} + {point.window}", f"{point.memory:.0%}",
                f"{change:+.1%} ({100 * low:.1f} to {100 * high:.1f})",
                *(_limited(point.share(group)) for group in answered),
            ])  # fmt: skip
    return "\n\n".join("\n".join("| " + " | ".join(row) + " |" for row in part) for part in (rows, _separation(data)))


def _limited(values: tuple[float, float, float]) -> str:
    share, low, high = values
    return f"{share:.0%} ({100 * low:.0f} to {100 * high:.0f})"


def _separation(data: Row) -> list[list[str]]:
    """Quantiles of the gates of every training."""
    rows = [["gates", "steps, seconds", "asked for, reached", "10%", "25%", "50%", "75%", "90%", "verdict"]]
    rows.append(["---"] * len(rows[0]))
    for name, facts in data["settings"].items():
        if "gates" in facts:
            last = [row for row in facts["log"] if "sparsity" in row][-1]
            quantiles = [f"{x:.2f}" for x in np.quantile(np.ravel(facts["gates"]), [0.1, 0.25, 0.5, 0.75, 0.9])]
            said = next(iter(facts["separation"].values()))["warning"]
            reached = f"{last['target_sparsity']:.0%}, {last['sparsity']:.0%}"
            steps = f"{facts['steps']}, {facts['log'][-1]['train_runtime']:.0f}"
            rows.append([name, steps, reached, *quantiles, said or "they separate"])
    return rows


def picture(data: Row, path: Path) -> None:
    """Retrieval and perplexity against the memory of the KV cache."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense, found = points(data)
    exact = {group: hits / count for group, (hits, count) in grouped([*dense.values()]).items()}
    window = (found[0].sink, found[0].window) if found else ()
    found = [point for point in found if (point.sink, point.window) == window]
    figure, axes = plt.subplots(1, len(exact) + 1, figsize=(4.6 * (len(exact) + 1), 4.6), layout="constrained")
    for number, name in enumerate(dict.fromkeys(point.name for point in found)):
        own = sorted((point for point in found if point.name == name), key=lambda point: -point.memory)
        style = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number}", "label": name, "ms": 5, "lw": 1.3}
        aside = (number - 3) * 0.35  # so that limits do not cover each other
        x = [100, *(100 * point.memory + aside for point in own)]
        axes[0].plot(x, [0, *(100 * np.mean(point.changes()) for point in own)], **style)
        for axis, (group, share) in zip(axes[1:], exact.items(), strict=True):
            values = 100 * np.array([(share, share, share), *(point.share(group) for point in own)])
            axis.errorbar(x, values[:, 0], np.abs(values[:, 1:] - values[:, :1]).T, elinewidth=0.7, **style)
    axes[0].set_ylabel("perplexity change on other sources, percent")
    for axis, title in zip(axes, ["perplexity", *exact], strict=True):
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
