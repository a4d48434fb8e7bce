#!/usr/bin/env python
"""`make demo-video`: the whole path on the demo Wan, a small text-to-video model, in minutes on two processor cores.

Tune on 4 prompts → save → load into a fresh model → verify → generate the same seeds dense and sparse → compare.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from _command_line import sparse_backend
from _demo_clips import DEMO, PROMPTS, parse
from _demo_recognise import recognise
from _diffusion import tune
from _diffusion_compare import Comparison, compare, density_table, table, write
from _diffusion_models import DemoSampler, load
from _loading import usable_device
from diffusers.utils.logging import disable_progress_bar
from wan_example import EXAMPLE

import autotune
from autotune import report
from autotune.observe import Grid
from modify_model import patch, verify
from spas_attn import fallback_counts
from spas_attn.selectors import PeakMass

# Chosen for about 42% of the blocks left out at a PSNR well above 30 dB: both bounds (docs/benchmarks/video.md).
L1, PV_L1, TAIL = 0.08, 0.096, 0.4
SELECTOR = PeakMass()
GRID = Grid(sim=(-1.0,))  # without the similarity filter, whose every value costs a pass
QUERY_BLOCKS = 8  # of 64, looked at per call


def chosen_prompts(clips: int) -> list[str]:
    """Prompts that no threshold was tuned on, with one and two shapes in turn."""
    kinds = [[prompt for prompt in PROMPTS["unseen"] if len(parse(prompt)) == count] for count in (1, 2)]
    order = [prompt for pair in zip(*kinds, strict=False) for prompt in pair]
    order += [prompt for prompt in PROMPTS["unseen"] if prompt not in order]
    return order[:clips]


def seen(comparison: Comparison) -> tuple[bool, bool]:
    """Whether a simple recogniser finds exactly the prompt's shapes, colours and moves: dense, sparse."""
    wanted = set(parse(comparison.prompt))
    return recognise(comparison.dense) == wanted, recognise(comparison.sparse) == wanted


def load_demo(args: argparse.Namespace, steps: int) -> DemoSampler:
    """The demo model, fresh from its folder; a ValueError when it is not there."""
    if not (Path(args.model_name) / "model_index.json").is_file():
        raise ValueError(f"no demo model in {args.model_name!r}: evaluate/train_demo_video.py makes one on a GPU")
    sampler = load(EXAMPLE, args.model_name, device=args.device, steps=steps)
    if not isinstance(sampler, DemoSampler):
        raise ValueError(f"{args.model_name!r} is not the demo model")
    return sampler


def make_file(args: argparse.Namespace, path: Path) -> None:
    """Tune, and save the thresholds."""
    prompts = PROMPTS["calibration"][: args.prompts]
    print(
        f"1/6  tune: {len(prompts)} prompts, {args.steps} steps, bounds l1={L1} pv_l1={PV_L1} tail={TAIL}", flush=True
    )
    began = time.perf_counter()
    sampler = load_demo(args, args.steps)
    transformer = sampler.pipe.transformer
    patch(sampler.pipe, l1=L1, pv_l1=PV_L1, tail=TAIL, selector=SELECTOR, backend=sparse_backend(transformer.device))
    calibration = tune(sampler, prompts, seed=1000, every=2, grid=GRID, query_blocks=QUERY_BLOCKS)
    print(report.table(calibration.statistics))
    size = f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.1f} M parameters"
    tokens = calibration.statistics[0]["lengths"][1]
    print(f"     tuned in {time.perf_counter() - began:.0f} s ({size}, {tokens} video tokens)")
    print("2/6  save")
    statistics = calibration.save(path)
    print(f"     {path} ({path.stat().st_size / 1024:.0f} KiB), statistics in {statistics}")


def run(args: argparse.Namespace) -> None:
    """Everything after the arguments."""
    began = time.perf_counter()
    disable_progress_bar()  # of loading, which takes a second
    folder = Path(args.out_path)
    path = folder / "demo_wan.pt"
    make_file(args, path)
    print("3/6  load into a fresh model")
    sampler = load_demo(args, args.steps)
    patch(sampler.pipe, backend=sparse_backend(sampler.pipe.transformer.device))
    autotune.load_sparse_attention_state_dict(sampler.pipe, path)
    print("4/6  verify")
    verify(sampler.pipe)
    prompts = chosen_prompts(args.clips)
    print(f"5/6  generate {len(prompts)} clips, each dense and sparse from the same noise", flush=True)
    gpu = usable_device(args.device).type == "cuda"
    found = compare(sampler, prompts, range(args.seed, args.seed + len(prompts)), warm_up=gpu)
    print("6/6  compare\n")
    print(table(found), density_table(found), sep="\n\n", end="\n\n")
    results = [seen(comparison) for comparison in found]
    for comparison, (exact, sparse) in zip(found, results, strict=True):
        words = ["right" if right else "not recognised" for right in (exact, sparse)]
        print(f"{comparison.prompt}: dense {words[0]}, sparse {words[1]}")
    print(f"recognised: dense {sum(a for a, _ in results)}, sparse {sum(b for _, b in results)} of {len(results)}\n")
    facts = {"model": str(args.model_name), "steps": args.steps, "l1": L1, "pv_l1": PV_L1, "tail": TAIL}
    for written in write(found, folder, facts, columns=2):
        print(f"written: {written}")
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls ran dense: {reason}")
    print(f"all of it took {time.perf_counter() - began:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(DEMO), metavar="FOLDER", help="the demo model (default: models_dict/demo_wan)")
    add("--out_path", default="out/demo_video", metavar="FOLDER", help="where everything goes")
    add("--prompts", type=int, default=4, metavar="N", help="prompts to tune on, of 4 (default: 4)")
    add("--clips", type=int, default=4, metavar="N", help="clips to compare, of 10 (default: 4)")
    add("--steps", type=int, default=12, metavar="N", help="denoising steps (default: 12)")
    add("--seed", type=int, default=0, help="of the first clip's noise (default: 0)")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    args = parser.parse_args(arguments)
    for name, most in (("prompts", len(PROMPTS["calibration"])), ("clips", len(PROMPTS["unseen"])), ("steps", 1000)):
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name} must be from 1 to {most}, got {getattr(args, name)}")
    try:
        with torch.no_grad():
            run(args)
    except (ValueError, OSError) as error:
        print(f"demo_video.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
