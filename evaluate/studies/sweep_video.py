#!/usr/bin/env python
"""Sweep the error bounds on the demo Wan: what each bound gives in sparsity and costs in PSNR.

    python evaluate/studies/sweep_video.py                   # docs/benchmarks/video_sweep.json and .png
    python evaluate/studies/sweep_video.py --plot            # tables and picture from the .json
    python evaluate/studies/sweep_video.py --selectors "64x64, pool 8" --clips 4 --steps 8

The tail bound stands beside an l1 that does not bind, or beside the `--l1_beside_tail` given. `--guidance 1 3` does all
of it twice. Clips of unseen prompts are generated dense and sparse from the same noise. Made for a GPU; a CPU takes
minutes for each setting.
"""

from __future__ import annotations

import argparse
import math
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import _demos  # noqa: F401
import numpy as np
import sampler
import sweep
import torch
from clips import DEMO, GUIDANCE
from prompts import PROMPTS, parse
from recognise import recognise
from sweep import Row, Setting, means
from torch import Tensor

from modify_model import restore
from modify_model.cli.arguments import DTYPES
from modify_model.cli.compare import Densities
from spas_attn.metrics import psnr
from spas_attn.selectors import PeakMass

MEAN_BOUNDS = (0.02, 0.04, 0.06, 0.08, 0.10, 0.14)
TAIL_BOUNDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FREE_L1 = 0.3  # beside a tail bound; not binding
AIM = 30.0  # dB


class VideoSweep(sweep.Sweep):
    """The demo Wan."""

    settings: ClassVar = {
        "64x64, pool 8": Setting(means(8, 64)),
        "64x64, pool 16": Setting(means(16, 64)),
        "64x64, block means": Setting(means(64, 64)),
        "64x64, peak mass": Setting(PeakMass()),
        "128x128, pool 8": Setting(means(8, 128)),
        "128x128, block means": Setting(means(128, 128)),
        "64x64, pool 8, no sink": Setting(means(8, 64, sink=False)),
        "64x64, pool 8, similarity filter": Setting(means(8, 64), grid=sweep.FILTERS),
        "64x64, pool 8, 2 steps dense": Setting(means(8, 64), dense_first=2),
        "64x64, peak mass, 2 steps dense": Setting(PeakMass(), dense_first=2),
    }
    out: ClassVar = "docs/benchmarks/video_sweep"
    columns: ClassVar = {
        "selector": "", "guidance": "g", "l1": "g", "tail": "g", "sparsity": ".1%", "sparse_heads": ".0%",
        "psnr_mean": ".2f", "psnr_worst": ".2f", "recognised": ".0%", "seconds": ".0f",
    }  # fmt: skip

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--model_name", default=str(DEMO), help="the demo model's folder")
        add("--mean_bounds", nargs="*", type=float, default=MEAN_BOUNDS, metavar="L1", help="bounds of the mean error")
        add("--tail_bounds", nargs="*", type=float, default=TAIL_BOUNDS, metavar="TAIL", help="bounds of the tail")
        add("--l1_beside_tail", type=float, default=FREE_L1, metavar="L1", help="default: not binding")
        add("--clips", type=int, default=10, help="unseen prompts to generate, of 10 (default: 10)")
        add("--seeds", type=int, default=2, help="how often, from other noise (default: 2)")
        add("--steps", type=int, default=12, help="denoising steps (default: 12)")
        add("--guidance", nargs="+", type=float, default=[GUIDANCE], help="classifier-free guidance (default: none)")
        add("--seed", type=int, default=0, help="of the calibration (default: 0)")
        add("--device", help="cuda or cpu (default: cuda if there is one)")
        add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16, and float32 on a CPU")

    def variants(self) -> Iterator[Row]:
        args = self.args
        self.sampler = sampler.load(args.model_name, steps=args.steps, device=args.device, dtype=args.dtype)
        self.model, transformer = self.sampler.pipe, self.sampler.pipe.transformer
        self.prompts, gpu = list(PROMPTS["unseen"][-args.clips :]), transformer.device.type == "cuda"
        self.facts = {
            "device": torch.cuda.get_device_name() if gpu else "CPU", "device_type": transformer.device.type,
            "versions": f"torch {torch.__version__}",
            "dtype": str(transformer.blocks[0].ffn.net[0].proj.weight.dtype),  # norms are always float32
            "steps": args.steps, "clips": len(self.prompts) * args.seeds, "recognised_dense": {},
        }  # fmt: skip
        for guidance in args.guidance:
            self.sampler.guidance = guidance
            restore(self.model)
            self.dense = [self.clips(seed) for seed in range(args.seeds)]
            right = self.facts["recognised_dense"][f"{guidance:g}"] = self.recognised(self.dense)
            print(f"{self.facts['clips']} clips, {right:.0%} recognised dense, guidance {guidance:g}", flush=True)
            yield {"guidance": guidance}

    def clips(self, seed: int) -> Tensor:
        """Clips of the unseen prompts ``[n, F, H, W, 3]``, the seed-th time."""
        return self.sampler.clips(self.prompts, 100 * seed).cpu()

    def recognised(self, groups: Sequence[Tensor]) -> float:
        """Share of clips in which a simple recogniser sees exactly what the prompt says."""
        pairs = [(clip, prompt) for clips in groups for clip, prompt in zip(clips, self.prompts, strict=True)]
        return sum(recognise(clip) == set(parse(prompt)) for clip, prompt in pairs) / len(pairs)

    def bounds(self, setting: Setting) -> Sequence[sweep.Bounds]:
        args = self.args
        return [*((l1, None) for l1 in args.mean_bounds), *((args.l1_beside_tail, tail) for tail in args.tail_bounds)]

    def patch_options(self, setting: Setting) -> dict[str, Any]:
        first = setting.dense_first
        return {"dense_steps": self.sampler.shares_of_steps(first, 0) if first else None}

    def items(self) -> tuple[Sequence[Any], dict[str, Any]]:
        seed = 1000 + self.args.seed
        return self.sampler.items(PROMPTS["calibration"], seed), {"seed": seed, "every": 2}

    def observe(self, item: Any) -> None:
        self.sampler.observe(item)

    def measure(self, l1: float, tail: float | None) -> Row:
        with Densities(self.model) as densities:
            groups = [self.clips(seed) for seed in range(self.args.seeds)]
        _, density = densities.result()
        pairs = zip(torch.cat(groups), torch.cat(self.dense), strict=True)
        # Clips that are equal to the bit have no finite PSNR.
        decibels = [min(float(psnr(sparse, exact)), 99.0) for sparse, exact in pairs]
        return {
            "sparsity": 1 - float(density.nanmean()),
            "sparsity_by_layer": (1 - density.nanmean(0)).tolist(),
            "sparsity_by_step": (1 - density.nanmean(1)).tolist(),
            "psnr": decibels,
            "psnr_mean": sum(decibels) / len(decibels),
            "psnr_worst": min(decibels),
            "recognised": self.recognised(groups),
        }

    @staticmethod
    def draw(data: Row, plt: Any) -> Any:
        """PSNR against sparsity, of the mean and the worst clip; a row per guidance, a line per selector and bound."""
        results, facts = data["results"], data["facts"]
        guidances = sorted({row["guidance"] for row in results})
        names = list(dict.fromkeys(row["selector"] for row in results))
        options = {"sharex": True, "sharey": "col", "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(len(guidances), 2, figsize=(12, 0.6 + 4.2 * len(guidances)), **options)
        for (guidance, name, kind), rows in lines(results).items():
            style = {"linestyle": {"mean": "--", "tail": "-"}.get(kind, ":"), "label": f"{name}, {kind} bound"}
            for axis, value in zip(axes[guidances.index(guidance)], ("psnr_mean", "psnr_worst"), strict=True):
                sweep.line(axis, rows, operator.itemgetter(value), names.index(name), **style)
        for pair, guidance in zip(axes, guidances, strict=True):
            text = "no guidance" if guidance <= 1 else f"guidance {guidance:g}"
            for axis, what in zip(pair, ("mean over the clips", "worst clip"), strict=True):
                axis.set_title(f"PSNR, {what} ({text})")
                axis.grid(alpha=0.3)
            pair[0].axhline(AIM, color="grey", linewidth=0.8)
            pair[0].set_ylabel("dB")
            pair[0].legend(fontsize=6.5, handlelength=4)
        for axis in axes[-1]:
            axis.set_xlabel("blocks left out, %")
        figure.suptitle(f"Demo Wan, {facts['steps']} steps, {facts['clips']} clips, {facts['device']}", fontsize=10)
        print("", summary(results), sep="\n")
        return figure


def kind_of(row: Row) -> str:
    """What bounds a result: "mean" or "tail" alone, or both, with the l1."""
    if row["tail"] is None:
        return "mean"
    return "tail" if row["l1"] >= FREE_L1 else f"l1 {row['l1']:g} and tail"


def lines(results: Sequence[Row]) -> dict[tuple[float, str, str], list[Row]]:
    """The results by guidance, selector and kind of bound."""
    found: dict[tuple[float, str, str], list[Row]] = {}
    for row in sorted(results, key=operator.itemgetter("sparsity")):
        found.setdefault((row["guidance"], row["selector"], kind_of(row)), []).append(row)
    return dict(sorted(found.items()))


def at_aim(rows: Sequence[Row], aim: float = AIM) -> tuple[float, float]:
    """Sparsity and worst clip where the mean PSNR is ``aim``, between two results; NaN outside them."""
    ordered = sorted(rows, key=operator.itemgetter("psnr_mean"))
    values = [row["psnr_mean"] for row in ordered]
    outside = {"left": math.nan, "right": math.nan}
    sparsity, worst = (
        float(np.interp(aim, values, [row[name] for row in ordered], **outside)) for name in ("sparsity", "psnr_worst")
    )
    return sparsity, worst


def summary(results: Sequence[Row]) -> str:
    """What every selector gives at the aim, as a table."""
    columns = {f"at {AIM:g} dB mean": "", "guidance": "g", "bound": "", "sparsity": ".1%", "worst clip": ".1f"}
    found = [(name, guidance, kind, *at_aim(rows)) for (guidance, name, kind), rows in lines(results).items()]
    return sweep.table(columns, [dict(zip(columns, row, strict=True)) for row in found])


if __name__ == "__main__":
    sys.exit(sweep.main(VideoSweep, __doc__))
