"""The charts of the page, each as SVG: sparsity, curves, errors against bounds, times, block maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..block_maps import HIDDEN, unpack
from ..budget import curve, outcome
from ..tradeoff import Tradeoff
from .record import ERRORS, Entry, Head, Record, achieved, bound, ms, number, percent
from .svg import ABSENT, BLUE, GREY, INK, ORANGE, Axes, label, line, png, rgb, shade, text, ticks, titled, whole_ticks

PALETTE = [shade(i / 100) for i in range(101)] + [rgb(ABSENT)]  # percentages, and what has none
WORDS = {"mean": "mean error", "tail": "tail error"}
_SHORT = 400  # pixels; charts are as wide as a phone


def heat_map(record: Record) -> str:
    """Sparsity of every head: a row per layer, a column per head; rows lead to the curves of their layer."""
    rows, columns = len(record.layers), max(len(entry["heads"]) for entry in record.layers)
    values = torch.full((rows, columns), len(PALETTE) - 1)
    for i, entry in enumerate(record.layers):
        for j, head in enumerate(entry["heads"]):
            values[i, j] = round(100 * head["sparsity"]) if head["is_sparse"] else len(PALETTE) - 1
    axes = Axes(
        (0, columns), (rows, 0),
        [(j + 0.5, str(j)) for j in whole_ticks(columns)],
        [(i + 0.5, number(record.layers[i])) for i in whole_ticks(rows, 20)],
        "head", "layer", width=_SHORT, height=min(600.0, max(150.0, 13.0 * rows)) + 52, grid=False,
    )  # fmt: skip
    links = []
    for i, entry in enumerate(record.layers):
        top, bottom = axes.py(i), axes.py(i + 1)
        band = (
            f'<rect x="{axes.left:.1f}" y="{top:.1f}" width="{axes.right - axes.left:.1f}" height="{bottom - top:.1f}"'
        )
        title = f"layer {number(entry)}: {percent(entry['mean_sparsity'])} left out"
        links.append(f'<a href="#layer-{i}">{titled(title, band + " class=band />")}</a>')
    alt = (
        f"Sparsity of {rows} layers with {columns} heads: {percent(record.sparsity)} on average, by layer from "
        f"{percent(min(e['mean_sparsity'] for e in record.layers))} to "
        f"{percent(max(e['mean_sparsity'] for e in record.layers))}."
    )
    return axes.svg(alt, axes.picture(png(values, PALETTE)), *links)


def scale() -> str:
    """What the colours of the heat map mean."""
    axes = Axes((0, 100), (0, 1), [(x, f"{x}%") for x in range(0, 101, 25)], [], "left out", "", _SHORT, 72, grid=False)
    return axes.svg(
        "Colours from light, 0% left out, to dark, 100%", axes.picture(png(torch.arange(101)[None], PALETTE))
    )


def curves(entry: Entry, kind: str) -> str:
    """Error against density of every candidate threshold, a line per head, with the chosen points."""
    found, limit = entry["curves"], entry.get({"mean": "l1", "tail": "tail"}[kind])
    chosen = {head["head"]: point for head in entry["heads"] if (point := _chosen(entry, head, kind))}
    high = max([1.25 * (limit or 0.0), *(1.15 * y for _, y in chosen.values())]) or max(map(max, found[kind]))
    axes = Axes(
        (0, 100), (0, high), [(x, f"{x}%") for x in range(0, 101, 20)], [(y, f"{y:g}") for y in ticks(0, high)],
        "blocks that are computed (density)", WORDS[kind], _SHORT, 290,
    )  # fmt: skip
    drawn = [axes.across(limit, ORANGE, f"bound {limit:.3g}")] if limit else []
    for head in entry["heads"]:
        h = head["head"]
        points = sorted((100 * x, y) for x, y in zip(found["density"][h], found[kind][h], strict=True))
        shown = _below(points, high)
        marks = [axes.path(shown, GREY, ' stroke-width="1.3"')] if len(shown) > 1 else []
        if h in chosen:
            x, y = chosen[h]
            marks += [axes.dot(100 * x, y, BLUE, 7), label(axes.px(100 * x), axes.py(y) + 3.5, h, more=' class="in"')]
        what = f"density {percent(chosen[h][0])}, {WORDS[kind]} {chosen[h][1]:.3g}" if h in chosen else "runs dense"
        drawn.append(titled(f"head {h}: {what}", *marks, kind="curve"))
    alt = f"{WORDS[kind].capitalize()} against density of {len(entry['heads'])} heads of layer {number(entry)}" + (
        f"; the chosen points stand below the bound {limit:.3g}" if limit else ""
    )
    return axes.svg(alt, *drawn)


def _chosen(entry: Entry, head: Head, kind: str) -> tuple[float, float] | None:
    """Density and error of the candidate that a head has; None where it is dense or the candidate is not among them."""
    found, h = entry["curves"], head["head"]
    if not head["is_sparse"]:
        return None
    sims = found.get("sim") or [-1.0] * len(found["threshold"])
    for i, (threshold, sim) in enumerate(zip(found["threshold"], sims, strict=True)):
        if abs(threshold - head["cdfthreshd"]) < 1e-5 and abs(sim - head.get("simthreshd1", -1.0)) < 1e-5:
            return found["density"][h][i], found[kind][h][i]
    return None


def _below(points: list[tuple[float, float]], high: float) -> list[tuple[float, float]]:
    """The part of a line below a height, cut off at it."""
    kept = [point for point in points if point[1] <= high]
    above = [point for point in points if point[1] > high and (not kept or point[0] < kept[0][0])]
    if kept and above:
        (x1, y1), (x2, y2) = above[-1], kept[0]
        kept.insert(0, (x1 + (x2 - x1) * (y1 - high) / (y1 - y2), high))
    return kept


def tradeoff_curve(record: Record) -> str:
    """The whole model's predicted error against density, with the choice in force; "" where the file has none."""
    tradeoff = record.tradeoff
    if tradeoff is None:
        return ""
    free = dataclasses.replace(
        tradeoff,
        layers=tuple(dataclasses.replace(x, allowed=torch.ones_like(x.allowed)) for x in tradeoff.layers),
    )
    within, point = _curve(tradeoff), outcome(tradeoff)
    high = 2.2 * max(point.error, tradeoff.measured or 0.0) or max(y for _, y in within) or 1.0
    axes = Axes(
        (0, 100), (0, high), [(x, f"{x}%") for x in range(0, 101, 20)], [(y, f"{y:.3g}") for y in ticks(0, high)],
        "blocks that are computed (density)", error_name(tradeoff), _SHORT, 290,
    )  # fmt: skip
    drawn = []
    if not all(bool(layer.allowed.all()) for layer in tradeoff.layers):
        drawn.append(axes.path(_below(_curve(free), high), GREY, ' stroke-width="1.6" stroke-dasharray="3 3"'))
    drawn.append(axes.path(_below(within, high), BLUE, ' stroke-width="2.2"'))
    if (target := tradeoff.target) is not None and target.name == "error":
        drawn.append(axes.across(target.value, ORANGE, str(target)))
    if target is not None and target.name == "sparsity":
        at = axes.px(100 * (1 - target.value))
        drawn += [line(at, axes.top, at, axes.bottom, ORANGE, ' stroke-width="1.5" stroke-dasharray="6 4"')]
        side, anchor = (-5, "end") if target.value < 0.4 else (5, "start")
        drawn += [label(at + side, axes.top + 14, target, anchor=anchor, more=' class="halo"')]
    words = f"chosen: density {percent(1 - point.sparsity)}, predicted {point.error:.3g}"
    drawn.append(titled(words, axes.dot(100 * (1 - point.sparsity), point.error, BLUE, 6)))
    if tradeoff.measured is not None:
        at, top = axes.px(100 * (1 - record.sparsity)), axes.py(tradeoff.measured)
        mark = f'<path d="M{at:.1f} {top - 7:.1f}l7 7-7 7-7-7z" fill="#fff" stroke="{INK}" stroke-width="2"/>'
        drawn.append(titled(f"measured: {tradeoff.measured:.3g}", mark))
    return axes.svg(f"{error_name(tradeoff).capitalize()} of the whole model against density; {words}", *drawn)


def _curve(tradeoff: Tradeoff) -> list[tuple[float, float]]:
    """Density in percent and predicted error along a trade-off, by density."""
    return sorted({(100 * (1 - point.sparsity), point.error) for point in curve(tradeoff)})


def error_name(tradeoff: Tradeoff) -> str:
    """What the errors of a trade-off are."""
    return "mean error of layers" if tradeoff.measure is None else f"predicted {tradeoff.measure}"


def against_bounds(record: Record) -> str:
    """Every sparse head's errors in the check as shares of their bounds, or as they are; "" where no head is sparse."""
    bounded = record.bounded
    marks = []
    for i, entry in enumerate(record.layers):
        for head in entry["heads"]:
            # What counts as 1, so that shares are percentages and errors stay what they are.
            units = {kind: (bound(entry, kind) or 0.0) / 100 if bounded else 1.0 for kind in ERRORS}
            shown = {kind: achieved(head, kind) / unit for kind, unit in units.items() if unit}
            if head["is_sparse"] and shown:
                marks.append((i, entry, head, shown))
    if not marks:
        return ""
    most = max(max(shown.values()) for _, _, _, shown in marks)
    rows, high = len(record.layers), 1.15 * (max(most, 100.0) if bounded else most or 1.0)
    axes = Axes(
        (-0.6, rows - 0.4), (0, high),
        [(i, number(record.layers[i])) for i in whole_ticks(rows)],
        [(y, f"{y:g}{'%' if bounded else ''}") for y in ticks(0, high)],
        "layer", "share of the bound" if bounded else "error", _SHORT, 290,
    )  # fmt: skip
    drawn = [axes.across(100, ORANGE, "bound")] if bounded else []
    for i, entry, head, shown in marks:
        dots = []
        if "mean" in shown:
            dots.append(axes.dot(i - 0.15, shown["mean"], BLUE, 3.5, ' fill-opacity=".75"'))
        if "tail" in shown:
            x, y = axes.px(i + 0.15), axes.py(shown["tail"])
            dots.append(f'<path d="M{x:.1f} {y - 4.5:.1f}l4 7h-8z" fill="{INK}" fill-opacity=".6"/>')
        words = ", ".join(f"{WORDS[kind]} {achieved(head, kind):.3g}" for kind in shown)
        drawn.append(titled(f"layer {number(entry)}, head {head['head']}: {words}", *dots))
    which = f"{most:.0f}% of the nearer bound" if bounded else f"{most:.3g}"
    return axes.svg(f"Errors of {len(marks)} sparse heads in the check: at most {which}.", *drawn)


def times_by_layer(record: Record) -> str:
    """Milliseconds of every layer, dense and sparse: measured as bars, expected as lines over them; "" if unknown."""
    known = [
        (i, kind, pair)
        for i, e in enumerate(record.layers)
        for kind in ("measured", "expected")
        if (pair := record.times_of(e, kind))
    ]
    if not known:
        return ""
    rows, high = len(record.layers), 1.15 * max(max(pair) for _, _, pair in known)
    axes = Axes(
        (-0.6, rows - 0.4), (0, high),
        [(i, number(record.layers[i])) for i in whole_ticks(rows)],
        [(y, f"{y:g}") for y in ticks(0, high)],
        "layer", "milliseconds", _SHORT, 290,
    )  # fmt: skip
    bars: list[str] = []
    lines: list[str] = []
    for i, kind, pair in known:
        for shift, colour, value, name in ((-0.38, GREY, pair[0], "dense"), (0.02, BLUE, pair[1], "sparse")):
            left, right, top = axes.px(i + shift), axes.px(i + shift + 0.36), axes.py(value)
            if kind == "expected":
                word, mark = "expected", line(left, top, right, top, INK, ' stroke-width="2.5"')
            else:
                size = f'width="{right - left:.1f}" height="{axes.bottom - top:.1f}"'
                word, mark = "measured", f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{colour}"/>'
            title = f"layer {number(record.layers[i])}, {name}: {ms(value)} {word}"
            (lines if kind else bars).append(titled(title, mark))
    return axes.svg(f"Time of {rows} layers, dense and sparse, in milliseconds", *bars, *lines)


def block_map(entry: Entry, found: dict[str, Any]) -> str:
    """Which blocks one head kept in one call.

    Raises:
        ValueError: when the map is damaged.
    """
    values = unpack(found)
    if bool(((values > 100) & (values != HIDDEN)).any()):
        raise ValueError("a block map of the statistics is damaged: it holds percentages above 100")
    # Kept or not, or how much of the blocks that share a pixel; what is hidden is the paper's white.
    light, dark = rgb("#dfe7ee"), rgb("#08306b")
    mixed = [tuple(round(a + (b - a) * i / 100) for a, b in zip(light, dark, strict=True)) for i in range(101)]
    palette: list[Any] = mixed + [(255, 255, 255)] * (HIDDEN + 1 - len(mixed))
    blocks = found["blocks"]
    axes = Axes(
        (0, blocks[1]), (blocks[0], 0),
        [(x, f"{x:g}") for x in ticks(0, blocks[1], 4)], [(y, f"{y:g}") for y in ticks(0, blocks[0], 4)],
        "block of keys", "block of queries", 260, 262, grid=False,
    )  # fmt: skip
    size = f"{blocks[0]} x {blocks[1]}"
    alt = f"Blocks that head {found['head']} of layer {number(entry)} keeps: {percent(found['density'])} of {size}"
    return axes.svg(alt, axes.picture(png(values, palette)))


def all_block_maps(record: Record) -> Sequence[tuple[str, str]]:
    """Caption and chart of all block maps, sparsest first."""
    found = [(m["density"], entry, m) for entry in record.layers for m in entry.get("block_maps") or ()]
    found.sort(key=lambda item: item[0])
    return [
        (f"layer {number(entry)}, head {m['head']}: keeps {percent(density)}", block_map(entry, m))
        for density, entry, m in found
    ]


def legend(*items: tuple[str, str]) -> str:
    """What marks mean: pairs of a mark (SVG of 16 x 12 pixels) and a text."""
    shown = (
        f'<span><svg viewBox="0 0 16 12" width="16" height="12" aria-hidden="true">{mark}</svg> {text(words)}</span>'
        for mark, words in items
    )
    return f'<p class="legend">{"".join(shown)}</p>'
