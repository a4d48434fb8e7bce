#!/usr/bin/env python
"""Hunyuan3D's denoisers and volume decoder at real sizes with random weights: what each saving is worth.

    python evaluate/benchmarks/hunyuan3d.py --out docs/benchmarks/hunyuan3d   # on a GPU, about three minutes
    python evaluate/benchmarks/hunyuan3d.py --models 2mini
    python evaluate/benchmarks/hunyuan3d.py --tiny                            # a trial on a CPU; its times say nothing

A step is guided: one conditional and one unconditional pass. `plain_step` computes them as one batch of two, and
`all_savings` with the condition prepared once and the equal unconditional tokens merged; `all_savings_by_bias` does the
same with ln(n) as a bias of PyTorch's attention. Three milliseconds are given: `eager` is the wall clock of a call,
`device` the sum of its kernels, `graph` the replay of its CUDA graph (2.1 has none: its experts are counted on the
host). Errors are relative L2. 8 bits are forced on a GPU; a CPU computes them exactly, and says so. OUT.json is written
after every figure; times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from modify_model.cli.arguments import whole
from modify_model.cli.parallel import guarded
from modify_model.hunyuan3d import attention, dit, plain, volume
from modify_model.hunyuan3d.attention import attend
from modify_model.hunyuan3d.condition import Denoiser
from modify_model.hunyuan3d.samplers import flow_sigmas, sample
from modify_model.hunyuan3d.vae import ShapeVAE
from modify_model.hunyuan3d.volume import KeySelection, decode_volume
from spas_attn import sparse_attention
from spas_attn.selectors import Dense, TopK

Call = Callable[[], Any]
MINI = {"depth": 8, "depth_single_blocks": 16}
# By name: the file of its class, latents, condition tokens, and options other than the class's own.
MODELS: dict[str, tuple[Any, int, int, dict[str, int]]] = {
    "2.0": (dit, 3072, 1370, {}),
    "2mini": (dit, 512, 1370, MINI),
    "2mv 4 views": (dit, 3072, 5480, {}),
    "2.1": (plain, 4096, 1370, {}),
}
SMALL = {"hidden_size": 64, "num_heads": 4}
TINY: dict[str, tuple[Any, int, int, dict[str, int]]] = {
    "2.0": (dit, 200, 70, {"depth": 1, "depth_single_blocks": 2, "context_in_dim": 32, **SMALL}),
    "2mini": (dit, 60, 70, {"depth": 1, "depth_single_blocks": 1, "context_in_dim": 32, **SMALL}),
    "2mv 4 views": (dit, 200, 280, {"depth": 1, "depth_single_blocks": 2, "context_in_dim": 32, **SMALL}),
    "2.1": (plain, 300, 70, {"depth": 3, "num_moe_layers": 1, "num_experts": 4, "context_dim": 32, **SMALL}),
}
DECODERS = (3072, 4096)  # latents of 2.0 and of 2.1
KEEPS = (0.5, 0.25)
SCALE = 5.0  # of guidance


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another function in a module's place for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def with_bias(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    """Attention in which key 0 counts ``repeats`` times, by a bias whose rows are aligned as the kernels want them."""
    bias = q.new_zeros(1, 1, 1, -(-k.shape[2] // 8) * 8)[..., : k.shape[2]]
    bias[..., 0] = math.log(repeats)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, -1, q.shape[2], -1))


class Benchmark:
    """What runs, and the figures so far.

    Args:
        args: the options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.tiny, self.out = args.tiny, args.out
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.dtype = torch.float32 if args.tiny else torch.bfloat16
        self.runs, self.steps = (1, 3) if args.tiny else (args.runs, args.steps)
        self.backend = "auto" if args.tiny else "triton"
        self.results: dict[str, dict[str, Any]] = {}

    def note(self, case: str, **figures: Any) -> None:
        """Keep, print and write figures of a case."""
        self.results.setdefault(case, {}).update(figures)
        print(f"{case}: " + ", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
        if self.out is not None:
            file = self.out.with_name(f"{self.out.name}.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = {"device": timing.device_name(self.device), "versions": timing.versions(), "dtype": str(self.dtype)}
            file.write_text(json.dumps({**facts, "results": self.results}, indent=1) + "\n", "utf-8")

    def seconds(self, call: Call) -> float:
        """Wall clock of one call, with all that it starts on the device."""
        self._wait()
        begin = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - begin

    def ms(self, call: Call) -> float:
        """Median milliseconds, after three calls that warm up."""
        for _ in range(1 if self.tiny else 3):
            call()
        return round(1e3 * statistics.median(self.seconds(call) for _ in range(self.runs)), 3)

    def three(self, case: str, name: str, call: Call, graph: bool = True) -> None:
        """Milliseconds of one way: eager, on the device, and as a graph (None without a GPU)."""
        found = {"eager": self.ms(call), "device": None, "graph": None}
        if not self.tiny:
            found["device"] = self._device_ms(call)
            found["graph"] = self._graph_ms(call) if graph else None
        self.note(case, **{name: found})

    def _wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def _device_ms(self, call: Call) -> float:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(3):
                call()
            self._wait()
        return round(sum(event.self_device_time_total for event in found.key_averages()) / 3e3, 3)

    def _graph_ms(self, call: Call) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.ms(graph.replay)

    def make(self, kind: Callable[..., Any], **options: Any) -> Any:
        """A model with random weights, the same every time."""
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return kind(engine="sdpa", **options).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)

    def denoiser(self, case: str) -> None:
        """All figures of one denoiser."""
        module, latents, tokens, options = (TINY if self.tiny else MODELS)[case]
        model = self.make(dit.Hunyuan3DDiT if module is dit else plain.HunYuanDiTPlain, **options)
        torch.manual_seed(1)
        x = torch.randn(1, latents, 64, device=self.device, dtype=self.dtype)
        c = torch.randn(1, tokens, model.context_dim, device=self.device, dtype=self.dtype)
        self.guided_step(case, model, x, c, graph=module is dit)
        self.other_attention(case, model, x, c, module)
        self.whole_run(case, model, x, c)
        self.rounding(case, model, x, c)

    def guided_step(self, case: str, model: Denoiser, x: Tensor, c: Tensor, graph: bool) -> None:
        """A conditional and an unconditional pass: plain, and with the savings."""
        t, zero = torch.full((1,), 0.3, device=self.device), torch.zeros_like(c)
        both, contexts = torch.cat([x, x]), {"main": torch.cat([c, zero])}
        model.merge_constant = False
        self.three(case, "plain_step", lambda: model(both, t, contexts), graph)
        self.three(case, "plain_conditional", lambda: model(x, t, {"main": c}), graph)
        once = model.prepare(contexts)
        self.three(case, "condition_once", lambda: model(both, t, once), graph)
        exact = model(both, t, contexts)
        model.merge_constant = True
        self.three(case, "constant_merged_alone", lambda: model(both, t, contexts), False)  # prepare reads on the host
        merged, merged_zero = model.prepare(contexts), model.prepare({"main": zero})
        self.three(case, "all_savings", lambda: model(both, t, merged), graph)
        self.three(case, "unconditional_merged", lambda: model(x, t, merged_zero), graph)
        with replaced(attention, "_with_repeats", with_bias):
            self.three(case, "all_savings_by_bias", lambda: model(both, t, merged), graph)
        self.note(case, merged_error_to_plain=error(model(both, t, merged), exact))
        for way in ("eager", "device", "graph"):
            saved, whole_step = (self.results[case][name][way] for name in ("all_savings", "plain_step"))
            self.note(case, **{f"ratio_{way}": round(saved / whole_step, 4) if saved else None})

    def other_attention(self, case: str, model: Denoiser, x: Tensor, c: Tensor, module: Any) -> None:
        """The conditional pass in 8 bits, and with forced sparse self-attention."""
        t, ready = torch.full((1,), 0.3, device=self.device), model.prepare({"main": c})
        exact = model(x, t, ready)

        def measure(name: str) -> None:
            self.three(case, f"conditional_{name}", lambda: model(x, t, ready), False)
            self.note(case, **{f"error_{name}": error(model(x, t, ready), exact)})

        sage = importlib.util.find_spec("sageattention") is not None and not self.tiny
        for name in ("int8", *(["sage"] if sage else [])):
            model.engine = name
            measure(name)
        model.engine = "sdpa"

        def fp8(q: Tensor, k: Tensor, v: Tensor, engine: str = "sdpa", repeats: int = 1) -> Tensor:
            return sparse_attention(q, k, v, Dense(), precision="int8_fp8", backend=self.backend)

        with replaced(module, "attend", fp8):
            measure("int8_fp8")
        for keep in KEEPS:
            selector = TopK(keep=keep)

            def sparse(
                q: Tensor, k: Tensor, v: Tensor, engine: str = "sdpa", repeats: int = 1, selector: TopK = selector
            ) -> Tensor:
                cross = q.shape[2] != k.shape[2]
                return attend(q, k, v) if cross else sparse_attention(q, k, v, selector, backend=self.backend)

            with replaced(module, "attend", sparse):
                measure(f"sparse_{keep}")

    def whole_run(self, case: str, model: Denoiser, x: Tensor, c: Tensor) -> None:
        """Seconds of a run of the sampler, eager; the plain one has its last step, which goes nowhere, as well."""
        found: dict[str, Tensor] = {}

        def run(name: str, savings: bool) -> None:
            model.merge_constant = savings
            options = {"skip_empty_steps": savings, "reuse_condition": savings}
            found[name] = sample(model, c, x.float(), flow_sigmas(self.steps), SCALE, **options)

        plain_s, savings_s = (self.seconds(lambda: run("plain", False)), self.seconds(lambda: run("savings", True)))
        self.note(case, run_steps=self.steps, run_plain_s=round(plain_s, 3), run_all_savings_s=round(savings_s, 3))
        self.note(case, run_difference=error(found["savings"], found["plain"]))

    def rounding(self, case: str, model: Denoiser, x: Tensor, c: Tensor) -> None:
        """Errors of the unconditional pass in half precision against float32: plain and merged."""
        t, zero = torch.full((1,), 0.3, device=self.device), torch.zeros_like(c)
        found = {}
        for name, merge in (("plain", False), ("merged", True)):
            model.merge_constant = merge
            found[name] = model(x, t, {"main": zero})
        model.merge_constant = False
        exact = model.float()(x.float(), t, {"main": zero.float()})
        self.note(case, **{f"unconditional_{name}_vs_float32": error(out, exact) for name, out in found.items()})

    def decoder(self, latents: int) -> None:
        """The volume: dense, and with keys chosen per cell."""
        case, resolution, chunk = f"volume {latents}", 12 if self.tiny else 128, 4096 if self.tiny else 131072
        small = {"width": 64, "heads": 4, "num_decoder_layers": 1} if self.tiny else {"num_decoder_layers": 2}
        vae = self.make(ShapeVAE, num_latents=latents, cross_engine="sdpa", **small)
        x = torch.randn(1, latents, 64, device=self.device, dtype=self.dtype)
        ways: dict[str, KeySelection | None] = {"dense": None}
        for keep in (None, latents // 2):
            name = f"{keep or KeySelection().kept(latents)}_of_{latents}"
            ways[f"blocks_{name}"] = KeySelection(keep=keep)
            ways[f"keys_{name}"] = KeySelection(keep=keep, whole_blocks=False)
        fields: dict[str, Tensor] = {}

        def decode(name: str) -> None:
            fields[name] = decode_volume(vae, x, resolution, chunk=chunk, selection=ways[name])

        for name in ways:
            decode(name)  # warms up
            self.note(case, **{f"{name}_s": round(self.seconds(lambda name=name: decode(name)), 4)})
            dense, field = fields["dense"], fields.pop(name) if name != "dense" else fields["dense"]
            if name != "dense":
                wrong = float((field - dense).norm() / (dense - dense.mean()).norm())
                self.note(case, **{f"{name}_error": wrong})
                self.note(case, **{f"{name}_sign_changes": float(((field > 0) != (dense > 0)).float().mean())})
        self.note(case, points=(resolution + 1) ** 3)
        self.one_chunk(case, vae, x, chunk)

    def one_chunk(self, case: str, vae: ShapeVAE, x: Tensor, chunk: int) -> None:
        """Milliseconds of the decoder's parts for one chunk of points."""
        points = torch.rand(1, chunk, 3, device=self.device, dtype=torch.float32) - 0.5
        k, v = vae.geo_decoder.keys(vae(x))
        _, q = vae.geo_decoder.queries(points)
        selections = {"dense": None, "blocks": KeySelection(), "keys": KeySelection(whole_blocks=False)}
        chosen = {n: None if s is None else volume._choose(vae, points, k, s) for n, s in selections.items()}
        self.note(case, chunk=chunk, key_order_ms=self.ms(lambda: volume.similar_together(k, volume.BLOCK_K)))
        self.note(case, choose_ms=self.ms(lambda: volume._choose(vae, points, k, KeySelection())))
        self.note(case, attention_dense_ms=self.ms(lambda: attend(q, k, v)))
        self.note(case, attention_int8_ms=self.ms(lambda: attend(q, k, v, "int8")))
        for name, keys in chosen.items():
            call = lambda keys=keys: volume._field(vae, points, k, v, keys)  # noqa: E731
            self.note(case, **{f"whole_chunk_{name}_ms": self.ms(call)})


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="*", choices=list(MODELS), default=list(MODELS), help="denoisers (default: all)")
    add("--no_decoder", action="store_true", help="leave the volume decoder out")
    add("--runs", type=whole(1), default=7, help="calls whose median is taken (default: 7)")
    add("--steps", type=whole(2), default=10, help="of a run of the sampler (default: 10)")
    add("--tiny", action="store_true", help="small models, on a CPU")
    add("--out", type=Path, help="OUT.json is written")
    args = parser.parse_args(given)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; --tiny tries the program without one")
    return guarded("hunyuan3d.py", lambda: run(args))


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    benchmark = Benchmark(args)
    print(timing.device_name(benchmark.device), timing.versions(), sep="; ")
    for case in args.models:
        benchmark.denoiser(case)
    if not args.no_decoder:
        for latents in (512,) if args.tiny else DECODERS:
            benchmark.decoder(latents)
    return 0


if __name__ == "__main__":
    sys.exit(main())
