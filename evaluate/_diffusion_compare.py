"""Dense against sparse from the same noise: times, PSNR, SSIM, sparsity by layer and step, and pictures of both."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from autotune.module import sparse_modules, transformers_of
from modify_model.schedule import argument
from spas_attn.metrics import psnr

SHEET_FRAMES = 6  # frames of a clip on the sheet
SMALL, LARGE = 192, 480  # widths to which small frames are enlarged and large ones reduced, in pixels
_BAR, _GAP, _INK, _PAPER = 20, 6, (20, 20, 20), (255, 255, 255)


@contextlib.contextmanager
def dense(pipe: Any) -> Iterator[None]:
    """Run a tuned pipeline on its original attention for a while."""
    modules = sparse_modules(pipe).values()
    before = [module.mode for module in modules]
    for module in modules:
        module.mode = "dense"
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.mode = mode


class Densities:
    """Records the share of kept blocks of every layer at every denoising step; use as a context manager."""

    def __init__(self, pipe: Any) -> None:
        self.modules = sparse_modules(pipe)
        self.parts = [(prefix, part) for prefix, part in transformers_of(pipe)]
        self.calls: list[tuple[float, dict[str, Tensor | float]]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Densities:
        for prefix, part in self.parts:
            handle = part.register_forward_hook(self._hook(prefix), with_kwargs=True)
            self._handles.append(handle)
        for module in self.modules.values():
            module.record_density, module.last_density = True, None
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self.modules.values():
            module.record_density, module.last_density = False, None

    def restart(self) -> None:
        """Forget what was recorded so far."""
        self.calls = []

    def _hook(self, prefix: str) -> Callable[..., None]:
        mine = {
            path: module
            for path, module in self.modules.items()
            if path.startswith("transformer_2.") == (prefix == "transformer_2.")
        }

        @torch.compiler.disable  # reads the timestep on the host
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
            level = float(torch.as_tensor(argument(part, "timestep", args, kwargs)).float().max())
            found: dict[str, Tensor | float] = {}
            for path, module in mine.items():
                # A layer that ran dense has recorded nothing.
                found[path] = 1.0 if module.last_density is None else module.last_density.mean()
                module.last_density = None
            self.calls.append((level, found))

        return hook

    def result(self) -> tuple[list[float], Tensor]:
        """The timesteps, and densities ``[steps, layers]``: means over a step's calls (classifier-free guidance has
        two), NaN for the layers of a transformer that a step did not run.
        """
        levels = list(dict.fromkeys(level for level, _ in self.calls))
        rows = []
        for level in levels:
            calls = [found for at, found in self.calls if at == level]
            rows.append([_mean([float(found[path]) for found in calls if path in found]) for path in self.modules])
        return levels, torch.tensor(rows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


@dataclass(frozen=True)
class Comparison:
    """One prompt, dense and sparse from the same noise.

    Attributes:
        dense, sparse: frames ``[F, H, W, 3]`` in 0..1.
        seconds: of the dense and the sparse run, everything included.
        timesteps, density: of the sparse run; ``density`` is ``[steps, layers]``, see :meth:`Densities.result`.
    """

    prompt: str
    seed: int
    dense: Tensor
    sparse: Tensor
    seconds: tuple[float, float]
    timesteps: list[float]
    density: Tensor

    @property
    def psnr(self) -> float:
        """Peak signal to noise ratio of the sparse clip in decibels, over all frames; infinite for equal clips."""
        return float(psnr(self.sparse, self.dense))

    @property
    def ssim(self) -> float:
        """Structural similarity, mean over the frames (scikit-image)."""
        return ssim(self.sparse, self.dense)

    @property
    def sparsity(self) -> float:
        """Share of the blocks left out, mean over steps, layers and heads."""
        return 1 - float(self.density.nanmean())


def ssim(one: Tensor, other: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of frames ``[F, H, W, 3]`` in 0..1."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ValueError("SSIM needs a package: pip install scikit-image") from error
    pairs = zip(one.float().cpu().numpy(), other.float().cpu().numpy(), strict=True)
    return _mean([float(structural_similarity(x, y, channel_axis=-1, data_range=1.0)) for x, y in pairs])


def compare(sampler: Any, prompts: Sequence[str], seeds: Sequence[int], *, warm_up: bool = False) -> list[Comparison]:
    """Generate every prompt dense and sparse.

    Args:
        sampler: a :class:`_diffusion_models.Sampler` with a tuned pipeline.
        prompts, seeds: one seed for each prompt.
        warm_up: run two steps of each kind first, untimed, so that no time holds a compilation.
    """
    found = []
    # One recorder for all runs, dense ones and warm-up included: its hooks belong to what a compiled transformer is,
    # which other hooks, or none, would have compiled again, in the timed run.
    with Densities(sampler.pipe) as densities, tqdm(total=2 * len(prompts), desc="generating", unit="clip") as bar:
        if warm_up:
            sampler.watch(prompts[0], seeds[0], steps=2)
            with dense(sampler.pipe):
                sampler.watch(prompts[0], seeds[0], steps=2)
        for prompt, seed in zip(prompts, seeds, strict=True):
            with dense(sampler.pipe):
                exact, dense_seconds = _timed(sampler, prompt, seed)
            bar.update()
            densities.restart()
            frames, sparse_seconds = _timed(sampler, prompt, seed)
            bar.update()
            found.append(Comparison(prompt, seed, exact, frames, (dense_seconds, sparse_seconds), *densities.result()))
    return found


def _timed(sampler: Any, prompt: str, seed: int) -> tuple[Tensor, float]:
    began = time.perf_counter()
    frames = sampler.frames(prompt, seed).float().cpu()  # waits for the device
    return frames, time.perf_counter() - began


def table(comparisons: Sequence[Comparison]) -> str:
    """A line for each clip, and their mean and worst."""
    width = min(60, max(len(c.prompt) for c in comparisons))
    title = f"{'prompt':{width}}  {'seed':>4}  {'PSNR dB':>7}  {'SSIM':>6}  {'sparsity':>8}"
    lines = [f"{title}  {'dense s':>7}  {'sparse s':>8}"]
    rows = [(c.psnr, c.ssim, c.sparsity, *c.seconds) for c in comparisons]
    for c, (decibels, alike, sparsity, slow, fast) in zip(comparisons, rows, strict=True):
        name = c.prompt if len(c.prompt) <= width else c.prompt[: width - 1] + "…"
        figures = f"{decibels:>7.2f}  {alike:>6.4f}  {sparsity:>8.1%}  {slow:>7.1f}  {fast:>8.1f}"
        lines.append(f"{name:{width}}  {c.seed:>4}  {figures}")
    columns = list(zip(*rows, strict=True))
    means = [_mean(list(column)) for column in columns]
    lines.append(
        f"{'mean':{width}}  {'':>4}  {means[0]:>7.2f}  {means[1]:>6.4f}  {means[2]:>8.1%}  {means[3]:>7.1f}  "
        f"{means[4]:>8.1f}"
    )
    lines.append(f"{'worst':{width}}  {'':>4}  {min(columns[0]):>7.2f}  {min(columns[1]):>6.4f}")
    lines.append(f"time of the sparse clips: {means[4] / means[3]:.2f} of the dense ones'")
    return "\n".join(lines)


def density_table(comparisons: Sequence[Comparison], columns: int = 8) -> str:
    """Sparsity by step (at most ``columns`` of them, evenly spread) and layer, mean over the clips."""
    sparsity = 1 - torch.stack([c.density for c in comparisons]).nanmean(0)
    steps = sparsity.shape[0]
    shown = sorted({round(i * (steps - 1) / max(1, columns - 1)) for i in range(columns)})
    lines = ["sparsity   step " + "".join(f"{step + 1:>6}" for step in shown) + "   mean"]
    for layer, values in enumerate(sparsity.T):
        lines.append(f"{'layer':>10} {layer:>4} " + _row(values, shown))
    lines.append(f"{'all':>15} " + _row(sparsity.nanmean(1), shown))
    return "\n".join(lines)


def _row(values: Tensor, shown: list[int]) -> str:
    cells = ["     –" if bool(values[i].isnan()) else f"{float(values[i]):>6.0%}" for i in shown]
    return "".join(cells) + f"{float(values.nanmean()):>7.1%}"


def write(comparisons: Sequence[Comparison], folder: Path, facts: dict[str, Any], columns: int = 1) -> list[Path]:
    """Write ``compare.gif`` (of clips), ``sheet.png``, ``sparsity.png`` and ``compare.json``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "sheet.png"]
    sheet(comparisons).save(paths[0])
    if len(comparisons[0].dense) > 1:
        paths.append(folder / "compare.gif")
        save_animation(animation(comparisons, columns), paths[-1])
    paths.append(folder / "sparsity.png")
    plot_density(comparisons, paths[-1])
    paths.append(folder / "compare.json")
    paths[-1].write_text(json.dumps({**facts, "clips": [_record(c) for c in comparisons]}, indent=1) + "\n", "utf-8")
    return paths


def _record(c: Comparison) -> dict[str, Any]:
    density = [[None if x != x else round(x, 4) for x in row] for row in c.density.tolist()]
    decibels = round(c.psnr, 3) if math.isfinite(c.psnr) else None  # JSON has no infinity
    return {
        "prompt": c.prompt, "seed": c.seed, "psnr": decibels, "ssim": round(c.ssim, 5),
        "sparsity": round(c.sparsity, 4), "dense_seconds": round(c.seconds[0], 2),
        "sparse_seconds": round(c.seconds[1], 2), "timesteps": c.timesteps, "density_by_step_and_layer": density,
    }  # fmt: skip


def show_alone(frames: Tensor, path: Path) -> Path:
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


def caption(picture: Image.Image, at: tuple[int, int], text: str, width: int) -> None:
    """Write a line of text, cut to a width in pixels."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    if draw.textlength(text, font) > width:
        while draw.textlength(text + "…", font) > width:
            text = text[:-1]
        text += "…"
    draw.text(at, text, _INK, font)


def animation(comparisons: Sequence[Comparison], columns: int) -> list[Image.Image]:
    """One picture per frame: for every prompt the dense clip at the left and the sparse one at the right."""
    clips = [(pictures(c.dense), pictures(c.sparse)) for c in comparisons]
    width, height = clips[0][0][0].size
    cell = (2 * width + _GAP, height + 2 * _BAR + _GAP)
    rows = -(-len(clips) // columns)
    canvas = Image.new("RGB", (columns * (cell[0] + 2 * _GAP), rows * cell[1]), _PAPER)
    places = [(_GAP + i % columns * (cell[0] + 2 * _GAP), i // columns * cell[1]) for i in range(len(clips))]
    for c, (x, y) in zip(comparisons, places, strict=True):
        caption(canvas, (x, y + 3), c.prompt, cell[0])
        caption(canvas, (x, y + _BAR + 3), "dense", width)
        text = f"sparse: {c.sparsity:.0%} left out, {c.psnr:.1f} dB"
        caption(canvas, (x + width + _GAP, y + _BAR + 3), text, width)
    frames = []
    for i in range(len(clips[0][0])):
        frame = canvas.copy()
        for (exact, sparse), (x, y) in zip(clips, places, strict=True):
            frame.paste(exact[i], (x, y + 2 * _BAR))
            frame.paste(sparse[i], (x + width + _GAP, y + 2 * _BAR))
        frames.append(frame)
    return frames


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


def sheet(comparisons: Sequence[Comparison]) -> Image.Image:
    """Frames of every prompt side by side: a row of the dense clip over a row of the sparse one; of pictures a pair."""
    count = len(comparisons[0].dense)
    chosen = sorted({round(i * (count - 1) / (SHEET_FRAMES - 1)) for i in range(SHEET_FRAMES)})
    rows: list[tuple[str, list[list[Image.Image]]]] = []
    for c in comparisons:
        exact, sparse = pictures(c.dense[chosen]), pictures(c.sparse[chosen])
        text = f"{c.prompt}   |   sparse: {c.sparsity:.0%} left out, {c.psnr:.1f} dB, SSIM {c.ssim:.3f}"
        if len(chosen) > 1:
            rows.append((f"{text}   (above: dense, below: sparse)", [exact, sparse]))
        else:
            rows.append((f"{text}   (left: dense, right: sparse)", [exact + sparse]))
    width, height = rows[0][1][0][0].size
    across = max(len(line) for _, lines in rows for line in lines)
    tall = sum(_BAR + len(lines) * (height + 2) + _GAP for _, lines in rows)
    canvas = Image.new("RGB", (across * (width + 2), tall), _PAPER)
    y = 0
    for text, lines in rows:
        caption(canvas, (2, y + 3), text, canvas.width - 4)
        y += _BAR
        for line in lines:
            for i, picture in enumerate(line):
                canvas.paste(picture, (i * (width + 2), y))
            y += height + 2
        y += _GAP
    return canvas


def plot_density(comparisons: Sequence[Comparison], path: Path) -> None:
    """A picture of the sparsity of every layer at every step, mean over the clips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sparsity = 1 - torch.stack([c.density for c in comparisons]).nanmean(0)
    steps, layers = sparsity.shape
    figure, axis = plt.subplots(figsize=(max(4.0, 0.3 * steps + 2), max(2.4, 0.22 * layers + 1.4)))
    picture = axis.imshow(100 * sparsity.T.numpy(), vmin=0, vmax=100, aspect="auto", cmap="viridis")
    axis.set_xticks(range(0, steps, max(1, steps // 8)), [str(i + 1) for i in range(0, steps, max(1, steps // 8))])
    axis.set_xlabel("denoising step")
    axis.set_ylabel("layer")
    axis.set_title(f"blocks left out: {100 * float(sparsity.nanmean()):.1f}%", fontsize=10)
    figure.colorbar(picture, label="%")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
