"""Attention on a GPU, compared: this library per precision, and dense and sparse attention of others, in one run.

    python evaluate/benchmark_attention.py                                # cases A and B, plain and causal
    python evaluate/benchmark_attention.py --cases Wan-14B Flux --densities 0.5 0.25 --out docs/benchmarks/h200
    python evaluate/benchmark_attention.py --cases A --providers triton-int8_fp8 sdpa-cudnn --ms 300

Inputs are random normal, which is not sparse: densities are forced by keeping the best scored blocks (TopK), so that
times mean something and errors are measured over the same blocks. Every output is first compared with float32; a
provider that is wrong is not timed. Times are medians of CUDA events with the second-level cache flushed before each
call. `total` is one call from q, k, v to the output; selection, quantisation and the kernel are timed by themselves as
well. Without a GPU a small case runs on the processor, to show that the program works; its times say nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _benchmark_cases import CASES, Case, Setup
from _benchmark_providers import PROVIDERS, Declined, Function, Provider, Runs
from _benchmark_report import Row, picture, versions, write_csv

from spas_attn.backends import flex

DEFAULT_CASES = {"cuda": ["A", "A-causal", "B", "B-causal"], "cpu": ["cpu", "cpu-causal"]}
DENSITIES = [1.0, 0.5, 0.25, 0.125, 0.0625]
Timer = Callable[[Function], float]


def gpu_timer(ms: float) -> Timer:
    """Median milliseconds on the GPU, repeated for about ``ms`` milliseconds."""
    from triton.testing import do_bench

    return lambda call: float(do_bench(call, warmup=max(1, int(ms / 5)), rep=ms, return_mode="median"))


def cpu_timer(ms: float) -> Timer:
    """Median milliseconds on the processor, repeated for about ``ms`` milliseconds, at least three times."""

    def timer(call: Function) -> float:
        taken: list[float] = []
        call()
        while len(taken) < 3 or sum(taken) < ms:
            begin = time.perf_counter()
            call()
            taken.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(taken)

    return timer


def device_name(device: str) -> str:
    """What the times belong to."""
    return torch.cuda.get_device_name() if device == "cuda" else "processor"


def measure(provider: Provider, setup: Setup, runs: Runs, timer: Timer, quick: Timer) -> Row:
    """Check one provider, and time it when it is right."""
    error = setup.error(runs.output(), masked=not provider.dense)
    right = error <= provider.limit  # false for NaN
    total, kernel = (None if x is None or not right else timer(x) for x in (runs.total, runs.kernel))
    select, quant = (None if x is None or not right else quick(x) for x in (runs.select, runs.quant))
    spent = total if total is not None else kernel
    block = "dense" if provider.dense else f"{setup.mask.block_q}x{setup.mask.block_k}"
    return Row(
        setup.case.name, 1.0 if provider.dense else setup.density, provider.name, provider.precision, block,
        total, select, quant, kernel, None if spent is None else setup.case.tflops(spent), error,
        device_name(provider.device), versions(),
    )  # fmt: skip


def run_case(case: Case, options: argparse.Namespace, providers: list[Provider]) -> tuple[list[Row], list[str]]:
    """All rows of a case, and the providers that were wrong."""
    device = providers[0].device
    make_timer = gpu_timer if device == "cuda" else cpu_timer
    timer, quick = make_timer(options.ms), make_timer(options.ms / 2)
    inputs = case.draw(torch.bfloat16 if device == "cuda" else torch.float32, device)
    # FlexAttention specialises on the first shapes that it meets; with others before it would compile for any.
    torch.compiler.reset()
    flex._compiled.cache_clear()
    rows: list[Row] = []
    wrong: list[str] = []
    declined: set[str] = set()
    print(f"\n{case}\n{Row.TITLE}", flush=True)
    for i, density in enumerate(options.densities):
        setup = Setup.of(case, inputs, density, options.pool)
        for provider in providers:
            label = f"{provider.name} {provider.precision}"
            if (provider.dense and i) or label in declined:
                continue
            try:
                row = measure(provider, setup, provider.make(setup), timer, quick)
            except Declined as reason:
                declined.add(label)
                print(f"{case.name:<18} {'':>7} {provider.name:<18} {provider.precision:<10} skipped: {reason}")
                continue
            rows.append(row)
            print(row, flush=True)
            if row.tflops is None:
                wrong.append(f"{case.name}, density {density:.1%}: {label}: relative L1 {row.rel_l1:.4f} is above "
                             f"{provider.limit}; not timed")  # fmt: skip
                print(f"WRONG {wrong[-1]}", flush=True)
    return rows, wrong


def chosen_providers(options: argparse.Namespace, device: str) -> list[Provider]:
    """The providers that can run here; says which cannot."""
    names = options.providers or [name for name, provider in PROVIDERS.items() if provider.device == device]
    usable = []
    for name in names:
        provider = PROVIDERS[name]
        missing = provider.missing() if provider.device == device else f"it runs on {provider.device}, this is {device}"
        if missing is None:
            usable.append(provider)
        else:
            print(f"skipped {name}: {missing}")
    if not usable:
        sys.exit("none of the providers can run here")
    return usable


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--causal", action="store_true", help="make every case causal")
    parser.add_argument(
        "--densities", nargs="+", type=float, default=DENSITIES, help="shares of blocks kept, in (0, 1]"
    )
    parser.add_argument(
        "--providers", nargs="+", choices=sorted(PROVIDERS), metavar="PROVIDER", help=", ".join(PROVIDERS)
    )
    parser.add_argument("--pool", type=int, default=16, help="tokens whose mean is scored; 128 = whole blocks")
    parser.add_argument("--ms", type=float, default=100, help="milliseconds of repetitions for each time")
    parser.add_argument("--out", type=Path, help="write OUT.csv and OUT.png")
    return parser


@torch.no_grad()
def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if any(not 0 < density <= 1 for density in options.densities):
        parser.error(f"--densities must lie in (0, 1], got {options.densities}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{device_name(device)}; {versions()}")
    if device == "cpu":
        print("no CUDA GPU: a small case on the processor instead")
    providers = chosen_providers(options, device)
    cases = [CASES[name] for name in options.cases or DEFAULT_CASES[device]]
    rows: list[Row] = []
    wrong: list[str] = []
    # The names may have dots of their own, which with_suffix would cut.
    csv_path, png_path = Path(f"{options.out}.csv"), Path(f"{options.out}.png")
    begin = time.perf_counter()
    for case in dict.fromkeys(case.causal() if options.causal else case for case in cases):
        more, bad = run_case(case, options, providers)
        rows, wrong = rows + more, wrong + bad
        if options.out and rows:  # after each case, so that an interrupted run is not lost
            write_csv(rows, csv_path)
    if options.out and any(row.tflops is not None for row in rows):
        picture(rows, png_path)
        print(f"\nwrote {csv_path} and {png_path}")
    print(f"{len(rows)} measurements in {time.perf_counter() - begin:.0f} s")
    if wrong:
        sys.exit("\n".join(["wrong results:", *wrong]))


if __name__ == "__main__":
    main()
