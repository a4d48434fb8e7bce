#!/usr/bin/env python
"""Prefill of a long prompt in Llama-3.1-8B's shape: what selection costs, and the time to the first token.

    python evaluate/benchmarks/prefill.py --out docs/benchmarks/prefill       # on a GPU, about five minutes
    python evaluate/benchmarks/prefill.py --parts select --lengths 131072
    python evaluate/benchmarks/prefill.py --tiny                              # a trial on a CPU; its times say nothing

`select`: choosing the blocks of one call (32 query and 8 KV heads of 128) over dense causal attention of the same call.
`first_token`: a forward pass over the prompt with its KV cache, the logits of the last token alone. Weights are random
and vocabulary and depth are cut: the table says how many layers ran, and nothing is extrapolated. Random weights attend
to everything, so each method's own threshold is searched for the asked density (MInference takes its published numbers
of columns and diagonals); `kept` is what all layers together computed. `auto` decides by the cost model whether the
sparse kernels pay. OUT.json is written after every row; times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from timing import Clock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune import Tuned, record_density
from autotune.module import sparse_modules
from modify_model import patch
from modify_model.cli.arguments import sparse_backend, whole
from modify_model.cli.parallel import guarded
from spas_attn import backends, fallback_counts
from spas_attn.call import Call
from spas_attn.select import select
from spas_attn.selectors import (
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    Selector,
    Streaming,
    TopK,
    XAttention,
)

Row = dict[str, Any]
METHODS: dict[str, Selector] = {
    "XAttention": XAttention(),
    "FlexPrefill": FlexPrefill(),
    "MInference": MInference(),
    "FlashPrefill": FlashPrefill(),
    "MeanSimilarity": MeanSimilarity(),
    "TopK": TopK(),
    "Streaming": Streaming(),
}
KERNELS = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = 32
VOCABULARY = 1024  # Llama's 128,256 cost memory, and time only for one token
STEPS = 14  # of the search for a density
COLUMNS = {
    "part": "", "tokens": ",", "method": "", "backend": "", "layers": "", "kept": ".1%", "ms": ".2f", "share": ".1%",
    "speedup": ".2f",
}  # fmt: skip


class Benchmark:
    """What runs, and the rows so far; OUT.json is written after each.

    Args:
        args: the options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, []
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.dtype = torch.float32 if args.tiny else torch.bfloat16
        self.shape = TINY if args.tiny else SHAPE
        self.sparse = sparse_backend(self.device)

    def add(self, **row: Any) -> None:
        """Add a row, print it, and write the file."""
        self.rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
        if self.args.out is not None:
            facts = {"device": timing.device_name(self.device), "versions": timing.versions()}
            path = self.args.out.with_name(self.args.out.name + ".json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"facts": facts, "rows": self.rows}, indent=1) + "\n", "utf-8")

    def ms(self, call: Callable[[], object]) -> float:
        """Median milliseconds of a call, after one that warms up (and compiles kernels)."""
        call()
        times = []
        for _ in range(self.args.runs):
            clock = Clock(self.device)
            call()
            clock.stop()
            times.append(clock.ms())
        return statistics.median(times)

    # -- selection -------------------------------------------------------------------------------------------------

    def select(self, length: int) -> None:
        """The time of selecting, for every method, over dense causal attention."""
        heads, k_heads = self.shape["num_attention_heads"], self.shape["num_key_value_heads"]
        dim = self.shape["hidden_size"] // heads
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (
            torch.randn(1, count, length, dim, generator=generator, device=self.device, dtype=self.dtype)
            for count in (heads, k_heads, k_heads)
        )
        times = {}
        for name, run in self.dense_calls(q, k, v).items():
            with refusals(f"{name}, {length:,} tokens"):
                times[name] = self.ms(run)
                self.add(part="select", tokens=length, method="dense", backend=name, ms=times[name])
        dense = min(times.values())
        call = Call.make(q, k, v, is_causal=True)
        for name in self.args.methods:
            with refusals(f"{name}, {length:,} tokens"):
                selector = METHODS[name]
                ms = self.ms(functools.partial(select, selector, call))
                kept = density_on(call, selector)
                self.add(part="select", tokens=length, method=name, kept=kept, ms=ms, share=ms / dense)

    def dense_calls(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Dense causal attention, by what computes it."""

        def sdpa(kernels: list[SDPBackend]) -> Tensor:
            with sdpa_kernel(kernels) if kernels else contextlib.nullcontext():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        if self.args.tiny:
            return {"SDPA": functools.partial(sdpa, [])}
        found: dict[str, Callable[[], Tensor]] = {
            name: functools.partial(sdpa, [kernel]) for name, kernel in KERNELS.items()
        }
        if backends.get("flash").missing() is None:
            call = Call.make(q, k, v, is_causal=True)
            found["flash-attn-4"] = functools.partial(backends.get("flash").run, call)
        return found

    # -- time to first token ---------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        """The model with random weights, made on the device, patched."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            **self.shape, num_hidden_layers=self.args.layers, vocab_size=VOCABULARY, rope_theta=500_000.0,
            max_position_embeddings=131_072, attn_implementation="sdpa",
        )  # fmt: skip
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return patch(LlamaForCausalLM(config).eval().requires_grad_(False))
        finally:
            torch.set_default_dtype(before)

    def first_token(self, model: nn.Module, length: int) -> None:
        """Time to first token: dense, and with every method at its density."""
        ids = torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1)).to(self.device)
        layers = f"{self.args.layers} of {LAYERS}"
        run = functools.partial(forward, model, ids)
        facts = {"part": "first_token", "tokens": length, "layers": layers}
        dense = float("inf")
        for name, context in self.dense_models(model):
            with refusals(f"{name}, {length:,} tokens"), context:
                ms = self.ms(run)
                dense = min(dense, ms)
                self.add(**facts, method="dense", backend=name, kept=1.0, ms=ms, speedup=dense / ms)
        call = seen_by_a_layer(model, ids)
        for name in self.args.methods:
            selector = (
                METHODS[name] if name in ("MInference", "Streaming") else at_density(name, call, self.args.density)
            )
            expected = density_on(call, selector)
            for backend in (self.sparse, "auto"):
                with refusals(f"{name}, {length:,} tokens"):
                    run_sparse(model, selector, expected, backend)
                    with record_density(model) as densities:
                        run()
                    ms = self.ms(run)
                    found = {"method": name, "backend": backend, "kept": densities.mean, "ms": ms}
                    self.add(**facts, **found, speedup=dense / ms)

    def dense_models(self, model: nn.Module) -> Iterator[tuple[str, contextlib.AbstractContextManager[Any]]]:
        """Ways to run the model dense: a name, and what to be within meanwhile."""
        for layer in sparse_modules(model).values():
            layer.mode = "dense"
        yield "SDPA", contextlib.nullcontext()  # the kernel that PyTorch picks
        if self.args.tiny:
            return
        yield from ((name, sdpa_kernel([kernel])) for name, kernel in KERNELS.items())
        if backends.get("flash").missing() is None:
            yield "flash-attn-4", _through(model, "flash")


@torch.inference_mode()
def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of the last token, with the cache of the whole prompt."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """Say what could not run, and go on: a kernel that refuses, or too little memory."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        print(f"skipped {what}: {str(error).splitlines()[0][:200]}", flush=True)


@contextlib.contextmanager
def _through(model: nn.Module, backend: str) -> Iterator[None]:
    """Run a patched model's dense calls on a backend of this library, with no blocks left out."""
    layers = list(sparse_modules(model).values())

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return backends.get(backend).run(Call.make(q, k, v, is_causal=True, scale=options["scale"]))

    for layer in layers:
        layer.forward = run
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@torch.inference_mode()
def seen_by_a_layer(model: nn.Module, ids: Tensor) -> Call:
    """The attention call of the layer in the middle."""
    layers = list(sparse_modules(model).values())
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        calls.append(Call.make(*args, is_causal=True, scale=options["scale"]))

    hook = layers[len(layers) // 2].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        forward(model, ids)
    finally:
        hook.remove()
    return calls[0]


def density_on(call: Call, selector: Selector) -> float:
    """Share of the blocks of a causal call that a selector keeps."""
    return float(select(selector, call).mask.density(True).mean())


def at_density(name: str, call: Call, target: float) -> Selector:
    """A method with its own threshold where it keeps ``target`` of the blocks of a call, by bisection."""
    selector = METHODS[name]
    base = dataclasses.replace(selector, min_budget=128) if isinstance(selector, FlexPrefill) else selector
    falls = isinstance(base, FlashPrefill)
    low, high = 0.0, 1.0
    best, nearest = base, float("inf")
    for _ in range(STEPS):
        x = (low + high) / 2
        tried = dataclasses.replace(base, **{base.tuned: x})
        kept = density_on(call, tried)
        if abs(kept - target) < nearest:
            best, nearest = tried, abs(kept - target)
        low, high = (x, high) if (kept < target) != falls else (low, x)
    return best


def run_sparse(model: nn.Module, selector: Selector, density: float, backend: str) -> None:
    """Run every layer with a selector as it is."""
    for layer in sparse_modules(model).values():
        layer.selector, layer.backend = selector, backend
        layer.set_thresholds(dataclasses.replace(Tuned.own(selector, layer.heads or 0), expected_density=density))


def table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for row in rows:
        values = ((row.get(name), form) for name, form in COLUMNS.items())
        lines.append(["–" if value is None else format(value, form) for value, form in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--parts", nargs="+", choices=["select", "first_token"], default=["select", "first_token"], help="default: both"
    )
    add("--lengths", nargs="+", type=whole(256), default=[8192, 32768, 131072], help="tokens of the prompt")
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS)[:4],
        metavar="METHOD",
        help=", ".join(METHODS),
    )
    add("--density", type=float, default=0.25, help="share of the blocks to keep (default: 0.25)")
    add("--layers", type=whole(1, LAYERS), default=8, help="layers of the model that run (default: 8)")
    add("--runs", type=whole(1), default=3, help="calls whose median is taken (default: 3)")
    add("--tiny", action="store_true", help="a small shape, on a CPU")
    add("--out", type=Path, help="OUT.json is written")
    args = parser.parse_args(given)
    if not 0 < args.density <= 1:
        parser.error(f"--density must lie in (0, 1], got {args.density}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; --tiny tries the program without one")
    return guarded("prefill.py", lambda: run(args))


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    benchmark = Benchmark(args)
    print(timing.device_name(benchmark.device), timing.versions(), sep="; ")
    print(table([]), flush=True)
    if "select" in args.parts:
        for length in args.lengths:
            benchmark.select(length)
    if "first_token" in args.parts:
        model = benchmark.model()
        for length in args.lengths:
            benchmark.first_token(model, length)
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls fell back to dense attention: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
