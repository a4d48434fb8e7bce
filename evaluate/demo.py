#!/usr/bin/env python
"""`make demo`: the whole path on the demo LLaMA, in a few minutes on two processor cores.

Tune (5 samples of 4,096 bytes) → save → load into a fresh model → verify → generate → compare dense with sparse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from _command_line import sparse_backend
from _llama import DEMO, load_model, negative_log_likelihood, record_density, token_windows
from llama_tune_example import NO_FILTER, PROMPT, generate, tune
from torch import Tensor, nn

import autotune
from autotune import report
from autotune.module import sparse_modules
from modify_model import patch, verify

# The bounds of the demo: chosen from the frontier in the README for a perplexity change of at most 0.3%.
L1, PV_L1, TAIL = 0.2, 0.24, 0.9


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run a tuned model on its original attention for a while."""
    modules = sparse_modules(model).values()
    for module in modules:
        module.dense_now = True
    try:
        yield
    finally:
        for module in modules:
            module.dense_now = False


@torch.inference_mode()
def prefill_seconds(model: nn.Module, window: Tensor, repeats: int = 3) -> float:
    """Median time of one forward pass over a window."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model(input_ids=window, use_cache=False, logits_to_keep=1)
        if window.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def sparsity_on(model: nn.Module, windows: Sequence[Tensor]) -> tuple[float, dict[str, float]]:
    """Loss on the windows, and each layer's mean sparsity while computing it."""
    modules = sparse_modules(model)
    seen: dict[str, list[float]] = {path: [] for path in modules}
    total = 0.0
    record_density(model)
    for window in windows:
        total += negative_log_likelihood(model, [window])
        for path, module in modules.items():
            density = 1.0 if module.last_density is None else float(module.last_density.mean())
            seen[path].append(1 - density)
    for module in modules.values():
        module.record_density, module.last_density = False, None
    return total / len(windows), {path: sum(values) / len(values) for path, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_path", default="out/demo_llama.pt", help="where the tuned file goes")
    parser.add_argument("--samples", type=int, default=5, help="calibration samples")
    parser.add_argument("--max_length", type=int, default=4096, help="bytes of a sample")
    parser.add_argument("--evaluate", type=int, default=4, help="unseen windows for the comparison")
    args = parser.parse_args()
    began = time.perf_counter()

    print(f"1/6  tune: {args.samples} samples of {args.max_length} bytes, bounds l1={L1} pv_l1={PV_L1} tail={TAIL}")
    model, tokenizer = load_model(DEMO)
    device = next(model.parameters()).device
    backend = sparse_backend(device)
    patch(model, l1=L1, pv_l1=PV_L1, tail=TAIL, backend=backend)
    samples = token_windows(tokenizer, None, args.max_length, args.samples, 0, group="calibration")
    calibration = tune(model, samples, grid=NO_FILTER)
    print(report.table(calibration.statistics))
    print(f"     tuned in {time.perf_counter() - began:.0f} s")

    print("2/6  save")
    statistics = calibration.save(args.out_path)
    print(f"     {args.out_path} ({Path(args.out_path).stat().st_size / 1024:.0f} KiB), statistics in {statistics}")

    print("3/6  load into a fresh model")
    model, tokenizer = load_model(DEMO)
    patch(model, backend=backend)
    autotune.load_sparse_attention_state_dict(model, args.out_path)

    print("4/6  verify")
    verify(model)

    print("5/6  generate")
    window = token_windows(tokenizer, None, args.max_length - 512, 1, 3, group="unseen")[0]
    prompt = tokenizer.decode(window[0]) + "\n\n" + PROMPT
    new_text, count, seconds = generate(model, tokenizer, prompt, 96)
    print(f"     after a sparse prefill of {len(prompt.encode())} bytes, {count} bytes in {seconds:.1f} s:")
    print("\n".join("     | " + line for line in (PROMPT + new_text).splitlines()))

    print(f"6/6  compare, on {args.evaluate} windows of files that the calibration never saw")
    windows = [w.to(device) for w in token_windows(tokenizer, None, args.max_length, args.evaluate, 1, group="unseen")]
    sparse_loss, sparsity = sparsity_on(model, windows)
    sparse_time = prefill_seconds(model, windows[0])
    with dense(model):
        dense_loss = negative_log_likelihood(model, windows)
        dense_time = prefill_seconds(model, windows[0])
    print_result(json.loads(statistics.read_text()), sparsity, dense_loss, sparse_loss, dense_time, sparse_time)
    print(f"all of it took {time.perf_counter() - began:.0f} s")


def print_result(
    statistics: report.Statistics,
    sparsity: dict[str, float],
    dense_loss: float,
    sparse_loss: float,
    dense_time: float,
    sparse_time: float,
) -> None:
    """The closing table."""
    print(f"\n{'layer':>5}  {'sparsity':>8}  {'mean error':>10}  {'tail error':>10}   (errors: largest over heads)")
    for entry, value in zip(statistics, sparsity.values(), strict=True):
        worst = [max(head[name] for head in entry["heads"]) for name in ("l1_total", "tail_total")]
        print(f"{entry['layer_idx']:>5}  {value:>8.1%}  {worst[0]:>10.4f}  {worst[1]:>10.3f}")
    print(f"{'all':>5}  {sum(sparsity.values()) / len(sparsity):>8.1%}\n")
    dense_ppl, sparse_ppl = math.exp(dense_loss), math.exp(sparse_loss)
    print(f"{'':<12}  {'dense':>8}  {'sparse':>8}  {'change':>8}")
    print(f"{'perplexity':<12}  {dense_ppl:>8.4f}  {sparse_ppl:>8.4f}  {sparse_ppl / dense_ppl - 1:>+8.2%}")
    times = f"{1000 * dense_time:>8.0f}  {1000 * sparse_time:>8.0f}  {dense_time / sparse_time:>7.2f}x"
    print(f"{'prefill, ms':<12}  {times}")


if __name__ == "__main__":
    main()
