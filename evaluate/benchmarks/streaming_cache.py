#!/usr/bin/env python
"""Memory and speed of decoding with streaming heads in Llama-3.1-8B's shape, beside transformers' DynamicCache.

    python evaluate/benchmarks/streaming_cache.py --out docs/benchmarks/streaming_cache    # on a GPU, under two minutes
    python evaluate/benchmarks/streaming_cache.py --tiny                 # a trial on a CPU; its times say nothing

Weights are random, vocabulary and depth are cut: the table says how many layers ran, and nothing is extrapolated. Full
heads run dense, so what is saved is the streaming heads' alone. `kv_MiB`: keys and values after the prompt and the new
tokens; `peak_MiB`: most memory beyond the weights, of the whole prompt at once and in chunks; `token_ms`: wall time of
a decoding step (of these layers, greedy, batch 1; cuDNN is switched off), `tokens_per_s` the same as a rate,
`token_gpu_ms` its kernels alone. `streaming` 0% is the unpatched model with a DynamicCache, which copies itself for
every token; the row of 12.5% shows what buffers with room save. OUT.json is written after every row; times are medians.
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

import timing
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modify_model import StreamingCache, patch, restore, stream_heads
from modify_model.cli.arguments import whole
from modify_model.cli.parallel import guarded

Row = dict[str, Any]
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
VOCABULARY = 1024
# cuDNN, which SDPA prefers on some GPUs, builds a plan for every new number of keys: in decoding, for every token.
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LONG = 65536  # tokens; longer prompts are run once, after a first run
COLUMNS = {
    "tokens": ",", "streaming": ".1%", "kv_MiB": ".1f", "kv_share": ".1%", "prefill_ms": ".1f",
    "prefill_peak_MiB": ".0f",
    "chunked_ms": ".1f", "chunked_peak_MiB": ".0f", "token_ms": ".3f", "tokens_per_s": ".1f", "token_gpu_ms": ".3f",
    "error": "",
}  # fmt: skip


def make_model(shape: dict[str, int], layers: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A LLaMA of this shape with random weights."""
    config = LlamaConfig(
        **shape, num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=1 << 18, rope_theta=5e5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_table(layers: int, heads: int, share: float) -> Tensor:
    """Which KV heads are full: in each layer the same number, at random places."""
    generator, count = torch.Generator().manual_seed(1), round(heads * share)
    order = torch.stack([torch.randperm(heads, generator=generator) for _ in range(layers)])
    return (order >= count).float()


class Benchmark:
    """One model and prompt after another.

    Args:
        model: runs with a cache of its own each time.
        new: decoding steps that are timed.
        chunk: tokens of a chunk of the prompt.
        sizes: sink and window in tokens.
    """

    def __init__(self, model: LlamaForCausalLM, new: int, chunk: int, sizes: tuple[int, int]) -> None:
        self.model, self.new, self.chunk, self.sizes = model, new, chunk, sizes
        self.device = next(model.parameters()).device
        self.weights = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def row(self, tokens: int, share: float) -> Row:
        """What a prompt of this length costs with this share of streaming KV heads."""
        row: Row = {"tokens": tokens, "streaming": share, "layers": self.model.config.num_hidden_layers}
        ids = torch.randint(0, VOCABULARY, (1, tokens), device=self.device, generator=self._generator())
        try:
            make_cache = self._prepared(share)
            self._fill(make_cache(), ids, tokens)  # compiles, and fills the allocator
            row["prefill_ms"], row["prefill_peak_MiB"], cache = self._filled(make_cache, ids, tokens)
            row |= self._decoded(cache, ids)
            del cache
            self._fill(make_cache(), ids, self.chunk)
            row["chunked_ms"], row["chunked_peak_MiB"], _ = self._filled(make_cache, ids, self.chunk)
        except (RuntimeError, ValueError) as error:
            row["error"] = str(error).splitlines()[0][:200]
        finally:
            restore(self.model)
        return row

    def _prepared(self, share: float) -> Callable[[], Any]:
        if share == 0:
            return lambda: DynamicCache(config=self.model.config)
        config = self.model.config
        table = make_table(config.num_hidden_layers, config.num_key_value_heads, share)
        stream_heads(patch(self.model), table, sink_tokens=self.sizes[0], local_tokens=self.sizes[1])
        return lambda: StreamingCache(self.model)

    def _filled(self, make_cache: Callable[[], Any], ids: Tensor, chunk: int) -> tuple[float, float | None, Any]:
        """Median milliseconds and peak memory of a prompt in chunks, and the last cache."""
        times, peak, cache = [], None, None
        for _ in range(1 if ids.shape[1] > _LONG else 2):
            del cache
            cache = make_cache()
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            self._fill(cache, ids, chunk)
            self._wait()
            times.append(1e3 * (time.perf_counter() - began))
            if self.device.type == "cuda":
                peak = (torch.cuda.max_memory_allocated() - self.weights) / 2**20
        return statistics.median(times), peak, cache

    def _fill(self, cache: Any, ids: Tensor, chunk: int) -> None:
        for part in ids.split(chunk, 1):
            self.model(part, past_key_values=cache, logits_to_keep=1)

    def _decoded(self, cache: Any, ids: Tensor) -> Row:
        """Decoding steps after the prompt, each of the token before; the wall time of all of them, which run ahead."""
        token, times = ids[:, -1:], []
        with sdpa_kernel(DECODING):
            for _ in range(3):
                self._wait()
                began = time.perf_counter()
                for _ in range(self.new):
                    token = self.model(token, past_key_values=cache).logits.argmax(-1)
                self._wait()
                times.append(1e3 * (time.perf_counter() - began) / self.new)
            on_gpu = self._on_gpu(cache, token)
        ms = statistics.median(times)
        if isinstance(cache, StreamingCache):
            size = cache.nbytes
        else:
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return {"token_ms": ms, "tokens_per_s": 1e3 / ms, "token_gpu_ms": on_gpu, "kv_MiB": size / 2**20}

    def _on_gpu(self, cache: Any, token: Tensor, steps: int = 4) -> float | None:
        """Milliseconds of a decoding step's kernels together, which no busy host makes longer."""
        if self.device.type != "cuda":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                self.model(token, past_key_values=cache)
            self._wait()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(float(event.time_range.elapsed_us()) for event in kernels) / steps / 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(2)


def with_shares(rows: Sequence[Row]) -> list[Row]:
    """Rows with their KV memory over that of the dense row of the same length."""
    dense = {row["tokens"]: row.get("kv_MiB") for row in rows if row["streaming"] == 0}

    def share(row: Row) -> Row:
        own, dense_size = row.get("kv_MiB"), dense.get(row["tokens"])
        return {**row, "kv_share": own / dense_size} if own and dense_size else row

    return sorted(map(share, rows), key=lambda row: (row["tokens"], row["streaming"]))


def table(rows: Sequence[Row]) -> str:
    """The rows as text, without the columns that are empty in all of them."""
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [shown]
    for row in rows:
        lines.append(["-" if row.get(name) is None else format(row[name], COLUMNS[name]) for name in shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{x:>{w}}" for x, w in zip(line, widths, strict=True)) for line in lines)


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments and run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lengths", type=whole(1), nargs="+", default=[8192, 131072, 32768, 65536], help="prompts, in tokens")
    add("--shares", type=float, nargs="+", default=[0, 0.5, 0.75, 0.125], help="of the KV heads, that stream")
    add("--layers", type=whole(1), default=4, help="decoder layers")
    add("--sink", type=whole(0), default=128, help="tokens of the sink")
    add("--window", type=whole(0), default=1024, help="tokens of the window")
    add("--chunk", type=whole(1), default=8192, help="tokens of a chunk of the prompt")
    add("--new", type=whole(1), default=32, help="decoding steps in each of three timed runs")
    add("--seconds", type=float, default=600, help="start no further row after this time")
    add("--tiny", action="store_true", help="a small model and short prompts, on a CPU")
    add("--out", type=Path, help="OUT.json is written")
    args = parser.parse_args(given)
    if not all(0 <= share <= 1 for share in args.shares):
        parser.error(f"--shares must lie in [0, 1], got {args.shares}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; --tiny tries the program without one")
    if args.tiny:
        args.lengths, args.sink, args.window, args.chunk, args.new, args.layers = [512, 2048], 64, 128, 256, 2, 2
    return guarded("streaming_cache.py", lambda: run(args))


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    device = torch.device("cpu" if args.tiny else "cuda")
    shape, dtype = (TINY, torch.float32) if args.tiny else (SHAPE, torch.bfloat16)
    facts = {
        "device": timing.device_name(device), "versions": timing.versions(), "dtype": str(dtype),
        "layers": args.layers, "sink": args.sink, "window": args.window, "chunk": args.chunk, **shape,
    }  # fmt: skip
    began, rows = time.perf_counter(), []
    benchmark = Benchmark(make_model(shape, args.layers, device, dtype), args.new, args.chunk, (args.sink, args.window))
    for length, share in [(length, share) for length in args.lengths for share in args.shares]:
        if time.perf_counter() - began > args.seconds:
            print(f"{length} tokens, {share:.1%}: left out, after {args.seconds:g} seconds")
            continue
        rows.append(benchmark.row(length, share))
        print(table(rows[-1:]), flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"facts": facts, "rows": with_shares(rows)}, indent=1)
            args.out.with_name(args.out.name + ".json").write_text(content + "\n", "utf-8")
    print("; ".join(f"{key} {value}" for key, value in facts.items()))
    print(table(with_shares(rows)), flush=True)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
