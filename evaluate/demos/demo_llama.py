#!/usr/bin/env python
"""`make demo`: the whole path on the demo LLaMA, in a few minutes on two CPU cores.

Tune (5 samples of 4,096 bytes) → save → load into a fresh model → verify → generate → compare dense with sparse.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autotune
from autotune import report
from modify_model import patch, verify
from modify_model.cli import language
from modify_model.cli.arguments import check_output, sparse_backend, whole
from modify_model.cli.driver import tune
from modify_model.cli.parallel import guarded

# The bounds of the demo: chosen from the frontier in docs/benchmarks for a perplexity change of at most 0.3%.
BOUNDS = {"l1": 0.2, "pv_l1": 0.24, "tail": 0.9}


class Demo:
    """The demo model, fresh from its folder."""

    def __init__(self) -> None:
        self.model, self.tokenizer = language.load_model(language.DEMO)

    def observe(self, window: Tensor) -> None:
        """Run a window for a calibration."""
        self.model(input_ids=window.to(self.model.device), use_cache=False, logits_to_keep=1)


@torch.inference_mode()
def prefill_ms(model: nn.Module, window: Tensor, repeats: int = 3) -> float:
    """Median time of one forward pass over a window."""

    def run() -> float:
        return float(model(input_ids=window, use_cache=False, logits_to_keep=1).logits[0, 0, 0])  # waits for the device

    return 1000 * statistics.median(timeit.repeat(run, number=1, repeat=repeats + 1)[1:])


def tune_and_save(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps 1 and 2; returns the statistics."""
    bounds = " ".join(f"{name}={value}" for name, value in BOUNDS.items())
    print(f"1/6  tune: {args.samples} samples of {args.max_length} bytes, bounds {bounds}")
    began = time.perf_counter()
    demo = Demo()
    patch(demo.model, **BOUNDS, backend=sparse_backend(demo.model.device))
    samples = language.token_windows(demo.tokenizer, None, args.max_length, args.samples, 0, group="calibration")
    calibration = tune(demo, samples)
    print(report.table(calibration.statistics))
    print(f"     tuned in {time.perf_counter() - began:.0f} s")
    print("2/6  save")
    about = {"model": "the demo LLaMA (13M parameters)", "prompts": f"Python source, {args.max_length} bytes each"}
    beside = calibration.save(args.out_path, about=about)
    print(f"     {args.out_path} ({Path(args.out_path).stat().st_size / 1024:.0f} KiB), statistics in {beside}")
    print(f"     to look at: {report.page_path(args.out_path)}")
    return json.loads(beside.read_text())


def compare(model: nn.Module, windows: Sequence[Tensor], tuned: Sequence[dict[str, Any]]) -> None:
    """Step 6: print sparsity and errors by layer, and perplexity and time, dense and sparse."""
    with autotune.record_density(model) as densities:
        losses = [language.negative_log_likelihood(model, windows)]
    times = [prefill_ms(model, windows[0])]
    with autotune.dense(model):
        losses.append(language.negative_log_likelihood(model, windows))
        times.append(prefill_ms(model, windows[0]))
    print(f"\n{'layer':>5}  {'sparsity':>8}  {'mean error':>10}  {'tail error':>10}   (errors: largest over heads)")
    for entry in tuned:
        worst = [max(head[name] for head in entry["heads"]) for name in ("l1_total", "tail_total")]
        sparsity = 1 - densities.per_layer[entry["path"]]
        print(f"{entry['layer_idx']:>5}  {sparsity:>8.1%}  {worst[0]:>10.4f}  {worst[1]:>10.3f}")
    print(f"{'all':>5}  {1 - densities.mean:>8.1%}\n")
    sparse, dense = (math.exp(loss) for loss in losses)
    print(f"{'':<12}  {'dense':>8}  {'sparse':>8}  {'change':>8}")
    print(f"{'perplexity':<12}  {dense:>8.4f}  {sparse:>8.4f}  {sparse / dense - 1:>+8.2%}")
    print(f"{'prefill, ms':<12}  {times[1]:>8.0f}  {times[0]:>8.0f}  {times[1] / times[0]:>7.2f}x")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_path", default="out/demo_llama.pt", help="where the tuned file goes")
    parser.add_argument("--samples", type=whole(1, 1000), default=5, help="calibration samples")
    parser.add_argument("--max_length", type=whole(128), default=4096, help="bytes of a sample")
    parser.add_argument("--evaluate", type=whole(1, 1000), default=4, help="unseen windows for the comparison")
    args = parser.parse_args(arguments)
    return guarded("demo_llama.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    check_output("out_path", args.out_path)
    began = time.perf_counter()
    tuned = tune_and_save(args)
    print("3/6  load into a fresh model")
    demo = Demo()
    model, tokenizer = demo.model, demo.tokenizer
    patch(model, backend=sparse_backend(model.device))
    autotune.load_sparse_attention_state_dict(model, args.out_path)
    print("4/6  verify")
    verify(model)
    print("5/6  generate")
    window = language.token_windows(tokenizer, None, max(128, args.max_length - 512), 1, 3, group="unseen")[0]
    prompt = tokenizer.decode(window[0]) + "\n\n" + language.PROMPT
    text, count, seconds = language.generate(model, tokenizer, prompt, 96)
    print(f"     after a sparse prefill of {len(prompt.encode())} bytes, {count} bytes in {seconds:.1f} s:")
    print("\n".join("     | " + line for line in (language.PROMPT + text).splitlines()))
    print(f"6/6  compare, on {args.evaluate} windows of files that the calibration never saw")
    windows = language.token_windows(tokenizer, None, args.max_length, args.evaluate, 1, group="unseen")
    compare(model, [window.to(model.device) for window in windows], tuned)
    print(f"all of it took {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
