"""The whole path on a language model: tune → save → load into a fresh model → verify → generate → compare."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Subject:
    """What a demo runs.

    Attributes:
        program: the script's name, for messages.
        model: gives the model's folder or file.
        bounds: l1, pv_l1 and tail of the calibration.
        calibration, unseen: texts to tune on and to judge on, as :func:`modify_model.cli.language.token_windows` takes
            them.
        unseen_name: what the latter are called.
        unit: of a length: tokens, or bytes where a token is one.
        prompt: what a generation continues after a long text.
        query_blocks: looked at per call of the calibration.
    """

    program: str
    model: Callable[[], str | Path]
    bounds: Mapping[str, float]
    calibration: Callable[[], Any]
    unseen: Callable[[], Any]
    unseen_name: str
    unit: str
    prompt: str
    query_blocks: int = 16


class Demo:
    """The model, fresh from its folder."""

    def __init__(self, name: str | Path) -> None:
        self.model, self.tokenizer = language.load_model(name)

    def observe(self, window: Tensor) -> None:
        """Run a window for a calibration."""
        self.model(input_ids=window.to(self.model.device), use_cache=False, logits_to_keep=1)


@torch.inference_mode()
def prefill_ms(model: nn.Module, window: Tensor, repeats: int = 3) -> float:
    """Median time of one forward pass over a window."""

    def run() -> float:
        return float(model(input_ids=window, use_cache=False, logits_to_keep=1).logits[0, 0, 0])  # waits for the device

    return 1000 * statistics.median(timeit.repeat(run, number=1, repeat=repeats + 1)[1:])


def tune_and_save(subject: Subject, name: str | Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps 1 and 2; returns the statistics."""
    bounds = " ".join(f"{bound}={value}" for bound, value in subject.bounds.items())
    print(f"1/6  tune: {args.samples} samples of {args.max_length} {subject.unit}, bounds {bounds}", flush=True)
    began = time.perf_counter()
    demo = Demo(name)
    patch(demo.model, **subject.bounds, backend=sparse_backend(demo.model.device))
    windows = (subject.calibration(), args.max_length, args.samples, 0, "calibration")
    samples = language.token_windows(demo.tokenizer, *windows)
    calibration = tune(demo, samples, query_blocks=subject.query_blocks)
    print(report.table(calibration.statistics))
    print(f"     tuned in {time.perf_counter() - began:.0f} s")
    print("2/6  save")
    beside = calibration.save(args.out_path)
    print(f"     {args.out_path} ({Path(args.out_path).stat().st_size / 1024:.0f} KiB), statistics in {beside}")
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


def add_arguments(parser: argparse.ArgumentParser, out_path: str, length: int, unit: str) -> None:
    """The options that all demos have."""
    add = parser.add_argument
    add("--out_path", default=out_path, help="where the tuned file goes")
    add("--samples", type=whole(1, 1000), default=5, help="calibration samples")
    add("--max_length", type=whole(128), default=length, help=f"{unit} of a sample")
    add("--evaluate", type=whole(1, 1000), default=4, help="unseen windows for the comparison")


def main(subject: Subject, args: argparse.Namespace) -> int:
    """Run a demo; returns the exit code."""
    return guarded(subject.program, lambda: run(subject, args))


def run(subject: Subject, args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    check_output("out_path", args.out_path)
    began = time.perf_counter()
    name = subject.model()
    tuned = tune_and_save(subject, name, args)
    print("3/6  load into a fresh model", flush=True)
    demo = Demo(name)
    model, tokenizer = demo.model, demo.tokenizer
    patch(model, backend=sparse_backend(model.device))
    autotune.load_sparse_attention_state_dict(model, args.out_path)
    print("4/6  verify")
    verify(model)
    print("5/6  generate", flush=True)
    unseen, length = subject.unseen(), max(128, args.max_length - args.max_length // 8)
    window = language.token_windows(tokenizer, unseen, length, 1, 3, "unseen")[0]
    prompt = tokenizer.decode(window[0]) + "\n\n" + subject.prompt
    text, count, seconds = language.generate(model, tokenizer, prompt, 96)
    size = len(language.encode(tokenizer, prompt)[0])
    print(f"     after a sparse prefill of {size} {subject.unit}, {count} {subject.unit} in {seconds:.1f} s:")
    print("\n".join("     | " + line for line in (subject.prompt + text).splitlines()))
    print(f"6/6  compare, on {args.evaluate} windows of {subject.unseen_name}", flush=True)
    windows = language.token_windows(tokenizer, unseen, args.max_length, args.evaluate, 1, "unseen")
    compare(model, [window.to(model.device) for window in windows], tuned)
    print(f"all of it took {time.perf_counter() - began:.0f} s")
    return 0
