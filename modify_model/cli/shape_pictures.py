"""Pictures of shapes: what several ways of computing one gave, side by side, seen from three sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

_VIEWS = (("from the front", 2), ("from the right", 0), ("from above", 1))  # along -z, -x and -y of the volume
_LIGHT = np.array([0.4, 0.5, 0.77])


def shaded(volume: Tensor, axis: int) -> np.ndarray:
    """A field ``[n, n, n]``, positive inside, seen from the far end of an axis: grey ``[n, n]`` in 0..1 on white."""
    field = np.moveaxis(volume.float().cpu().numpy(), axis, 0)[::-1]
    inside = field > 0
    first = inside.argmax(0)  # the first point inside along the view
    slopes = np.stack([np.take_along_axis(part, first[None], 0)[0] for part in np.gradient(field)], axis=-1)
    normals = -slopes / np.maximum(np.linalg.norm(slopes, axis=-1, keepdims=True), 1e-12)
    normals[..., 0] *= -1  # against the view
    light = np.clip(normals @ _LIGHT[::-1], 0, 1)
    depth = 1 - first / len(field)
    grey = np.where(inside.any(0), 0.15 + 0.6 * light * (0.4 + 0.6 * depth), 1.0)
    return np.flipud(grey.T)


def write(volumes: Mapping[str, Tensor], path: Path) -> Path:
    """Write one picture, a row for each volume ``[n, n, n]`` by name; returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(_VIEWS), 2.7 * len(volumes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(volumes), len(_VIEWS), squeeze=False)
    for row, (name, volume) in zip(axes, volumes.items(), strict=True):
        for place, (view, axis) in zip(row, _VIEWS, strict=True):
            place.imshow(shaded(volume, axis), cmap="gray", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
            place.set_title(f"{name}, {view}", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
