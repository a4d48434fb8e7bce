"""The page as HTML: one file, with its pictures in it, that loads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template
from typing import Any

from . import figures
from .findings import calibrated_on, error_text, findings, time_text, tradeoff_text
from .record import ERRORS, Entry, Record, count, number, percent
from .svg import BLUE, GREY, INK, text

_WORDS = {"warning": "Warning", "note": "Worth knowing", "good": "All good"}


def render(record: Record) -> str:
    """The whole page.

    Raises:
        ValueError: when the statistics are damaged.
    """
    title = f"Sparse attention of {record.model}"
    parts = [
        f"<h1>{text(title)}</h1>",
        f'<p class="soft"><code>{text(record.name)}</code>, calibrated {text(calibrated_on(record))}</p>',
        _tiles(record),
        _section("In plain words", _findings(record)),
        f'<div class="pair">{_sparsity(record)}{_bounds(record)}</div>',
        f'<div class="pair">{_tradeoff(record)}{_times(record)}</div>',
        _section("Error against density, layer by layer", _layers(record)),
        _section("Block maps", _maps(record)),
        _section("What it was calibrated on", _facts(record)),
    ]
    template = Template(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    return template.substitute(title=text(title), body="\n".join(parts))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>"


def _figure(chart: str, caption: str = "") -> str:
    return f"<figure>{chart}{f'<figcaption>{text(caption)}</figcaption>' if caption else ''}</figure>"


def _tiles(record: Record) -> str:
    heads = sum(1 for _ in record.heads())
    tiles = [
        ("left out", percent(record.sparsity), "of the blocks, mean of the layers"),
        (
            "sparse heads",
            f"{sum(1 for _ in record.heads(sparse=True))} of {heads}",
            f"in {record.size}",
        ),
    ]
    for kind, name in (("mean", "mean error"), ("tail", "tail error")):
        value, *words = error_text(record, kind).removeprefix("at most ").split(" ", 1)
        tiles.append((name, f"≤ {value}", " ".join(words)))
    if (shown := time_text(record)) != "not measured":
        dense, sparse, gain = shown.split(", ", 2)
        tiles.append(("speed of attention", gain.split(" ")[0], f"{dense}, {sparse}"))
    boxes = (f"<div><dt>{text(a)}</dt><dd>{text(b)} <small>{text(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(boxes)}</dl>'


def _findings(record: Record) -> str:
    items = (
        f'<li class="{item.level}"><b>{_WORDS[item.level]}</b> {text(item.text)}</li>' for item in findings(record)
    )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _sparsity(record: Record) -> str:
    dense = "" if all(head["is_sparse"] for _, head in record.heads()) else " Grey: the head runs dense."
    words = f"<p>Share of the blocks that each head leaves out. Choose a row to see the layer's curves.{dense}</p>"
    return _section("Sparsity by layer and head", words + _figure(figures.heat_map(record) + figures.scale()))


def _bounds(record: Record) -> str:
    chart, title = figures.against_bounds(record), "Achieved error and bound"
    if not chart:
        return _section(title, "<p>No head is sparse.</p>")
    how = "as shares of their bounds" if record.bounded else "relative to the exact output; no bound was set for heads"
    words = f"<p>Errors of every sparse head, by the real kernel on prompts kept aside, {how}.</p>"
    triangle = f'<path d="M8 1l5 9h-10z" fill="{INK}"/>'
    marks = figures.legend(
        (f'<circle cx="8" cy="6" r="4" fill="{BLUE}"/>', "mean error"), (triangle, "99.5th percentile query")
    )
    return _section(title, words + _figure(chart) + marks)


def _tradeoff(record: Record) -> str:
    chart, tradeoff = figures.tradeoff_curve(record), record.tradeoff
    if tradeoff is None:
        return _section("Trade-off of the whole model", "<p>The file holds none.</p>")
    what = figures.error_name(tradeoff)
    words = (
        f"The least {what} for every share of computed blocks, when thresholds of all heads are chosen together. "
        + "Another point can be chosen when the file is loaded, for example with <code>sparsity=0.6</code>."
        + f" Now: {text(tradeoff_text(record))}."
    )
    marks = [(f'<path d="M0 6h16" stroke="{BLUE}" stroke-width="2.2"/>', "candidates that hold the bounds of heads")]
    if not all(bool(layer.allowed.all()) for layer in tradeoff.layers):
        dashed = f'<path d="M0 6h16" stroke="{GREY}" stroke-width="1.6" stroke-dasharray="3 3"/>'
        marks.append((dashed, "all candidates"))
    else:
        marks = [(marks[0][0], "all candidates")]
    marks.append((f'<circle cx="8" cy="6" r="5" fill="{BLUE}"/>', "chosen"))
    if tradeoff.measured is not None:
        marks.append((f'<path d="M8 1l5 5-5 5-5-5z" fill="#fff" stroke="{INK}" stroke-width="1.5"/>', "measured"))
    return _section("Trade-off of the whole model", f"<p>{words}</p>{_figure(chart)}{figures.legend(*marks)}")


def _layers(record: Record) -> str:
    """The curves and the heads of every layer; the script shows one at a time."""
    options, parts = [], []
    for i, entry in enumerate(record.layers):
        name = f"layer {text(number(entry))}: {percent(entry['mean_sparsity'])} left out"
        options.append(f'<option value="layer-{i}">{name}</option>')
        charts = "".join(_figure(figures.curves(entry, kind)) for kind in ERRORS if entry.get("curves"))
        parts.append(
            f'<div class="layer" id="layer-{i}"><h3>Layer {text(number(entry))}</h3>'
            f'<div class="charts">{charts}</div>{_heads(entry)}</div>'
        )
    words = (
        "A line per head: the error of selection under every threshold that was tried, on the prompts that thresholds "
        "are fitted to. Left: the mean over queries. Right: the tail, the 99.5th percentile of one query's error. A "
        "numbered point is the head's choice"
        + ("; it must stand below the bound with 95% confidence, hence the distance." if record.bounded else ".")
        if any(entry.get("curves") for entry in record.layers)
        else "No curves were recorded; these are the numbers."
    )
    chooser = f'<p><label>Show <select id="layer">{"".join(options)}</select></label></p>'
    return f"<p>{words}</p>" + chooser + "".join(parts)


_COLUMNS = {
    "threshold": "cdfthreshd", "left out": "sparsity", "mean error": "l1_total", "tail error": "tail_total",
    "of selection": "l1_selection", "tail of selection": "tail_selection",
}  # fmt: skip


def _heads(entry: Entry) -> str:
    rows = []
    for head in entry["heads"]:
        if head["is_sparse"]:
            cells = [
                percent(head[key]) if key == "sparsity" else f"{head.get(key, 0.0):.4g}" for key in _COLUMNS.values()
            ]
            rows.append([head["head"], *cells])
        else:
            rows.append([head["head"], f"runs dense: {head['runs_dense_because'] or 'no reason was recorded'}"])
    return f"<details><summary>Numbers of every head</summary>{_table(['head', *_COLUMNS], rows)}</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; a row that is shorter than the header ends in a cell of words."""
    lines = []
    for row in rows:
        cells = [f"<td>{text(value)}</td>" for value in row]
        if len(row) < len(header):
            cells[-1] = f'<td class="words" colspan="{len(header) - len(row) + 1}">{text(row[-1])}</td>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _times(record: Record) -> str:
    chart, title = figures.times_by_layer(record), "Time by layer"
    if not chart:
        return _section(title, "<p>Not known: nothing was timed.</p>")
    square = '<rect x="2" y="1" width="11" height="10" fill="{}"/>'
    marks = [(square.format(GREY), "dense"), (square.format(BLUE), "sparse")]
    if record.times("expected"):
        marks.append((f'<path d="M1 6h14" stroke="{INK}" stroke-width="2.5"/>', "expected by the cost model"))
    words = "One call of each layer, with exact dense attention and as it is served, selection included"
    words += f": {time_text(record)}." if record.times("measured") or record.times("expected") else "."
    return _section(title, f"<p>{text(words)}</p>{_figure(chart)}{figures.legend(*marks)}")


def _maps(record: Record) -> str:
    found = figures.all_block_maps(record)
    if not found:
        return "<p>No block maps were recorded.</p>"
    words = (
        "<p>The blocks that the sparsest heads of the model keep, and the densest of those that are sparse, in the "
        "first observed call of a prompt kept aside. Dark: computed. Light: left out. White: nothing to see there.</p>"
    )
    return words + f'<div class="maps">{"".join(_figure(chart, caption) for caption, chart in found)}</div>'


def _precision(record: Record) -> str | None:
    """Of the sparse kernels, and in how many layers where they differ."""
    found = Counter(entry.get("precision") or record.info.get("precision") for entry in record.layers)
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{name} in {count(layers, 'layer')}" for name, layers in found.most_common())


def _facts(record: Record) -> str:
    info, first, about = record.info, record.layers[0], record.info.get("about") or {}
    selector = info.get("selector")
    if isinstance(selector, dict):
        fields = ", ".join(f"{key}={value}" for key, value in selector.items() if key != "class" and value is not None)
        selector = f"{selector.get('class')}({fields})"
    facts = {
        "model": " of class ".join(dict.fromkeys(filter(None, (record.model, info.get("model_class"))))),
        **{key: value for key, value in about.items() if key != "model"},
        "calibrated": calibrated_on(record),
        "query blocks": f"{first['query_blocks_per_call']} looked at per call, at random, for the curves"
        if first.get("query_blocks_per_call") else None,
        "chosen by": f"one budget, {record.tradeoff.target}" if record.tradeoff and record.tradeoff.target
        else "bounds for every head",
        "bounds": ", ".join(f"{key}={info[key]:.3g}" for key in ("l1", "pv_l1", "tail") if info.get(key)) or "none",
        "selector": selector,
        "precision": _precision(record),
        "dense steps": info.get("dense_steps"),
        "checked by": f"the kernels `{first['check_backend']}`" if first.get("check_backend") else None,
        "device": info.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items()),
    }  # fmt: skip
    rows = (f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in facts.items() if value)
    return f'<dl class="facts">{"".join(rows)}</dl>'
