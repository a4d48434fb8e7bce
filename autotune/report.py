"""The report of a calibration: statistics as JSON beside a tuned file, a table, a summary, and a page to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import files, page
from .accumulate import Grid
from .choose import mean_error, tail_error
from .layer import Layer
from .machine import Times
from .storage import write_text
from .tradeoff import Tradeoff
from .tuned import FILE_KEYS

Statistics = list[dict[str, Any]]
_THRESHOLDS = {key: name for key, name in FILE_KEYS.items() if key != "is_sparse"}


def layer_statistics(layer: Layer, grid: Grid, times: Times | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything recorded of one layer.

    Errors are those of the check with the real kernel on the prompts kept aside: ``l1`` the mean relative L1 error,
    ``tail`` the 99.5th percentile over queries; of selection alone and of everything ("total"). Dense heads have
    error 0. ``curves``: what every candidate (``threshold``, ``sim``) gave on the prompts fitted, selection alone:
    ``density``, ``mean`` and ``tail`` error, each ``[heads][candidates]``. ``expected_ms``: dense and sparse, of
    the longest call, by the cost model; null where it has no row for this machine.
    """
    assert layer.check is not None
    tuned = layer.in_force()
    sparse = tuned.is_sparse.cpu()
    sparsity = torch.where(sparse, 1 - layer.check.density()[:, 1], 0.0)
    mean, tail = mean_error(layer.check), tail_error(layer.check)
    heads = []
    for h in range(len(sparse)):
        on = bool(sparse[h])
        heads.append(
            {
                "head": h,
                "is_sparse": on,
                "sparsity": round(float(sparsity[h]), 4),
                **{key: round(float(getattr(tuned, name)[h]), 6) for key, name in _THRESHOLDS.items()},
                "l1_selection": round(float(mean[h, 0]), 6) if on else 0.0,
                "l1_total": round(float(mean[h, 1]), 6) if on else 0.0,
                "tail_selection": round(float(tail[h, 0]), 6) if on else 0.0,
                "tail_total": round(float(tail[h, 1]), 6) if on else 0.0,
                "runs_dense_because": None if on else layer.reasons[h],
            }
        )
    return {
        "layer_idx": layer.index if layer.module.layer_idx is None else layer.module.layer_idx,
        "path": layer.path,
        "mean_sparsity": round(float(sparsity.mean()), 4),
        **dict(zip(("l1", "pv_l1", "tail"), layer.bounds, strict=True)),
        "lengths": list(layer.lengths) if layer.lengths else None,
        "check_backend": layer.check_backend,
        **facts,
        "expected_ms": _expected_ms(layer, times),
        "curves": _curves(layer, grid),
        "heads": heads,
    }


def _curves(layer: Layer, grid: Grid) -> dict[str, Any]:
    """Densities and errors of every candidate, of four digits."""
    assert layer.curves is not None
    pairs = grid.pairs(layer.module.selector)
    found = {"density": layer.curves.density(), "mean": mean_error(layer.curves), "tail": tail_error(layer.curves)}
    rounded = {name: [[float(f"{x:.4g}") for x in head] for head in values.tolist()] for name, values in found.items()}
    return {"threshold": [threshold for _, threshold in pairs], "sim": [sim for sim, _ in pairs], **rounded}


def _expected_ms(layer: Layer, times: Times | None) -> list[float] | None:
    if times is None:
        return None
    tuned = layer.in_force()
    density = 1.0 if tuned.expected_density is None else tuned.expected_density
    return [round(times.dense, 4), round(times.dense if tuned.all_dense else times.sparse(density), 4)]


def machine_facts(layers: Sequence[Layer]) -> dict[str, Any]:
    """What a tuned file says of the machine that it was made on: its name, and times of a call of each layer."""
    device = layers[0].module.is_sparse.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    measured = {page.unit(x.path, x.phase): list(x.measured_ms) for x in layers if x.measured_ms is not None}
    return {"device": name, "measured_ms": measured}


def statistics_path(tuned: str | os.PathLike[str]) -> Path:
    """Where the statistics of a tuned file go."""
    path = Path(tuned)
    return path.with_suffix(".json") if path.suffix == ".pt" else path.with_name(path.name + ".json")


def write_statistics(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Write the statistics as JSON that people can read, a line per head; the file appears whole or not at all."""
    layers = []
    for entry in statistics:
        facts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items() if key != "heads"]
        heads = ",\n".join("    " + json.dumps(head) for head in entry["heads"])
        layers.append(" {\n" + ",\n".join([*facts, f'  "heads": [\n{heads}\n  ]']) + "\n }")
    write_text("[\n" + ",\n".join(layers) + "\n]\n", path)


def page_path(tuned: str | os.PathLike[str]) -> Path:
    """Where the page of a tuned file goes."""
    return statistics_path(tuned).with_suffix(".html")


def read(tuned: str | os.PathLike[str]) -> page.Record:
    """What a tuned file and the statistics beside it say.

    Raises:
        FileNotFoundError: when one of them is not there.
        ValueError: when one is damaged, or they are not of one calibration.
    """
    state, beside = files.load(tuned), statistics_path(tuned)
    try:
        statistics = json.loads(beside.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no statistics beside {str(tuned)!r}: a calibration writes {str(beside)!r}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read the statistics {str(beside)!r}: {error}") from error
    info = state.get("_metadata") or {}
    tradeoff = None if info.get("tradeoff") is None else Tradeoff.read(info["tradeoff"])
    record = page.Record(Path(tuned).name, info, statistics, tradeoff, _others(state, statistics))
    ours, theirs = (
        {f"{entry['path']}.is_sparse" for entry in statistics},
        {k for k in state if k.endswith(".is_sparse")},
    )
    if ours != theirs:
        other = sorted(ours ^ theirs)[0].removesuffix(".is_sparse")
        raise ValueError(f"{str(beside)!r} does not belong to {str(tuned)!r}: only one of them has the layer {other!r}")
    return record


def _others(state: files.State, statistics: Statistics) -> bool:
    """Whether a file's thresholds are others than those of the statistics."""
    try:
        return any(
            abs(float(_of_phase(state[f"{entry['path']}.{key}"], entry)[head["head"]]) - head[key]) > 1e-5
            for entry in statistics for head in entry["heads"] for key in ("is_sparse", "cdfthreshd")
        )  # fmt: skip
    except (KeyError, IndexError, TypeError):  # not even its layers and heads; Record and read say so
        return False


def _of_phase(values: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """Values ``[heads]`` of the phase that an entry of the statistics is about."""
    return values[entry["phase"]] if values.dim() == 2 else values


def write_page(tuned: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a tuned file: one HTML file that loads nothing, beside it unless ``path`` says where.

    Raises:
        FileNotFoundError, ValueError: as :func:`read`.
    """
    target = page_path(tuned) if path is None else Path(path)
    write_text(page.render(read(tuned)), target)
    return target


def summary(tuned: str | os.PathLike[str]) -> str:
    """The page of a tuned file in a few lines, for a terminal."""
    return page.summary(read(tuned))


def table(statistics: Statistics) -> str:
    """One line per layer: sparsity, sparse heads, largest achieved errors."""
    lines = [f"{'layer':>5}  {'sparsity':>8}  {'sparse heads':>12}  {'worst mean error':>16}  {'worst tail error':>16}"]
    for entry in statistics:
        heads = entry["heads"]
        count = f"{sum(head['is_sparse'] for head in heads)}/{len(heads)}"
        worst = [max(head[name] for head in heads) for name in ("l1_total", "tail_total")]
        figures = f"{entry['mean_sparsity']:>8.1%}  {count:>12}  {worst[0]:>16.4f}  {worst[1]:>16.3f}"
        index = f"{'2:' if entry['path'].startswith('transformer_2.') else ''}{entry['layer_idx']}"
        lines.append(f"{index:>5}  {figures}")
    mean = sum(entry["mean_sparsity"] for entry in statistics) / len(statistics)
    lines.append(f"{'all':>5}  {mean:>8.1%}")
    return "\n".join(lines)
