#!/usr/bin/env python
"""Attention on a GPU or a CPU, and whole denoising steps, compared: this library, and the attention of others.

    python evaluate/benchmarks/run.py                                       # cases A and B, plain and causal
    python evaluate/benchmarks/run.py --cases Wan-14B Flux --densities 0.5 0.25 --out docs/benchmarks/h200
    python evaluate/benchmarks/run.py --cases A --providers triton-int8_fp8 sdpa-cudnn --ms 300
    python evaluate/benchmarks/run.py cpu --dtypes fp32                     # the cpu backend, with given masks
    python evaluate/benchmarks/run.py growth --out docs/benchmarks/growth   # one call at 4K to 1M tokens
    python evaluate/benchmarks/run.py steps --cases CogVideoX-2B FLUX.1-dev --densities 0.5 0.25
    python evaluate/benchmarks/run.py steps --tiny                          # a trial; its times say nothing
    python evaluate/benchmarks/run.py --plot docs/benchmarks/attention_h200 # table and picture from the CSV file

Random inputs and weights are not sparse: densities are forced by keeping the best scored blocks (TopK), so that times
mean something and errors are measured over the same blocks. `cpu` takes random masks instead, whose rows keep different
numbers of blocks. Every output is first compared with float32; what is wrong is not timed. Times are medians; `total`
is one call from q, k, v to the output, or one step of a model with published sizes, random weights and one sample
(classifier-free guidance doubles it). Of the two largest models only some layers run, unless --all_layers is given: the
table says how many, and nothing is extrapolated.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import attention
import providers  # noqa: F401 - registers them
import results
import step_models  # noqa: F401 - registers its cases
import timing
import torch
from registry import CASES, LABELS, PROVIDERS, Case, Declined, Provider, Runs, Setup
from tqdm import tqdm

from modify_model.cli.arguments import whole

DTYPES = {label: dtype for dtype, label in LABELS.items()}
LIBRARY = ["triton", "triton-int8_bf16", "triton-int8_fp8"]
# Defaults of the options, and what else the program has to know of a suite.
SUITES: dict[str, dict[str, Any]] = {
    "attention": {
        "kind": "attention", "gpu": True, "ragged": False, "cases": ["A", "A-causal", "B", "B-causal"],
        "densities": [1.0, 0.5, 0.25, 0.125, 0.0625], "dtypes": ["bf16"], "blocks": ["128x128"], "ms": 100.0,
        "providers": [
            "sdpa-cudnn", "sdpa-flash", "fa4", "cudnn-fp8", "sage", *LIBRARY, "flash", "cudnn", "flex", "spargeattn",
        ],
    },
    "growth": {
        "kind": "attention", "gpu": True, "ragged": False, "cases": [f"growth-{n}K" for n in attention.GROWTH],
        "densities": [0.1], "dtypes": ["bf16"], "blocks": ["128x128"], "ms": 50.0,
        "providers": ["sdpa-cudnn", "triton-int8_fp8"],
    },
    "cpu": {
        "kind": "attention", "gpu": False, "ragged": True, "cases": ["cpu", "cpu-causal"], "densities": [0.25],
        "dtypes": ["fp32", "bf16"], "blocks": ["128x128", "128x64", "64x64"], "ms": 1000.0,
        "providers": ["cpu-sdpa", "cpu"],
    },
    "steps": {
        "kind": "steps", "gpu": True, "cases": list(CASES["steps"]), "densities": [0.5, 0.3], "dtypes": ["bf16"],
        "blocks": ["128x128"], "ms": 0.0, "providers": ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient", *LIBRARY],
    },
}  # fmt: skip
Checked = tuple[results.Row, Setup, Runs | None]  # a row without times, and what to time: None for a wrong output
TINY = {"dtypes": ["fp32"], "providers": ["cpu-sdpa", "cpu"]}  # where there is no GPU


def run_case(case: Case, dtype: torch.dtype, options: argparse.Namespace) -> list[results.Row]:
    """All rows of a case, without times where the output was wrong."""
    with tqdm(desc=f"{case.title} {LABELS[dtype]}", unit="output", leave=False) as bar:
        checked = check_all(case, dtype, options, bar)
        right = [runs for _, _, runs in checked if runs is not None]
        times = iter(timing.medians(right, options.device, options.ms, options.turns))
    rows = []
    for row, setup, runs in checked:
        row = replace(row, **({} if runs is None else next(times)))
        if (
            runs is not None
            and options.device.type == "cuda"
            and options.kind == "attention"
            and "ms_total" in runs.parts
        ):
            row = replace(row, **timing.call_facts(runs.parts["ms_total"], options.ms))
        rows.append(replace(row, tflops=None if row.spent is None else setup.tflops(row.spent)))
    return results.with_speedups(rows)


def check_all(case: Case, dtype: torch.dtype, options: argparse.Namespace, bar: Any) -> list[Checked]:
    """Compare an output of every provider on every setup with what is exact."""
    checked: list[Checked] = []
    done: set[str] = set()  # providers that declined, and dense ones that ran
    for setup in case.setups(options.device, dtype, options):
        for provider in options.providers:
            label = f"{provider.name} {provider.precision_of(setup)}"
            if label in done or (provider.last_resort and any(row.block == "dense" for row, _, _ in checked)):
                continue
            try:
                checked.append(check(case, setup, provider, options.where))
                bar.update()
            except Declined as reason:
                bar.write(f"{case.title}: skipped {label}: {reason}")
                done.add(label)
            if provider.dense:
                done.add(label)
    return checked


def check(case: Case, setup: Setup, provider: Provider, where: dict[str, str]) -> Checked:
    """Compare one output with what is exact."""
    runs = provider.make(setup)
    if provider.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    error = setup.error(runs.output(), provider.dense or runs.dense)
    blocks: dict[str, Any] = {"density": setup.density, "kept": setup.kept, "block": f"{setup.block_q}x{setup.block_k}"}
    if runs.dense:
        blocks["kept"] = 1.0
    if provider.dense:
        blocks = {"density": 1.0, "kept": 1.0, "block": "dense"}
    lists = getattr(setup, "mask", None)
    if lists is not None and not provider.dense:
        blocks["lists_MiB"] = (lists.indices.nbytes + lists.counts.nbytes) / 2**20
    row = results.Row(
        case=case.title, provider=provider.name, precision=provider.precision_of(setup), rel_l1=error,
        **blocks, **setup.facts(), **where,
    )  # fmt: skip
    return row, setup, runs if provider.holds(error, setup) else None


def read_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options with the suite's defaults; exits with a message on invalid ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("suite", nargs="?", choices=list(SUITES), default="attention", help="default: attention, on a GPU")
    names = {kind: ", ".join(cases) for kind, cases in CASES.items()}
    add("--cases", nargs="+", metavar="CASE", help=f"attention: {names['attention']}; steps: {names['steps']}")
    add("--shape", nargs=4, type=int, metavar=("BATCH", "HEADS", "LENGTH", "DIM"), help="an attention case of your own")
    add("--providers", nargs="+", choices=list(PROVIDERS), metavar="PROVIDER", help=", ".join(PROVIDERS))
    add("--densities", nargs="+", type=float, help="shares of blocks kept, in (0, 1]")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="of the inputs")
    add("--blocks", nargs="+", choices=["128x128", "128x64", "64x128", "64x64"], help="query x key block sizes")
    add("--pool", type=int, default=16, help="tokens whose mean is scored; 128 = whole blocks (default: %(default)s)")
    add(
        "--scores",
        choices=["means", "exact"],
        default="means",
        help="what selection ranks: means of keys, TopK (default); or pooled queries against exact keys, ExactKeys",
    )
    add("--ms", type=float, help="milliseconds of repetitions for each time")
    add("--turns", type=whole(1), default=2, help="repetitions at least, on a CPU and of steps (default: 2)")
    add("--all_layers", action="store_true", help="run every layer of the largest models too")
    add("--compile", action="store_true", help="steps: blocks compiled, attention not timed alone")
    add("--tiny", action="store_true", help="small shapes and configurations, on any machine")
    add("--out", type=Path, help="write OUT.csv and, for attention, OUT.png")
    add("--plot", type=Path, metavar="OUT", help="only print the table and draw the picture of OUT.csv")
    suite, gpu = SUITES[parser.parse_known_args(given)[0].suite], torch.cuda.is_available()
    parser.set_defaults(**(suite if gpu or not suite["gpu"] else suite | TINY))
    options = parser.parse_args(given)
    known = CASES[options.kind]
    if any(not 0 < density <= 1 for density in options.densities):
        parser.error(f"--densities must lie in (0, 1], got {options.densities}")
    if not set(options.cases) <= known.keys():
        parser.error(f"--cases of {options.suite} are {', '.join(known)}, got {options.cases}")
    if options.compile and options.kind != "steps":
        parser.error("--compile is for the suite 'steps'")
    if options.gpu and not gpu and not (options.tiny or options.plot):
        parser.error(f"the suite {options.suite!r} needs a GPU; --tiny tries the program without one")
    return options


def chosen_providers(names: Sequence[str], device: torch.device) -> list[Provider]:
    """The providers that can run here; says which cannot."""
    usable = []
    for name in names:
        provider = PROVIDERS[name]
        reason = provider.missing() if provider.device == device.type else f"it runs on {provider.device}"
        if reason is None:
            usable.append(provider)
        else:
            print(f"skipped {name}: {reason}")
    if not usable:
        sys.exit("none of the providers can run here")
    return usable


def beside(path: Path, suffix: str) -> Path:
    """OUT with a suffix; the name may have dots of its own, which with_suffix would cut."""
    return path.with_name(path.name + suffix)


def draw(rows: Sequence[results.Row], path: Path) -> None:
    """The picture of the rows: against length where they grow, else against density."""
    grows = all(row.case.startswith("growth") for row in rows)
    (results.growth_picture if grows else results.picture)(rows, path)


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = read_arguments(given)
    if options.plot:
        rows = results.read_csv(beside(options.plot, ".csv"))
        print(results.table(rows))
        draw(rows, beside(options.plot, ".png"))
        return
    options.device = torch.device("cuda" if options.gpu and torch.cuda.is_available() else "cpu")
    options.providers = chosen_providers(options.providers, options.device)
    options.where = {"device": timing.device_name(options.device), "versions": timing.versions()}
    print(*options.where.values(), f"load average {os.getloadavg()[0]:.1f}", sep="; ")
    cases = [CASES[options.kind][name] for name in options.cases]
    if options.compile:
        cases = [replace(case, compiled=True) for case in cases]  # type: ignore[type-var]
    if options.shape is not None:
        batch, heads, length, dim = options.shape
        cases = [attention.AttentionCase("shape", heads, heads, length, dim, batch=batch)]
    rows: list[results.Row] = []
    for case in cases:
        for dtype in options.dtypes:
            found = run_case(case.tiny() if options.tiny else case, DTYPES[dtype], options)
            print(results.table(found), flush=True)
            rows += found
            gc.collect()  # hooks and layers refer to each other
            torch.cuda.empty_cache()
            if options.out and rows:  # after each case, so that an interrupted run is not lost
                results.write_csv(rows, beside(options.out, ".csv"))
    if options.out:
        draw(rows, beside(options.out, ".png"))
    wrong = [row for row in rows if row.spent is None]
    if wrong:
        sys.exit(f"wrong results, not timed:\n{results.table(wrong)}")


if __name__ == "__main__":
    main()
