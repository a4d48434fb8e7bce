#!/usr/bin/env python
r"""Tune a LLaMA model's sparse attention, save the thresholds, load them, generate.

    python evaluate/llama_tune_example.py --tune
    python evaluate/llama_tune_example.py --generate
    python evaluate/llama_tune_example.py --parallel_tune --generate --model_name meta-llama/Llama-3.1-8B-Instruct \
        --model_out_path models_dict/llama_8b.pt --layer_range 2,32 --max_length 8192

Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, --resume goes on.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from _command_line import (
    Help,
    check_tuned_output,
    checkpoint_of,
    join_ranks,
    run_script,
    save,
    tail_bound,
)
from _llama import DEMO, check_name, encode, greedy, layer_range, load_model, token_windows, tuned_layers
from torch import Tensor, nn
from tqdm import tqdm

import autotune
from autotune import report
from autotune.calibration import Calibration
from autotune.module import check_bounds
from autotune.observe import Grid
from modify_model.modify_llama import set_spas_sage_attn_llama
from modify_model.patching import patch, verify
from spas_attn import backends, fallback_counts
from spas_attn.selectors import MeanSimilarity, PeakMass

SELECTORS = {"mean": MeanSimilarity, "peak": PeakMass}
# The similarity filter brought nothing on LLaMA (docs/benchmarks/README.md), and every value costs time.
NO_FILTER = Grid(sim=(-1.0,))
PROMPT = 'import json\n\n\ndef read_config(path):\n    """Read a JSON file and return it as a dict."""\n'


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--tune", action="store_true", help="calibrate and save; otherwise thresholds are loaded")
    add("--parallel_tune", action="store_true", help="--tune on all visible GPUs, or in several processes on a CPU")
    add("--model_name", default=str(DEMO), metavar="NAME", help="a folder or a name on the hub")
    add("--model_out_path", default="models_dict/demo_llama_tuned.pt", metavar="PATH", help="the tuned file")
    add("--l1", type=float, default=0.06, help="bound of the mean error of selection, per head")
    add("--pv_l1", type=float, default=0.07, help="bound of the mean error of everything, per head")
    add("--tail", type=tail_bound, default=0.5, help="bound of the 99.5 percentile of a query's error, or 'none'")
    add("--layer_range", type=layer_range, metavar="START,STOP", help="only layers START to STOP - 1 become sparse")
    add("--selector", choices=sorted(SELECTORS), default="mean", help="how blocks are chosen")
    add("--block", type=int, choices=(64, 128), default=64, help="mask block size, for queries and keys")
    add("--pool", type=int, default=8, help="length of the sub-blocks whose means are scored")
    add("--max_length", type=int, default=4096, help="tokens of a calibration sample")
    add("--num_tune_samples", type=int, default=8, metavar="N", help="calibration samples")
    add("--dataset", help="a text file, a folder, or a hub dataset; left out: the demo's held-out source files")
    add("--generate", action="store_true", help="generate from --prompt with the tuned model")
    add("--prompt", default=PROMPT, help="the text to continue; left out: a few lines of Python")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="tokens to generate")
    add("--compile", action="store_true", help="compile the model before generating (takes about a minute)")
    add("--backend", choices=("auto", *sorted(backends.names())), default="auto", help="what computes the attention")
    add("--resume", action="store_true", help="go on with an interrupted --tune from its last finished sample")
    add("--seed", type=int, default=0, help="of the calibration samples")
    args = parser.parse_args(arguments)
    args.tune = args.tune or args.parallel_tune
    if not (args.tune or args.generate):
        parser.error("nothing to do: give --tune, --generate or both")
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse, before a model is loaded, what cannot be meant; a ValueError says why."""
    check_bounds(args.l1, args.pv_l1, args.tail)
    make_selector(args.selector, args.block, args.pool)
    for name, least in (("max_length", args.block), ("num_tune_samples", 1), ("max_new_tokens", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.tune:
        check_tuned_output(args.model_out_path)


def make_selector(name: str = "mean", block: int = 64, pool: int = 8) -> MeanSimilarity:
    """The selector of --selector, --block and --pool."""
    return SELECTORS[name](block_q=block, block_k=block, pool=pool)


@torch.no_grad()
def tune(model: nn.Module, windows: Sequence[Tensor], *, show: bool = True, **options: Any) -> Calibration:
    """Calibrate a patched model on windows of token ids; options as in :func:`autotune.calibrate`."""
    device = next(model.parameters()).device
    with autotune.calibrate(model, **options) as calibration:
        bar = tqdm(unit="pass", disable=not show, desc="tuning", total=0)
        for window in calibration.prompts(windows):
            bar.total = calibration.expected_passes
            bar.set_description(f"tuning ({calibration.phase})")
            bar.refresh()
            model(input_ids=window.to(device), use_cache=False, logits_to_keep=1)
            bar.update()
        bar.total = bar.n
        bar.close()
    return calibration


@torch.inference_mode()
def generate(model: nn.Module, tokenizer: Any, prompt: str, max_new_tokens: int) -> tuple[str, int, float]:
    """Continue a prompt greedily; returns the new text, the number of new tokens and the seconds."""
    ids = encode(tokenizer, prompt, next(model.parameters()).device)
    started = time.perf_counter()
    new = greedy(model, tokenizer, ids, max_new_tokens)  # type: ignore[arg-type]
    return tokenizer.decode(new, skip_special_tokens=True), len(new), time.perf_counter() - started


def run_tune(args: argparse.Namespace, model: nn.Module, tokenizer: Any) -> None:
    """--tune: calibrate, print and save."""
    windows = token_windows(
        tokenizer, args.dataset, args.max_length, args.num_tune_samples, args.seed, group="calibration"
    )
    first = not dist.is_initialized() or dist.get_rank() == 0
    calibration = tune(
        model,
        windows,
        show=first,
        grid=NO_FILTER,
        seed=args.seed,
        checkpoint=checkpoint_of(args.model_out_path, args.resume, say=first),
        resume=args.resume,
    )
    statistics = save(calibration, args.model_out_path)
    if first:
        print(report.statistics_text(calibration.statistics))
        print(report.table(calibration.statistics))
        print(f"thresholds: {args.model_out_path}\nstatistics: {statistics}")


def run_generate(args: argparse.Namespace, model: nn.Module, tokenizer: Any) -> None:
    """--generate: continue the prompt and print it."""
    verify(model)
    if args.compile:
        print("compiling …", flush=True)
        model.compile()  # in place: torch.compile(model) would leave model.generate with the original's forward
        generate(model, tokenizer, args.prompt, min(4, args.max_new_tokens))
    text, count, seconds = generate(model, tokenizer, args.prompt, args.max_new_tokens)
    print(f"--- prompt\n{args.prompt}\n--- {count} new tokens in {seconds:.1f} s\n{text}")
    for reason, calls in fallback_counts().items():
        print(f"--- {calls} calls ran dense: {reason}")


def work(args: argparse.Namespace, distributed: bool) -> None:
    """Everything after the arguments, in one process."""
    model, tokenizer = load_model(args.model_name, device=join_ranks() if distributed else None)
    state = None if args.tune else autotune.load(args.model_out_path)
    layers = args.layer_range if state is None else args.layer_range or tuned_layers(model, state)
    set_spas_sage_attn_llama(model, l1=args.l1, pv_l1=args.pv_l1, tail=args.tail, layer_range=layers)
    selector = make_selector(args.selector, args.block, args.pool)
    patch(model, layer_range=layers, backend=args.backend, selector=selector)
    if state is None:
        run_tune(args, model, tokenizer)
    else:
        autotune.load_sparse_attention_state_dict(model, state, verbose=True)
    if distributed:
        dist.destroy_process_group()
    elif args.generate:
        run_generate(args, model, tokenizer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse_arguments(given)
    check, run = (functools.partial(check_name, args.model_name), functools.partial(work, args))
    return run_script(__file__, args, given, check, run, goes_on=args.generate)


if __name__ == "__main__":
    sys.exit(main())
