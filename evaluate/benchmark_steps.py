"""One step of a diffusion transformer at real size, dense and sparse: time, share of the attention, memory.

    python evaluate/benchmark_steps.py                                     # all models, on a GPU, two to three minutes
    python evaluate/benchmark_steps.py --models CogVideoX-2B FLUX.1-dev --density 0.5 0.25
    python evaluate/benchmark_steps.py --models HunyuanVideo --all_layers --repeats 1
    python evaluate/benchmark_steps.py --tiny --device cpu                 # a trial of the program, seconds

Published configurations with random weights in bfloat16, one sample (classifier-free guidance doubles it). Random
weights are not sparse, so densities are forced: every query block keeps the asked share of its key blocks, those with
the best scores (TopK), selection included in the time. Dense is PyTorch's SDPA, with each of its kernels that takes the
call; speed-ups are over the fastest of them. Of the two largest models only some layers are run, unless --all_layers is
given: the table says how many, and nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from _benchmark_report import versions, write_csv
from _loading import usable_device
from _step_models import MODELS, StepModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autotune import SparseAttention
from autotune.module import PV_OFF, Thresholds, sparse_modules
from modify_model import patch
from spas_attn import fallback_counts
from spas_attn.checks import PRECISIONS
from spas_attn.selectors import Selector, TopK
from spas_attn.selectors.tokens import Ranges

KERNELS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
POOL = 16


@dataclass(frozen=True)
class Row:
    """One measurement: medians over the repeats, of one step and of its self-attention layers within it.

    Attributes:
        layers: those that were run, and all of the published model where that is more.
        density: share of blocks asked for; kept: share computed (text blocks, and rounding up, come on top).
        ms_attention: the attention calls alone: selection, quantisation, kernel; no projections. attention_share: of
            the step.
        speedup: of the step, over the fastest dense one; speedup_attention: of the attention calls.
        peak_GiB: memory allocated at most, weights included; None without a GPU.
    """

    model: str
    tokens: int
    layers: str
    heads: int
    head_dim: int
    provider: str
    precision: str
    density: float
    kept: float
    ms_step: float
    ms_attention: float
    attention_share: float
    speedup: float
    speedup_attention: float
    peak_GiB: float | None
    device: str
    versions: str

    TITLE = (
        f"{'model':<26} {'tokens':>6} {'layers':>12} {'provider':<18} {'precision':<9} {'density':>7} {'kept':>6} "
        f"{'step ms':>9} {'attn. ms':>9} {'share':>6} {'speed-up':>8} {'attn.':>6} {'GiB':>6}"
    )

    def __str__(self) -> str:
        memory = f"{'-' if self.peak_GiB is None else format(self.peak_GiB, '.1f'):>6}"
        return (
            f"{self.model:<26} {self.tokens:>6} {self.layers:>12} {self.provider:<18} {self.precision:<9} "
            f"{self.density:>7.0%} {self.kept:>6.1%} {self.ms_step:>9.2f} {self.ms_attention:>9.2f} "
            f"{self.attention_share:>6.1%} {self.speedup:>7.2f}x {self.speedup_attention:>5.2f}x {memory}"
        )


class Clock(Protocol):
    """Starts when it is made."""

    def stop(self) -> None:
        """End the time."""

    def ms(self) -> float:
        """The milliseconds, after :meth:`stop`."""


class GpuClock:
    """Measures on the GPU's own time line; only :meth:`ms` waits for it."""

    def __init__(self) -> None:
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.begin.record()

    def stop(self) -> None:
        self.end.record()

    def ms(self) -> float:
        self.end.synchronize()
        return self.begin.elapsed_time(self.end)


class CpuClock:
    """Measures by the wall clock."""

    def __init__(self) -> None:
        self.begin = self.end = time.perf_counter()

    def stop(self) -> None:
        self.end = time.perf_counter()

    def ms(self) -> float:
        return 1e3 * (self.end - self.begin)


class StepAttention(SparseAttention):
    """The attention of one layer, timed: the model's own, or sparse with a fixed share of the blocks.

    It stands where :func:`modify_model.patch` has put the tunable module; only what it keeps is not tuned.

    Attributes:
        kernel: of the dense attention; keep: share of the blocks, None for dense.
        calls: the clock and the shape of q of every call.
    """

    def __init__(self, heads: int, backend: str, clock: type[Clock]) -> None:
        super().__init__(backend=backend)
        on, off = torch.ones(heads, dtype=torch.bool), torch.full((heads,), PV_OFF)
        self.set_thresholds(Thresholds(on, torch.ones(heads), torch.full((heads,), -1.0), off))
        self.clock = clock
        self.kernel: SDPBackend | None = None
        self.keep: float | None = None
        self.calls: list[tuple[Clock, torch.Size]] = []

    def tuned(self, device: torch.device, text: Ranges = ()) -> tuple[Selector, Tensor]:
        """TopK in place of the tuned selector; the text is kept as in serving."""
        assert self.keep is not None
        _, pv = super().tuned(device, text)
        sink, selector = self.sink_of(text), TopK(keep=self.keep, pool=POOL)
        return (selector if sink is None else selector | sink), pv

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, dense: Callable[[], Tensor], **options: Any) -> Tensor:
        clock = self.clock()
        if self.keep is None:
            with contextlib.nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
                out = dense()
        else:
            self.expected_density = self.keep
            out = super().forward(q, k, v, dense=dense, **options)
        clock.stop()
        self.calls.append((clock, q.shape))
        return out


class Bench:
    """One model on one device, ready to be measured."""

    def __init__(self, model: StepModel, device: torch.device, args: argparse.Namespace) -> None:
        self.model, self.device, self.args = model, device, args
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.clock: type[Clock] = GpuClock if device.type == "cuda" else CpuClock
        self.transformer = patch(model.make(device, dtype, args.all_layers))
        self.inputs = model.call(device, dtype)
        backend = "triton" if device.type == "cuda" else "cpu"
        self.layers: list[StepAttention] = []
        for path, module in sparse_modules(self.transformer).items():
            layer = StepAttention(module.heads or 0, backend, self.clock)
            self.transformer.get_submodule(path.rpartition(".")[0]).inner_attention = layer
            self.layers.append(layer)
        self.provider = f"spas_attn {backend}"
        self.fastest: tuple[float, float] | None = None  # dense: step, attention

    def set(self, **values: Any) -> None:
        """Set attributes of every layer."""
        for layer in self.layers:
            for name, value in values.items():
                setattr(layer, name, value)

    @torch.inference_mode()
    def step(self) -> tuple[float, float]:
        """Milliseconds of one step, and of its attention calls."""
        for layer in self.layers:
            layer.calls = []
        clock = self.clock()
        out = self.transformer(**self.inputs, return_dict=False)[0]
        clock.stop()
        if not bool(torch.isfinite(out).all()):
            raise RuntimeError(f"{self.model.name}: the output is not finite")
        for layer in self.layers:
            if len(layer.calls) != 1:
                raise RuntimeError(f"{self.model.name}: a layer ran {len(layer.calls)} times in one step")
        return clock.ms(), sum(layer.calls[0][0].ms() for layer in self.layers)

    def measure(self, provider: str, precision: str, density: float) -> Row:
        """Warm up once, repeat, and make a row of the medians."""
        self.set(record_density=True, last_density=None)
        self.step()
        found = [layer.last_density for layer in self.layers]
        kept = [1.0 if density is None else float(density.mean()) for density in found]
        self.set(record_density=False, last_density=None)
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        runs = [self.step() for _ in range(self.args.repeats)]
        step, attention = (statistics.median(column) for column in zip(*runs, strict=True))
        if provider in KERNELS or provider == "SDPA":
            self.fastest = min(self.fastest or (step, attention), (step, attention))
        assert self.fastest is not None
        shape = self.layers[0].calls[0][1]
        return Row(
            self.model.name, shape[2], self.layers_text(), shape[1], shape[3], provider, precision, density,
            sum(kept) / len(kept), step, attention, attention / step, self.fastest[0] / step,
            self.fastest[1] / attention, torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
            torch.cuda.get_device_name() if gpu else "processor", versions(),
        )  # fmt: skip

    def layers_text(self) -> str:
        """Numbers of layers run, and of all where that is more: "2+4 of 20+40"."""
        run, every = (self.model.layers(flag) for flag in (self.args.all_layers, True))
        text = "+".join(map(str, run.values()))
        return text if run == every else f"{text} of {'+'.join(map(str, every.values()))}"

    def dense(self) -> list[Row]:
        """A row for every SDPA kernel that takes the call; the slow general one only if no other does."""
        self.set(keep=None)
        if self.device.type != "cuda":
            return [self.measure("SDPA", "fp32", 1.0)]
        rows: list[Row] = []
        for name, kernel in KERNELS.items():
            if name == "SDPA efficient" and rows:
                continue
            self.set(kernel=kernel)
            try:
                rows.append(self.measure(name, "bf16", 1.0))
            except RuntimeError as error:  # a kernel that takes no masks, or not this head dim, or too much memory
                print(f"{self.model.name:<26} skipped {name}: {str(error).splitlines()[0]}")
        if not rows:
            raise RuntimeError(f"{self.model.name}: no SDPA kernel takes its attention")
        best = min(rows, key=lambda row: row.ms_step)
        return [_over(row, best) for row in rows]

    def sparse(self, precision: str, density: float) -> Row | None:
        """A row at a forced density; None, with the reason printed, when the backend declines."""
        before = fallback_counts()
        self.set(keep=density, precision=precision)
        row = self.measure(self.provider, precision if self.device.type == "cuda" else "fp32", density)
        declined = [reason for reason, count in fallback_counts().items() if count > before.get(reason, 0)]
        if declined:
            print(f"{self.model.name:<26} skipped {precision}: {declined[0]}")
            return None
        return row


def _over(row: Row, best: Row) -> Row:
    """A dense row with its speed-up over the fastest one."""
    ratios = best.ms_step / row.ms_step, best.ms_attention / row.ms_attention
    return Row(**{**vars(row), "speedup": ratios[0], "speedup_attention": ratios[1]})


def run_model(model: StepModel, device: torch.device, args: argparse.Namespace) -> list[Row]:
    """All rows of a model, printed as they come."""
    began = time.perf_counter()
    bench = Bench(model, device, args)
    rows = bench.dense()
    print(*rows, sep="\n", flush=True)
    for density in args.density:
        for precision in args.precision:
            row = bench.sparse(precision, density)
            if row is not None:
                rows.append(row)
                print(row, flush=True)
    print(f"{model.name:<26} took {time.perf_counter() - began:.0f} s, model and compilation included", flush=True)
    return rows


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    add("--density", nargs="+", type=float, default=[0.5, 0.3], help="shares of blocks kept (default: 0.5 0.3)")
    add("--precision", nargs="+", choices=PRECISIONS, help="default: all on a GPU, bf16 on a processor")
    add("--all_layers", action="store_true", help="run every layer of the largest models too")
    add("--repeats", type=int, default=2, help="timed steps, after one that warms up (default: 2)")
    add("--tiny", action="store_true", help="small configurations and short sequences; the times say nothing")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--out", type=Path, help="write OUT.csv")
    args = parser.parse_args(arguments)
    if any(not 0 < density <= 1 for density in args.density):
        parser.error(f"--density must lie in (0, 1], got {args.density}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    args = parse_arguments(arguments)
    try:
        device = usable_device(args.device)
        if device.type != "cuda" and not args.tiny:
            raise ValueError("models of real size need a GPU; --tiny tries the program on a processor")
    except ValueError as error:
        print(f"benchmark_steps.py: error: {error}", file=sys.stderr)
        return 2
    args.precision = args.precision or (list(PRECISIONS) if device.type == "cuda" else ["bf16"])
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'processor'}; {versions()}\n{Row.TITLE}")
    rows: list[Row] = []
    for name in args.models:
        rows += run_model(MODELS[name].small() if args.tiny else MODELS[name], device, args)
        gc.collect()  # hooks and layers refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.out is not None:  # after each model, so that an interrupted run is not lost
            write_csv(rows, args.out.with_name(args.out.name + ".csv"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
