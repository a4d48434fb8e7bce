#!/usr/bin/env python
"""Sparsity against PSNR on the demo Wan: selectors and ways of sharing out the error, all from one pass.

    python evaluate/studies/frontier_video.py                           # docs/benchmarks/video_frontier.json
    python evaluate/studies/frontier_video.py --plot                    # the table from the .json
    python evaluate/studies/frontier_video.py --settings "exact 32" --targets .4 --clips 2 --seeds 1 --steps 4

As ``frontier.py``: thresholds of a target sparsity are chosen by bounds of mean and tail in the ratio of the demo
(bounds) or by one budget on error² (budget) or on the mean of the queries' squared errors (squares), and clips of
unseen prompts are generated dense and sparse from the same noise. "steps0" is a budget with thresholds for each of
four phases of the steps; in "steps1" and "steps2" a phase's error² counts by how far its steps move the noise level,
once and squared: with a shifted schedule the last steps move it most.
With --dense_first and --dense_last some steps stay dense and the others are so much sparser that the mean is the
target: "+2" and "-2" behind a plan are two dense steps first and last. Made for a GPU. OUT.json is written after every
choice; run again, the program goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import _demos  # noqa: F401
import curves
import numpy as np
import sampler
import sweep
import torch
from clips import DEMO
from curves import Curves
from frontier_results import RESAMPLES, SEED, limits
from frontier_settings import VIDEO
from long_results import Results, Row, stored
from prompts import PROMPTS
from torch import Tensor

from modify_model import patch, restore
from modify_model.cli.arguments import sparse_backend, whole
from modify_model.cli.compare import Densities
from modify_model.cli.parallel import guarded
from spas_attn.metrics import psnr

RATIO = {"l1": 0.08, "tail": 0.4}  # of the demo's bounds
AIM = 33.0  # dB
PHASES = 4
PLANS = ("bounds", "budget", "squares", "steps0", "steps1", "steps2")
COLUMNS = {
    "steps": "", "setting": "", "plan": "", "sparsity at 33 dB": ".1%", "90% limits": "", "over the first": "",
    "worst clip": ".1f",
}  # fmt: skip


class VideoStudy:
    """The demo Wan, its clips, and the choices that are asked for."""

    def __init__(self, args: argparse.Namespace, results: Results, steps: int) -> None:
        self.args, self.results, self.steps = args, results, steps
        self.sampler = sampler.load(args.model_name, steps=steps, device=args.device)
        self.pipe, self.device = self.sampler.pipe, self.sampler.pipe.transformer.device
        self.prompts = list(PROMPTS["unseen"][-args.clips :])
        self.chosen = {name: VIDEO[name] for name in args.settings}

    def clips(self) -> Tensor:
        """Clips of the unseen prompts ``[n, F, H, W, 3]``, each from the noise of every seed."""
        return torch.cat([self.sampler.clips(self.prompts, 100 * seed).cpu() for seed in range(self.args.seeds)])

    def cells(self) -> Iterator[None]:
        """Every choice that is missing, one after the other."""
        restore(self.pipe)
        exact = self.clips()
        plans = [plan for setting in self.chosen.values() for plan in self.args.plans or setting.plans]
        known = {phases: self._curves(phases) for phases in {plan.startswith("steps") for plan in plans}}
        ends_dense = list(itertools.product(self._steps(self.args.dense_first), self._steps(self.args.dense_last)))
        for name, setting in self.chosen.items():
            for first, last in ends_dense:
                restore(self.pipe)
                ends = (first, last) if first or last else None
                patch(self.pipe, selector=setting.selector, backend=sparse_backend(self.device), dense_steps=ends)
                for plan, target in itertools.product(self.args.plans or setting.plans, self.args.targets):
                    choice = plan + f"+{first}" * bool(first) + f"-{last}" * bool(last) + f" {target:g}"
                    if self.results.find(name, choice, self.steps, "clips") is None:
                        curve = known[plan.startswith("steps")][name]
                        self._install(curve, plan, target / (1 - (first + last) / self.steps))
                        self.results.add({"method": name, "setting": choice, **self._judge(exact)})
                        yield

    def _steps(self, shares: Sequence[float]) -> list[int]:
        return list(dict.fromkeys(round(share * self.steps) for share in shares))

    @functools.cached_property
    def levels(self) -> Tensor:
        """Noise levels of the steps, and 0 at the end, ``[steps + 1]``."""
        self.pipe.scheduler.set_timesteps(self.steps)
        return self.pipe.scheduler.sigmas.double().cpu()

    @functools.cached_property
    def edges(self) -> list[float]:
        """Noise levels at which the phases meet, each of equally many steps."""
        if self.steps < PHASES:
            raise ValueError(f"plans by phase need {PHASES} steps or more, got {self.steps}")
        starts = [round(phase * self.steps / PHASES) for phase in range(1, PHASES)]
        return [float(self.levels[start - 1 : start + 1].mean()) for start in starts]

    def _curves(self, phases: bool) -> dict[str, Curves]:
        """Curves of all settings, by phase or not."""
        restore(self.pipe)
        patch(self.pipe)
        selectors = {name: (setting.selector, setting.candidates) for name, setting in self.chosen.items()}
        items = self.sampler.items(PROMPTS["calibration"], 1000)
        every, edges = (1, self.edges) if phases else (2, ())
        return curves.collect(
            self.pipe, selectors, self.sampler.observe, items, self.args.query_blocks, every=every, edges=edges
        )

    def _install(self, curve: Curves, plan: str, target: float) -> None:
        phases = plan.startswith("steps")
        if plan == "bounds":
            chosen = curve.uniform(target, **RATIO)
        else:
            weights = self._weights(int(plan[-1]), len(curve.share) // PHASES) if phases else None
            chosen = curve.budget(target, weights, of_queries=plan == "squares")
        curves.install(self.pipe, curve, chosen, edges=self.edges if phases else ())

    def _weights(self, power: int, layers: int) -> Tensor:
        """How much error² counts, by phase and layer ``[phases · layers, 1]``."""
        moved = (self.levels[:-1] - self.levels[1:]) ** power
        phase = (self.levels[:-1, None] < torch.tensor(self.edges)).sum(1)
        weights = torch.stack([moved[phase == number].mean() for number in range(PHASES)])
        return (weights / weights.mean()).repeat_interleave(layers)[:, None]

    def _judge(self, exact: Tensor) -> Row:
        with Densities(self.pipe) as densities:
            clips = self.clips()
        # Clips that are equal to the bit have no finite PSNR.
        decibels = [min(float(psnr(*pair)), 99.0) for pair in zip(clips, exact, strict=True)]
        density = float(densities.result()[1].nanmean())
        return {"length": self.steps, "task": "clips", "density": density, "psnr": decibels}


def at_aim(cells: Sequence[Row], picks: np.ndarray | None = None) -> tuple[float, float]:
    """Sparsity and worst clip where the mean PSNR is AIM, between two choices; NaN outside them."""
    decibels = np.array([cell["psnr"] for cell in cells])
    decibels = decibels if picks is None else decibels[:, picks]
    sparsity = np.array([1 - cell["density"] for cell in cells])
    order = np.argsort(sparsity)
    mean = -np.minimum.accumulate(decibels.mean(1)[order])
    values = (sparsity[order], decibels.min(1)[order])
    found = [float(np.interp(-AIM, mean, value, left=math.nan, right=math.nan)) for value in values]
    return found[0], found[1]


def summary(data: Row) -> str:
    """What every line gives at the aim, with 90% limits, in Markdown; differences are from the first of its steps."""
    groups: dict[tuple[int, str, str], list[Row]] = {}
    for cell in data["cells"]:
        groups.setdefault((cell["length"], cell["method"], cell["setting"].split()[0]), []).append(cell)
    rng, rows = np.random.default_rng(SEED), []
    first: dict[int, np.ndarray] = {}
    clips = len(data["cells"][0]["psnr"]) if data["cells"] else 0
    draws = [rng.integers(0, clips, clips) for _ in range(RESAMPLES)]
    for (steps, name, plan), cells in groups.items():
        sparsity, worst = at_aim(cells)
        drawn = np.array([at_aim(cells, picks)[0] for picks in draws])
        reference = first.setdefault(steps, drawn)
        values = (steps, name, plan, sparsity, limits(drawn), limits(drawn - reference, "+.1f"), worst)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return sweep.table(COLUMNS, rows)


def evaluate(args: argparse.Namespace, path: Path) -> None:
    """Compute every choice that is missing."""
    names = ("clips", "seeds", "query_blocks")
    results = Results(path, {name: getattr(args, name) for name in names})
    began = time.perf_counter()
    for steps in args.steps:
        study = VideoStudy(args, results, steps)
        gpu = study.device.type == "cuda"
        results.facts |= {"device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__}
        for _ in study.cells():
            if args.seconds and time.perf_counter() - began > args.seconds:
                print(f"stopped after {args.seconds} seconds; run again to go on")
                return


def read_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(DEMO), help="the demo model's folder")
    add("--settings", nargs="+", choices=list(VIDEO), metavar="NAME", default=list(VIDEO), help=", ".join(VIDEO))
    add("--targets", nargs="+", type=float, default=[0.32, 0.4, 0.48, 0.56], help="sparsities")
    add("--dense_last", nargs="+", type=float, default=[0.0], help="shares of the steps that stay dense at the end")
    add("--plans", nargs="+", choices=PLANS, help="see above (default: those of each setting)")
    add("--query_blocks", type=whole(1), default=16, help="looked at per call")
    add("--clips", type=whole(1, 10), default=10, help="unseen prompts to generate, of 10")
    add("--seeds", type=whole(1), default=2, help="how often, from other noise")
    add("--steps", nargs="+", type=whole(2), default=[12], help="denoising steps, one study for each number")
    add("--dense_first", nargs="+", type=float, default=[0.0], help="shares of the steps that stay dense at the start")
    add("--seconds", type=whole(1), help="stop after the choice in which so many seconds are over")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", type=Path, default=Path("docs/benchmarks/video_frontier"), help="OUT.json is written")
    add("--plot", action="store_true", help="only print the table from OUT.json")
    return parser.parse_args(given)


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    print(summary(stored(args, evaluate)))
    return 0


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = read_arguments(given)
    return guarded("frontier_video.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
