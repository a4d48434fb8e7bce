"""Pictures of a comparison: clips dense and sparse side by side, and the sparsity of every layer at every step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .compare import Comparison, mean_sparsity

SHEET_FRAMES = 6  # frames of a clip on the sheet
SMALL, LARGE = 192, 480  # widths to which small frames are enlarged and large ones reduced, in pixels
_BAR, _GAP, _INK, _PAPER = 20, 6, (20, 20, 20), (255, 255, 255)


def write(comparisons: Sequence[Comparison], folder: Path, facts: dict[str, Any]) -> list[Path]:
    """Write ``compare.gif`` (of clips), ``sheet.png``, ``sparsity.png`` and ``compare.json``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "sheet.png"]
    count = len(comparisons[0].dense)
    chosen = sorted({round(i * (count - 1) / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)})
    panel(comparisons, chosen).save(paths[0])
    if count > 1:
        paths.append(folder / "compare.gif")
        save_animation([panel(comparisons, [frame]) for frame in range(count)], paths[-1])
    paths.append(folder / "sparsity.png")
    plot_density(comparisons, paths[-1])
    paths.append(folder / "compare.json")
    paths[-1].write_text(json.dumps({**facts, "clips": [_record(c) for c in comparisons]}, indent=1) + "\n", "utf-8")
    return paths


def _record(c: Comparison) -> dict[str, Any]:
    density = [[None if x != x else round(x, 4) for x in row] for row in c.density.tolist()]
    decibels = c.figures["PSNR dB"]
    return {
        "prompt": c.prompt, "seed": c.seed, "psnr": round(decibels, 3) if math.isfinite(decibels) else None,  # JSON
        "ssim": round(c.figures["SSIM"], 5), "sparsity": round(c.sparsity, 4),  # has no infinity
        "dense_seconds": round(c.seconds[0], 2), "sparse_seconds": round(c.seconds[1], 2), "timesteps": c.timesteps,
        "density_by_step_and_layer": density,
    }  # fmt: skip


def save_frames(frames: Tensor, path: Path) -> Path:
    """Write one clip as a GIF, or one picture as a PNG, at a path without suffix; returns the path with it."""
    found = pictures(frames.float().cpu())
    path = path.with_name(path.name + (".gif" if len(found) > 1 else ".png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(found) > 1:
        save_animation(found, path)
    else:
        found[0].save(path)
    return path


def pictures(frames: Tensor) -> list[Image.Image]:
    """Frames ``[F, H, W, 3]`` in 0..1 as pictures; small ones are enlarged by a whole number, large ones reduced."""
    array = (frames.clamp(0, 1) * 255).round().byte().numpy()
    height, width = array.shape[1:3]
    factor = max(1, SMALL // width) if width < LARGE else LARGE / width
    size = (round(width * factor), round(height * factor))
    how = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    return [Image.fromarray(frame).resize(size, how) for frame in array]


def panel(comparisons: Sequence[Comparison], frames: list[int]) -> Image.Image:
    """Some frames of every clip under a caption: dense over sparse, or a single frame as a pair."""
    rows: list[tuple[str, list[Image.Image]]] = []
    where = "above: dense, below: sparse" if len(frames) > 1 else "left: dense, right: sparse"
    for c in comparisons:
        exact, sparse = pictures(c.dense[frames]), pictures(c.sparse[frames])
        decibels, alike = c.figures["PSNR dB"], c.figures["SSIM"]
        text = f"{c.prompt}   |   {c.sparsity:.0%} left out, {decibels:.1f} dB, SSIM {alike:.3f}   ({where})"
        rows += [(text, exact), ("", sparse)] if len(frames) > 1 else [(text, exact + sparse)]
    width, height = rows[0][1][0].size
    tall = sum(height + _GAP + _BAR * bool(text) for text, _ in rows)
    canvas = Image.new("RGB", (len(rows[0][1]) * (width + _GAP), tall), _PAPER)
    draw, font, y = ImageDraw.Draw(canvas), ImageFont.load_default(12), 0
    for text, row in rows:
        while draw.textlength(text, font) > canvas.width - 4:
            text = text.rstrip("…")[:-1] + "…"
        draw.text((2, y + 3), text, _INK, font)
        y += _BAR * bool(text)
        for i, picture in enumerate(row):
            canvas.paste(picture, (i * (width + _GAP), y))
        y += height + _GAP
    return canvas


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int = 110) -> None:
    """Write an endless GIF, all frames in one palette: with palettes of their own, still parts would flicker."""
    some = frames[:: max(1, len(frames) // 6)]
    width, height = frames[0].size
    joint = Image.new("RGB", (width, height * len(some)))
    for i, frame in enumerate(some):
        joint.paste(frame, (0, i * height))
    palette = joint.quantize(255)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def plot_density(comparisons: Sequence[Comparison], path: Path) -> None:
    """A picture of the sparsity of every layer at every step, mean over the clips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sparsity = mean_sparsity(comparisons)
    figure, axis = plt.subplots(figsize=(max(4.0, 0.3 * len(sparsity) + 2), max(2.4, 0.22 * sparsity.shape[1] + 1.4)))
    picture = axis.imshow(100 * sparsity.T.numpy(), vmin=0, vmax=100, aspect="auto", cmap="viridis")
    axis.set(xlabel="denoising step", ylabel="layer", title=f"blocks left out: {float(sparsity.nanmean()):.1%}")
    figure.colorbar(picture, label="%")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
