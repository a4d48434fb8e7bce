"""Dense against sparse from the same inputs: figures, times, and sparsity by layer and step."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotune import dense, record_density
from autotune.module import sparse_modules
from autotune.paths import transformers_of

# Figures that a comparison can show, and how.
FORMATS = {
    "PSNR dB": ".2f", "SSIM": ".4f",
    "cosine": ".4f", "top-1": ".1%", "dense nats": ".4f", "sparse nats": ".4f",
    "sparsity": ".1%", "dense s": ".1f", "sparse s": ".1f",
}  # fmt: skip
BEST_HIGH = 2  # so many first figures are better the higher they are


class Densities(contextlib.ExitStack):
    """Records the share of kept blocks of every layer at every denoising step; use as a context manager."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.paths = list(sparse_modules(model))
        self.calls: list[tuple[float, dict[str, float]]] = []
        self._recorder = self.enter_context(record_density(model))
        for _, part in transformers_of(model):
            self.callback(part.register_forward_hook(self._hook, with_kwargs=True).remove)

    @torch.compiler.disable  # reads numbers on the host
    def _hook(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        names = inspect.signature(getattr(part, "_orig_mod", part).forward).parameters
        timestep = (dict(zip(names, args, strict=False)) | kwargs).get("timestep", 0)  # a language model has none
        level = float(torch.as_tensor(timestep).float().max())
        self.calls.append((level, self._recorder.per_layer))
        self._recorder.clear()

    def result(self) -> tuple[list[float], Tensor]:
        """The timesteps, and densities ``[steps, layers]``: means over a step's calls (classifier-free guidance has
        two), NaN for the layers of a transformer that a step did not run.
        """
        levels = list(dict.fromkeys(level for level, _ in self.calls))
        rows = []
        for level in levels:
            calls = [found for at, found in self.calls if at == level]
            rows.append([_mean([found[path] for found in calls if path in found]) for path in self.paths])
        return levels, torch.tensor(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


@dataclass(frozen=True)
class Comparison:
    """One input, dense and sparse.

    Attributes:
        prompt, seed: what was run.
        dense, sparse: frames ``[F, H, W, 3]`` in 0..1; empty for a language model, whose logits are large.
        figures: by name, of FORMATS.
        seconds: of the dense and the sparse run, everything included.
        timesteps, density: of the sparse run; ``density`` is ``[steps, layers]``, see :meth:`Densities.result`.
    """

    prompt: str
    seed: int
    dense: Tensor
    sparse: Tensor
    figures: dict[str, float]
    seconds: tuple[float, float]
    timesteps: list[float]
    density: Tensor

    @property
    def sparsity(self) -> float:
        """Share of the blocks left out, mean over steps, layers and heads."""
        return 1 - float(self.density.nanmean())


def compare(subject: Any, inputs: Sequence[tuple[str, int, Any]], *, warm_up: bool = False) -> list[Comparison]:
    """Run every input dense and sparse.

    Args:
        subject: gives ``output(item)`` of its tuned ``model``, and the ``figures(item, dense, sparse)``.
        inputs: of each its name, its seed and the item.
        warm_up: run the first one untimed, so that no time holds a compilation.
    """
    from tqdm import tqdm

    found = []
    # One recorder for all runs, dense ones and warm-up included: its hooks belong to what a compiled transformer is,
    # which other hooks, or none, would have compiled again, in the timed run.
    with Densities(subject.model) as densities, tqdm(total=2 * len(inputs), desc="comparing", unit="run") as bar:
        if warm_up:
            subject.warm_up(inputs[0][2])
            with dense(subject.model):
                subject.warm_up(inputs[0][2])
        for name, seed, item in inputs:
            with dense(subject.model):
                exact, dense_seconds = _timed(subject, item)
            bar.update()
            densities.calls = []
            sparse, sparse_seconds = _timed(subject, item)
            bar.update()
            figures = subject.figures(item, exact, sparse)
            shown = (exact, sparse) if subject.is_shown else (torch.empty(0), torch.empty(0))
            found.append(Comparison(name, seed, *shown, figures, (dense_seconds, sparse_seconds), *densities.result()))
    return found


def _timed(subject: Any, item: Any) -> tuple[Tensor, float]:
    began = time.perf_counter()
    output = subject.output(item)
    if output.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return output.float().cpu(), seconds


def table(comparisons: Sequence[Comparison]) -> str:
    """A line for each input, and their mean and worst."""
    width = min(60, max(len(c.prompt) for c in comparisons))
    names = [c.prompt if len(c.prompt) <= width else c.prompt[: width - 1] + "…" for c in comparisons]
    titles = [*comparisons[0].figures, "sparsity", "dense s", "sparse s"]
    formats = [f">{max(len(title), 6)}{FORMATS[title]}" for title in titles]
    rows = [[*c.figures.values(), c.sparsity, *c.seconds] for c in comparisons]
    means = [_mean(column) for column in zip(*rows, strict=True)]
    worst = [min(row[i] for row in rows) for i in range(BEST_HIGH)]
    lines = [f"{'prompt':{width}}  seed  " + "  ".join(f"{title:>6}" for title in titles)]
    labels = [*zip(names, (c.seed for c in comparisons), strict=True), ("mean", ""), ("worst", "")]
    for (name, seed), row in zip(labels, [*rows, means, worst], strict=True):
        cells = [format(value, style) for value, style in zip(row, formats, strict=False)]
        lines.append(f"{name:{width}}  {seed:>4}  " + "  ".join(cells))
    return "\n".join([*lines, f"time of the sparse runs: {means[-1] / means[-2]:.2f} of the dense ones'"])


def mean_sparsity(comparisons: Sequence[Comparison]) -> Tensor:
    """Shares of the blocks left out ``[steps, layers]``, mean over the inputs."""
    return 1 - torch.stack([c.density for c in comparisons]).nanmean(0)


def density_table(comparisons: Sequence[Comparison], columns: int = 8) -> str:
    """Sparsity by step (at most ``columns`` of them, evenly spread) and layer, mean over the inputs."""
    sparsity = mean_sparsity(comparisons)
    last = len(sparsity) - 1
    shown = sorted({round(i * last / max(1, columns - 1)) for i in range(columns)})
    lines = ["sparsity   step " + "".join(f"{step + 1:>6}" for step in shown) + "   mean"]
    names = [f"{'layer':>10} {layer:>4} " for layer in range(sparsity.shape[1])]
    for name, values in zip([*names, f"{'all':>15} "], [*sparsity.T, sparsity.nanmean(1)], strict=True):
        cells = ["     –" if bool(values[i].isnan()) else f"{float(values[i]):>6.0%}" for i in shown]
        lines.append(name + "".join(cells) + f"{float(values.nanmean()):>7.1%}")
    return "\n".join(lines)
