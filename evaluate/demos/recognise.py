"""A simple recogniser for the demo Wan's clips: which objects, of which colour, shape and move, can be seen."""

from __future__ import annotations

import _model  # noqa: F401
import numpy as np
import torch
from clips import FRAMES
from prompts import COLOURS, PALETTE, Thing
from torch import Tensor
from torch.nn import functional


def recognise(frames: Tensor) -> set[Thing]:
    """What can be seen in a clip `[F, H, W, 3]`: colours by hue, shapes by how they fill their boxes, moves by tracks.

    A colour counts where it covers 40 pixels in half of the frames. A shape or move that is none of the known ones
    is the empty string, so that such a clip equals no prompt.
    """
    pixels = frames.movedim(-1, 0).clamp(0, 1).float().contiguous()
    hues = torch.tensor(list(PALETTE.values()), device=pixels.device)
    hues = functional.normalize(hues - hues.mean(-1, keepdim=True), dim=-1)
    nearest = torch.tensordot(hues, pixels - pixels.mean(0), dims=1).argmax(0)
    vivid = pixels.amax(0) - pixels.amin(0) > 0.3
    labels = torch.where(vivid, nearest, -1).cpu().numpy()
    seen = set()
    for index, colour in enumerate(COLOURS):
        masks = labels == index
        areas = masks.sum((1, 2))
        if np.median(areas) >= 40:
            seen.add(Thing(colour, _shape_of(masks, areas), _move_of(masks, areas)))
    return seen


def _shape_of(masks: np.ndarray, areas: np.ndarray) -> str:
    """By the share of its bounding box that it fills, in the frames that show most of it."""
    fills = []
    for mask in masks[areas >= 0.85 * areas.max()]:
        rows, columns = (np.flatnonzero(mask.sum(axis) >= 2) for axis in (1, 0))
        if len(rows) and len(columns):
            fills.append(mask.sum() / np.ptp(rows[[0, -1]] + [0, 1]) / np.ptp(columns[[0, -1]] + [0, 1]))
    fill = np.median(fills) if fills else 0.0
    bounds = ((0.38, 0.68, "triangle"), (0.72, 0.88, "circle"), (0.90, 1.01, "square"))
    return next((shape for low, high, shape in bounds if low <= fill <= high), "")


def _move_of(masks: np.ndarray, areas: np.ndarray) -> str:
    """By a straight line through its centres, in the frames in which it is not hidden."""
    time = np.flatnonzero(areas >= 0.6 * areas.max())
    centres = np.array([np.argwhere(masks[t]).mean(0) for t in time])  # y, x
    line = np.polyfit(time, centres, 1)
    misses = (centres - (line[0] * time[:, None] + line[1])).std(0)
    (down, right) = line[0] * (FRAMES - 1)
    if misses[0] > 2.5 and misses[1] < 2 and abs(right) < 8:
        return "bounces"
    if misses.max() > 2 or min(abs(down), abs(right)) > 8 or max(abs(down), abs(right)) < 16:
        return ""
    if abs(right) > abs(down):
        return "moves right" if right > 0 else "moves left"
    return "moves down" if down > 0 else "moves up"
