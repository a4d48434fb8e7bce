#!/usr/bin/env python
"""`make demo-video`: the whole path on the demo Wan, a small text-to-video model, in minutes on two CPU cores.

Tune on 4 prompts → save → load into a fresh model → verify → generate the same seeds dense and sparse → compare.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _model  # noqa: F401
import sampler
import torch
from clips import DEMO
from diffusers.utils.logging import disable_progress_bar
from prompts import PROMPTS, parse
from recognise import recognise

import autotune
from autotune import report
from modify_model import patch, verify
from modify_model.cli.arguments import sparse_backend, whole
from modify_model.cli.compare import Comparison, compare, density_table, table
from modify_model.cli.driver import tune
from modify_model.cli.parallel import guarded
from modify_model.cli.pictures import write
from spas_attn import fallback_counts
from spas_attn.selectors import PeakMass

# Chosen for about 42% of the blocks left out at a PSNR well above 30 dB: both bounds (docs/benchmarks/video.md).
BOUNDS = {"l1": 0.08, "pv_l1": 0.096, "tail": 0.4}
QUERY_BLOCKS = 8  # of 64, looked at per call


def chosen_prompts(clips: int) -> list[str]:
    """Prompts that no threshold was tuned on, with one and two shapes in turn."""
    one, two = ([prompt for prompt in PROMPTS["unseen"] if len(parse(prompt)) == count] for count in (1, 2))
    order = [prompt for pair in itertools.zip_longest(one, two) for prompt in pair if prompt]
    return order[:clips]


def seen(comparison: Comparison) -> tuple[bool, bool]:
    """Whether a simple recogniser finds exactly the prompt's shapes, colours and moves: dense, sparse."""
    wanted = set(parse(comparison.prompt))
    return recognise(comparison.dense) == wanted, recognise(comparison.sparse) == wanted


def tune_and_save(args: argparse.Namespace, path: Path) -> None:
    """Steps 1 and 2."""
    prompts = PROMPTS["calibration"][: args.prompts]
    bounds = " ".join(f"{name}={value}" for name, value in BOUNDS.items())
    print(f"1/6  tune: {len(prompts)} prompts, {args.steps} steps, bounds {bounds}", flush=True)
    began = time.perf_counter()
    demo = sampler.load(args.model_name, steps=args.steps, device=args.device)
    transformer = demo.pipe.transformer
    patch(demo.pipe, **BOUNDS, selector=PeakMass(), backend=sparse_backend(transformer.device))
    calibration = tune(demo, demo.items(prompts, 1000), seed=1000, every=2, query_blocks=QUERY_BLOCKS)
    print(report.table(calibration.statistics))
    size = f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.1f} M parameters"
    tokens = calibration.statistics[0]["lengths"][1]
    print(f"     tuned in {time.perf_counter() - began:.0f} s ({size}, {tokens} video tokens)")
    print("2/6  save")
    statistics = calibration.save(path, about={"model": "the demo Wan", "prompts": "captions of moving shapes"})
    print(f"     {path} ({path.stat().st_size / 1024:.0f} KiB), statistics in {statistics}")
    print(f"     to look at: {report.page_path(path)}")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Everything after the arguments; returns the exit code."""
    began = time.perf_counter()
    disable_progress_bar()  # of loading, which takes a second
    folder = Path(args.out_path)
    path = folder / "demo_wan.pt"
    tune_and_save(args, path)
    print("3/6  load into a fresh model")
    demo = sampler.load(args.model_name, steps=args.steps, device=args.device)
    device = demo.pipe.transformer.device
    patch(demo.pipe, backend=sparse_backend(device))
    autotune.load_sparse_attention_state_dict(demo.pipe, path)
    print("4/6  verify")
    verify(demo.pipe)
    prompts = chosen_prompts(args.clips)
    print(f"5/6  generate {len(prompts)} clips, each dense and sparse from the same noise", flush=True)
    inputs = [(item[0], item[1], item) for item in demo.items(prompts, args.seed)]
    found = compare(demo, inputs, warm_up=device.type == "cuda")
    print("6/6  compare\n")
    print(table(found), density_table(found), sep="\n\n", end="\n\n")
    results = [seen(comparison) for comparison in found]
    for comparison, right in zip(found, results, strict=True):
        words = ["right" if each else "not recognised" for each in right]
        print(f"{comparison.prompt}: dense {words[0]}, sparse {words[1]}")
    dense, sparse = (sum(column) for column in zip(*results, strict=True))
    print(f"recognised: dense {dense}, sparse {sparse} of {len(results)}\n")
    for written in write(found, folder, {"model": str(args.model_name), "steps": args.steps, **BOUNDS}):
        print(f"written: {written}")
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls fell back to dense attention: {reason}")
    print(f"all of it took {time.perf_counter() - began:.0f} s")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(DEMO), metavar="FOLDER", help="the demo model (default: models_dict/demo_wan)")
    add("--out_path", default="out/demo_video", metavar="FOLDER", help="where everything goes")
    add("--prompts", type=whole(1, 4), default=4, metavar="N", help="prompts to tune on, of 4 (default: 4)")
    add("--clips", type=whole(1, 10), default=4, metavar="N", help="clips to compare, of 10 (default: 4)")
    add("--steps", type=whole(1, 1000), default=12, metavar="N", help="denoising steps (default: 12)")
    add("--seed", type=int, default=0, help="of the first clip's noise (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args(arguments)
    return guarded("demo_video.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
