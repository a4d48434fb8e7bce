#!/usr/bin/env python
"""Sweep the error bounds on the demo Wan: what each bound gives in sparsity and costs in PSNR.

    python evaluate/sweep_video.py --out docs/benchmarks/video_sweep          # writes .json and .png
    python evaluate/sweep_video.py --out docs/benchmarks/video_sweep --plot   # the picture and table from the .json
    python evaluate/sweep_video.py --selectors "64x64, pool 8" --clips 4 --steps 8

For every selector two sweeps: the mean bound alone (tail off, the way of the original SpargeAttn), and the tail bound
with an l1 that does not bind, or with the `--l1_beside_tail` given. `--guidance 1 3` does all of it twice. Every
setting is a real calibration on the calibration prompts; clips of other prompts are then generated dense and sparse
from the same noise. Curves are computed once per selector and taken up again from its checkpoint. Writes the JSON after
every setting. Made for a GPU; a processor takes minutes for each setting.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _benchmark_report import versions
from _command_line import sparse_backend
from _demo_clips import DEMO, GUIDANCE, PROMPTS, generate, parse, to_frames
from _demo_recognise import recognise
from _diffusion import shares_of_steps, tune
from _diffusion_compare import Densities
from _diffusion_models import DemoSampler, load
from _loading import DTYPES, usable_device
from torch import Tensor
from wan_example import EXAMPLE

from autotune.calibration import Calibration
from autotune.observe import Grid
from modify_model import patch, restore
from spas_attn import fallback_counts
from spas_attn.metrics import psnr
from spas_attn.selectors import MeanSimilarity, PeakMass

NO_FILTER = Grid(sim=(-1.0,))
MEAN_BOUNDS = (0.02, 0.04, 0.06, 0.08, 0.10, 0.14)
TAIL_BOUNDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FREE_L1 = 0.3  # beside a tail bound; not binding
AIM = 30.0  # dB
TO_BEAT, GOAL = 0.34, 0.42  # sparsity at AIM
WORST_GOAL = 22.0  # dB


@dataclass(frozen=True)
class Setting:
    """A selector with its grid, and how many first steps run dense."""

    selector: MeanSimilarity
    grid: Grid = NO_FILTER
    dense_first: int = 0


def _mean(pool: int, block: int, **options: Any) -> MeanSimilarity:
    return MeanSimilarity(pool=pool, block_q=block, block_k=block, **options)


SETTINGS = {
    "64x64, pool 8": Setting(_mean(8, 64)),
    "64x64, pool 16": Setting(_mean(16, 64)),
    "64x64, block means": Setting(_mean(64, 64)),
    "64x64, peak mass": Setting(PeakMass()),
    "128x128, pool 8": Setting(_mean(8, 128)),
    "128x128, block means": Setting(_mean(128, 128)),
    "64x64, pool 8, no sink": Setting(_mean(8, 64, sink=False)),
    "64x64, pool 8, similarity filter": Setting(_mean(8, 64), Grid()),
    "64x64, pool 8, 2 steps dense": Setting(_mean(8, 64), dense_first=2),
    "64x64, peak mass, 2 steps dense": Setting(PeakMass(), dense_first=2),
}


@dataclass(frozen=True)
class Unseen:
    """Clips that no calibration saw: prompts, the seed of the first, and dense frames ``[n, F, H, W, 3]``."""

    prompts: list[str]
    seed: int
    dense: Tensor

    @classmethod
    def of(cls, sampler: DemoSampler, prompts: list[str], seed: int) -> Unseen:
        return cls(prompts, seed, frames(sampler, prompts, seed))


def frames(sampler: DemoSampler, prompts: Sequence[str], seed: int) -> Tensor:
    """Clips of the prompts, generated together, ``[n, F, H, W, 3]``."""
    return to_frames(generate(sampler.pipe, prompts, seed, sampler.size.steps, sampler.guidance)).cpu()


def recognised(prompts: Sequence[str], clips: Tensor) -> float:
    """Share of clips in which a simple recogniser sees exactly what the prompt says."""
    right = [recognise(clip) == set(parse(prompt)) for prompt, clip in zip(prompts, clips, strict=True)]
    return sum(right) / len(right)


def measure(
    sampler: DemoSampler, name: str, l1: float, tail: float | None, unseen: list[Unseen], keep: Path, seed: int
) -> dict[str, Any]:
    """Calibrate with one pair of bounds and generate."""
    setting = SETTINGS[name]
    steps = None if not setting.dense_first else shares_of_steps(sampler, "", setting.dense_first, 0)
    backend = sparse_backend(sampler.pipe.transformer.device)
    patch(sampler.pipe, l1=l1, pv_l1=1.2 * l1, tail=tail, selector=setting.selector, dense_steps=steps, backend=backend)
    began = time.perf_counter()
    calibration = calibrated(sampler, setting.grid, keep, seed)
    seconds = time.perf_counter() - began
    heads = [head for entry in calibration.statistics for head in entry["heads"]]
    decibels: list[float] = []
    right: list[float] = []
    with Densities(sampler.pipe) as densities:
        for group in unseen:
            clips = frames(sampler, group.prompts, group.seed)
            decibels += [float(psnr(sparse, exact)) for sparse, exact in zip(clips, group.dense, strict=True)]
            right.append(recognised(group.prompts, clips))
    _, density = densities.result()
    return {
        "setting": name,
        "guidance": sampler.guidance,
        "l1": l1,
        "tail": tail,
        "sparsity": 1 - float(density.nanmean()),
        "sparsity_by_layer": (1 - density.nanmean(0)).tolist(),
        "sparsity_by_step": (1 - density.nanmean(1)).tolist(),
        "sparse_heads": sum(head["is_sparse"] for head in heads) / len(heads),
        # Clips that are equal to the bit have no finite PSNR.
        "psnr": [min(value, 99.0) for value in decibels],
        "recognised": sum(right) / len(right),
        "mean_error": max((head["l1_total"] for head in heads), default=0.0),
        "tail_error": max((head["tail_total"] for head in heads), default=0.0),
        "seconds": round(seconds, 1),
    }


def calibrated(sampler: DemoSampler, grid: Grid, keep: Path, seed: int) -> Calibration:
    """A finished calibration on the calibration prompts; curves that ``keep`` holds are not computed again."""
    work, saved = keep.with_suffix(".work"), keep.with_name(keep.name + ".rank0")
    current = work.with_name(work.name + ".rank0")
    if saved.exists():
        shutil.copy(saved, current)
    resume = saved.exists()

    def keep_curves(calibration: Calibration) -> None:
        # When the next pass begins, the checkpoint holds the curves of all prompts.
        if calibration.phase != "curves" and not saved.exists():
            shutil.copy(current, saved)

    return tune(
        sampler, PROMPTS["calibration"], 1000 + seed, every=2, show=False, before_each=keep_curves, grid=grid,
        checkpoint=work, resume=resume,
    )  # fmt: skip


def sweep(args: argparse.Namespace, path: Path) -> None:
    """Run everything, writing the JSON after every setting."""
    device = usable_device(args.device)
    sampler = load(EXAMPLE, args.model_name, device=args.device, dtype=args.dtype, steps=args.steps)
    if not isinstance(sampler, DemoSampler):
        raise ValueError(f"--model_name must be the demo model, got {args.model_name!r}")
    prompts = list(PROMPTS["unseen"][-args.clips :])
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "processor",
        "versions": versions(),
        "dtype": str(sampler.pipe.transformer.blocks[0].ffn.net[0].proj.weight.dtype),  # norms are always float32
        "steps": args.steps,
        "clips": len(prompts) * args.seeds,
        "recognised_dense": {},
    }
    results: list[dict[str, Any]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for guidance in args.guidance:
        sampler.guidance = guidance
        restore(sampler.pipe)
        unseen = [Unseen.of(sampler, prompts, seed * 100) for seed in range(args.seeds)]
        right = sum(recognised(group.prompts, group.dense) for group in unseen) / len(unseen)
        facts["recognised_dense"][f"{guidance:g}"] = right
        print(f"{facts['clips']} clips, {right:.0%} recognised dense, guidance {guidance:g}\n{HEADER}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(args.selectors or SETTINGS):
                for l1, tail in bounds_of(args):
                    keep = Path(folder) / f"curves{number}"
                    results.append(measure(sampler, name, l1, tail, unseen, keep, args.seed))
                    path.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n", "utf-8")
                    print(row(results[-1]), flush=True)
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls ran dense: {reason}")


def bounds_of(args: argparse.Namespace) -> list[tuple[float, float | None]]:
    """The pairs of l1 and tail bound to measure."""
    return [*((l1, None) for l1 in args.mean_bounds), *((args.l1_beside_tail, tail) for tail in args.tail_bounds)]


HEADER = (
    "| selector | guidance | l1 | tail | sparsity | sparse heads | PSNR, mean | worst clip | recognised | seconds |\n"
    + "|---" * 10
    + "|"
)


def row(r: dict[str, Any]) -> str:
    """One line of the table."""
    cells = (
        r["setting"], f"{r['guidance']:g}", f"{r['l1']:g}", "–" if r["tail"] is None else f"{r['tail']:g}",
        f"{r['sparsity']:.1%}", f"{r['sparse_heads']:.0%}", f"{_mean_of(r):.2f}",
        f"{min(r['psnr']):.2f}", f"{r['recognised']:.0%}", f"{r['seconds']:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _mean_of(r: dict[str, Any]) -> float:
    return sum(r["psnr"]) / len(r["psnr"])


def kind_of(r: dict[str, Any]) -> str:
    """What bounds a result: "mean" or "tail" alone, or both, with the l1."""
    if r["tail"] is None:
        return "mean"
    return "tail" if r["l1"] >= FREE_L1 else f"l1 {r['l1']:g} and tail"


def lines(results: list[dict[str, Any]]) -> dict[tuple[float, str, str], list[dict[str, Any]]]:
    """The results by guidance, setting and kind of bound, by rising sparsity."""
    found: dict[tuple[float, str, str], list[dict[str, Any]]] = {}
    for r in sorted(results, key=lambda r: r["sparsity"]):
        found.setdefault((r["guidance"], r["setting"], kind_of(r)), []).append(r)
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def at_aim(some: list[dict[str, Any]], aim: float = AIM) -> tuple[float, float]:
    """Sparsity and worst clip where the mean PSNR is ``aim``, between two results; NaN outside them."""
    ordered = sorted(some, key=_mean_of)
    means = [_mean_of(r) for r in ordered]
    if not means[0] <= aim <= means[-1]:
        return math.nan, math.nan
    sparsity = np.interp(aim, means, [r["sparsity"] for r in ordered])
    return float(sparsity), float(np.interp(aim, means, [min(r["psnr"]) for r in ordered]))


def summary(results: list[dict[str, Any]]) -> str:
    """What every setting gives at the aim, as a table."""
    text = [f"| at {AIM:g} dB mean | guidance | bound | sparsity | worst clip |", "|---" * 5 + "|"]
    for (guidance, name, kind), some in lines(results).items():
        sparsity, worst = at_aim(some)
        figures = "not reached | –" if math.isnan(sparsity) else f"{sparsity:.1%} | {worst:.1f} dB"
        text.append(f"| {name} | {guidance:g} | {kind} | {figures} |")
    return "\n".join(text)


def plot(data: dict[str, Any], path: Path) -> None:
    """PSNR against sparsity, of the mean and of the worst clip; a row per guidance, a line per setting and bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    guidances = sorted({r["guidance"] for r in data["results"]})
    names = list(dict.fromkeys(r["setting"] for r in data["results"]))
    size = (12, 0.6 + 4.2 * len(guidances))
    figure, axes = plt.subplots(len(guidances), 2, figsize=size, sharex=True, sharey="col", squeeze=False)
    for (guidance, name, kind), some in lines(data["results"]).items():
        number = names.index(name) % 10
        pair = axes[guidances.index(guidance)]
        for axis, value in zip(pair, (_mean_of, lambda r: min(r["psnr"])), strict=True):
            axis.plot(
                [100 * r["sparsity"] for r in some], [value(r) for r in some], marker="os^vDP*Xhd"[number],
                markersize=4, color=plt.get_cmap("tab10")(number),
                linestyle={"mean": "--", "tail": "-"}.get(kind, ":"), label=f"{name}, {kind} bound",
            )  # fmt: skip
    for pair, guidance in zip(axes, guidances, strict=True):
        pair[0].axhline(AIM, color="grey", linewidth=0.8)
        pair[0].plot([100 * TO_BEAT], [AIM], "kx", markersize=8, label="to beat")
        pair[0].plot([100 * GOAL], [AIM], "k+", markersize=10, label="goal")
        pair[1].axhline(WORST_GOAL, color="grey", linewidth=0.8)
        pair[0].set_ylabel("dB")
        handles = sorted(zip(*pair[0].get_legend_handles_labels(), strict=True), key=lambda entry: entry[1])
        pair[0].legend(*zip(*handles, strict=True), fontsize=6.5, handlelength=4)
        text = "no guidance" if guidance <= 1 else f"guidance {guidance:g}"
        pair[0].set_title(f"PSNR, mean over the clips ({text})")
        pair[1].set_title(f"PSNR, worst clip ({text})")
        for axis in pair:
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("blocks left out, %")
    facts = data["facts"]
    figure.suptitle(f"Demo Wan, {facts['steps']} steps, {facts['clips']} clips, {facts['device']}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/benchmarks/video_sweep"), help="OUT.json and OUT.png are written")
    add("--plot", action="store_true", help="only draw the picture and print the tables from OUT.json")
    add("--model_name", default=str(DEMO), help="the demo model's folder")
    add("--selectors", nargs="+", choices=list(SETTINGS), metavar="NAME", help="default: all")
    add("--mean_bounds", nargs="*", type=float, default=MEAN_BOUNDS, metavar="L1", help="bounds of the mean error")
    add("--tail_bounds", nargs="*", type=float, default=TAIL_BOUNDS, metavar="TAIL", help="bounds of the tail")
    add("--l1_beside_tail", type=float, default=FREE_L1, metavar="L1", help="default: not binding")
    add("--clips", type=int, default=10, help="unseen prompts to generate, of 10 (default: 10)")
    add("--seeds", type=int, default=2, help="how often, from other noise (default: 2)")
    add("--steps", type=int, default=12, help="denoising steps (default: 12)")
    add("--guidance", nargs="+", type=float, default=[GUIDANCE], help="classifier-free guidance (default: 1, none)")
    add("--seed", type=int, default=0, help="of the calibration (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16, and float32 on a processor")
    args = parser.parse_args(arguments)
    path = args.out.with_name(args.out.name + ".json")
    try:
        if not args.plot:
            with torch.no_grad():
                sweep(args, path)
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        print(f"sweep_video.py: error: {error}", file=sys.stderr)
        return 2
    print(HEADER, *map(row, data["results"]), "", summary(data["results"]), sep="\n")
    plot(data, args.out.with_name(args.out.name + ".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
