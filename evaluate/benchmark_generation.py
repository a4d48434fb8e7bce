#!/usr/bin/env python
"""Generation by prompt length, dense and sparse: time to first token, tokens per second, peak memory.

    python evaluate/benchmark_generation.py                                 # the demo LLaMA
    python evaluate/benchmark_generation.py --model_name meta-llama/Llama-3.1-8B-Instruct --lengths 8192 32768 \
        --tuned models_dict/llama_8b.pt
    python evaluate/benchmark_generation.py --method XAttention --lengths 4096

Time to first token is a forward pass over the prompt that fills the KV cache; tokens per second are those of greedy
decoding after it, which is dense in either case. The first run of a length compiles kernels: it is told apart as
warm-up. Peak memory is what PyTorch allocated on a GPU, the model included; on a CPU it is not known.
OUT.json is written after every row.

Exit code 2: an argument, a model or a file cannot be used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _long  # noqa: F401
import long_methods
import torch
from long_methods import METHODS
from torch import Tensor
from tqdm import tqdm

import autotune
from modify_model.cli import language
from modify_model.cli.arguments import DTYPES, check_output, whole
from modify_model.cli.parallel import guarded
from spas_attn import fallback_counts

Row = dict[str, Any]
COLUMNS = {
    "tokens": ",", "attention": "", "density": ".1%", "warm_up_ms": ",.1f", "first_token_ms": ",.1f",
    "tokens_per_second": ".1f", "peak_GiB": ".2f",
}  # fmt: skip


@torch.inference_mode()
def prefill(model: Any, ids: Tensor) -> tuple[Any, Tensor]:
    """The cache of a prompt ``[1, L]``, and the first new token ``[1, 1]``; waits for the device."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    token.cpu()
    return out.past_key_values, token


@torch.inference_mode()
def decode(model: Any, cache: Any, token: Tensor, count: int) -> None:
    """Decode ``count`` tokens greedily after a cache; waits for the device."""
    for _ in range(count):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    token.cpu()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def measure(model: Any, ids: Tensor, new_tokens: int, runs: int) -> Row:
    """Median times of a prompt ``[1, L]`` on the model as it now runs, and the first run's by itself."""
    gpu = ids.is_cuda
    warm_up, (cache, token) = seconds(lambda: prefill(model, ids))
    decode(model, cache, token, 2)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    firsts, rates = [], []
    for _ in range(runs):
        del cache
        took, (cache, token) = seconds(lambda: prefill(model, ids))
        firsts.append(took)
        took, _ = seconds(lambda cache=cache, token=token: decode(model, cache, token, new_tokens))
        rates.append(new_tokens / took)
    with autotune.record_density(model) as densities:
        prefill(model, ids)
    return {
        "density": densities.mean, "warm_up_ms": 1e3 * warm_up, "first_token_ms": 1e3 * statistics.median(firsts),
        "tokens_per_second": statistics.median(rates),
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown."""
    lines = [[name.replace("_", " ") for name in COLUMNS], ["---"] * len(COLUMNS)]
    for row in rows:
        lines.append(["–" if row[name] is None else format(row[name], form) for name, form in COLUMNS.items()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    path = args.out.with_name(args.out.name + ".json")
    check_output("out", str(path))
    model, tokenizer = language.load_model(args.model_name, device=args.device, dtype=args.dtype)
    gpu = model.device.type == "cuda"
    facts = {
        "model": Path(args.model_name).name, "device": torch.cuda.get_device_name() if gpu else "CPU",
        "dtype": str(model.dtype), "torch": torch.__version__, "new_tokens": args.max_new_tokens, "runs": args.runs,
        "backend": args.backend,
    }  # fmt: skip
    rows: list[Row] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for length in tqdm(args.lengths, unit="length"):
        ids = language.token_windows(tokenizer, args.prompts, length, 1, args.seed)[0].to(model.device)
        for how in ((None, None), (args.method, args.tuned)):
            name = long_methods.serve(model, *how, args.backend)
            found = measure(model, ids, args.max_new_tokens, args.runs)
            rows.append({"tokens": length, "attention": name, **found})
            path.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", "utf-8")
    print(table(rows))
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls fell back to dense attention: {reason}")
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(language.DEMO), help="a folder, a .gguf file, a name on the hub; default: the demo")
    add("--lengths", nargs="+", type=whole(128), default=[1024, 2048, 4096], help="tokens of a prompt")
    add("--method", choices=list(METHODS), default="XAttention", help="as published (default: XAttention)")
    add("--tuned", metavar="FILE", help="a calibrated file, in place of --method")
    add("--backend", default="auto", help="what computes sparse attention; auto runs dense where that is faster")
    add("--prompts", metavar="FILE", help="a text file or folder; left out: the demo's texts or the standard library")
    add("--max_new_tokens", type=whole(1), default=32, help="tokens to decode (default: 32)")
    add("--runs", type=whole(1), default=3, help="runs whose median is taken (default: 3)")
    add("--seed", type=whole(0), default=0)
    add("--device", help="cuda, cpu, … (left out: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto")
    add("--out", type=Path, default=Path("out/benchmark_generation"), help="OUT.json is written")
    args = parser.parse_args(given)
    return guarded("benchmark_generation.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
