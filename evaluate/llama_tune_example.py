#!/usr/bin/env python
"""Tune a LLaMA model's sparse attention, save the thresholds, load them, generate.

python evaluate/llama_tune_example.py --tune --model_out_path models_dict/demo_llama.pt
python evaluate/llama_tune_example.py --generate --model_out_path models_dict/demo_llama.pt
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _llama import DEMO, encode, load_model, token_windows
from torch import Tensor, nn
from tqdm import tqdm

import autotune
from autotune import report
from autotune.calibration import Calibration
from autotune.observe import Grid
from modify_model.modify_llama import set_spas_sage_attn_llama
from modify_model.patching import patch, verify
from spas_attn.selectors import MeanSimilarity, PeakMass

SELECTORS = {"mean": MeanSimilarity, "peak": PeakMass}
# The similarity filter brought nothing on LLaMA (docs/benchmarks/README.md), and every value costs time.
NO_FILTER = Grid(sim=(-1.0,))
PROMPT = 'import json\n\n\ndef read_config(path):\n    """Read a JSON file and return it as a dict."""\n'


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tune", action="store_true", help="calibrate and save; otherwise thresholds are loaded")
    add("--parallel_tune", action="store_true", help="--tune on all visible GPUs, or in several processes on a CPU")
    add("--model_name", default=str(DEMO), help="a folder or a name on the hub (default: the demo model)")
    add("--model_out_path", default="models_dict/demo_llama_tuned.pt", help="the tuned file")
    add("--l1", type=float, default=0.06, help="bound of the mean error of selection, per head")
    add("--pv_l1", type=float, default=0.07, help="bound of the mean error of everything, per head")
    add("--tail", type=_tail, default=0.5, help="bound of the 99.5th percentile of a query's error, or 'none'")
    add("--layer_range", type=_range, help="start,stop: only these layers become sparse")
    add("--selector", choices=sorted(SELECTORS), default="mean", help="how blocks are chosen")
    add("--block", type=int, choices=(64, 128), default=64, help="mask block size, for queries and keys")
    add("--pool", type=int, default=8, help="length of the sub-blocks whose means are scored")
    add("--max_length", type=int, default=4096, help="tokens of a calibration sample")
    add("--num_tune_samples", type=int, default=8, help="calibration samples")
    add("--dataset", help="a text file, a folder, or a hub dataset (default: the demo's held-out source files)")
    add("--generate", action="store_true", help="generate from --prompt with the tuned model")
    add("--prompt", default=PROMPT)
    add("--max_new_tokens", type=int, default=128)
    add("--compile", action="store_true", help="torch.compile the model before generating")
    add("--backend", default="auto", help="attention backend, see spas_attn.explain")
    add("--resume", action="store_true", help="go on with an interrupted --tune from its last finished sample")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.tune = args.tune or args.parallel_tune
    if not (args.tune or args.generate):
        parser.error("nothing to do: give --tune, --generate or both")
    return args


def _tail(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _range(text: str) -> tuple[int, int]:
    try:
        start, stop = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected START,STOP such as 16,32, got {text!r}") from None
    return start, stop


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
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    new = out[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new), time.perf_counter() - started


def run_parallel(arguments: Sequence[str]) -> int:
    """Start one process per GPU (two on a processor) with torchrun and wait."""
    count = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.run([*command, __file__, *arguments], env=environment).returncode


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
        checkpoint=args.model_out_path + ".partial",
        resume=args.resume,
    )
    statistics = calibration.save(args.model_out_path)
    if first:
        print(report.statistics_text(calibration.statistics))
        print(report.table(calibration.statistics))
        print(f"thresholds: {args.model_out_path}\nstatistics: {statistics}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parse_arguments(arguments)
    distributed = "RANK" in os.environ
    if args.parallel_tune and not distributed:
        code = run_parallel(sys.argv[1:] if arguments is None else arguments)
        if code or not args.generate:
            return code
        args.tune = False
    device = None
    if distributed:
        gpu = torch.cuda.is_available()
        device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    model, tokenizer = load_model(args.model_name, device=device)
    set_spas_sage_attn_llama(model, l1=args.l1, pv_l1=args.pv_l1, tail=args.tail, layer_range=args.layer_range)
    patch(
        model,
        layer_range=args.layer_range,
        backend=args.backend,
        selector=make_selector(args.selector, args.block, args.pool),
    )
    if args.tune:
        run_tune(args, model, tokenizer)
    else:
        if not Path(args.model_out_path).is_file():
            raise SystemExit(f"no tuned file at {args.model_out_path!r}: run with --tune first")
        autotune.load_sparse_attention_state_dict(model, args.model_out_path, verbose=True)
    if distributed:
        dist.destroy_process_group()
    elif args.generate:
        verify(model)
        runner = torch.compile(model) if args.compile else model
        text, count, seconds = generate(runner, tokenizer, args.prompt, args.max_new_tokens)
        print(f"--- prompt\n{args.prompt}\n--- {count} new tokens in {seconds:.1f} s\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
