"""Peak memory and time of every backend of EfficientAttention, beside what it expects to need.

    python evaluate/studies/efficient_memory.py [--lengths 4096 16384 32768] [--kinds none padding bias both]
        [--limit_gb 6] [--json FILE]

Inputs, [1, heads, length, d_head], are not counted, nor is the gradient of the output; outputs and gradients are. On a
GPU (bf16) the figure is the rise of torch.cuda.max_memory_allocated at a second call, and the time a median of three.
On a CPU (float32) each row runs in a process of its own: after a short warm-up the kernel's high-water mark of resident
memory is reset (/proc/self/clear_refs), and what it rises by during one call is taken. --limit_gb (GPU only) then
leaves that much of the card, runs the last length, and runs it again with a free memory that is told wrongly.
docs/benchmarks/efficient_h100.json was measured in this way on one H100 in 81 s: the lengths above, without "both" in
the first part, and without standard and chunked_keys for a mask or a bias above 4,096 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from spas_attn.efficient import memory
from spas_attn.efficient.choice import Chooser
from spas_attn.efficient.problem import Problem
from spas_attn.efficient.ways import WAYS
from spas_attn.selectors import TopK

SELECTOR = TopK(keep=0.25)
KINDS = ("none", "padding", "bias", "both")
PASSES = ("forward", "forward and backward")
LIMITED = (("standard", "none", 0), ("chunked_queries", "none", 0), ("chunked_queries", "bias", 1),
           ("auto", "none", 0), ("auto", "both", 0), ("auto", "both", 1))  # fmt: skip
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--backends", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    for name, default in (("heads", 16), ("d_head", 64), ("chunk", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--limit_gb", type=float, help="leave so much of the GPU for a second part")
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--row", action="store_true", help="measure in this process, print JSON (one row on a CPU)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [(n, k, p, b) for n in args.lengths for p in args.passes for k in args.kinds for b in args.backends]
    if args.row:
        print(json.dumps(measure(args, device, *cases[0])))
        return
    if args.limit_gb is not None and device.type != "cuda":
        parser.error("--limit_gb needs a GPU: only there a process can be given less memory")
    print(
        "| length | kind | pass | backend | added, MiB | estimate, MiB | ms |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    rows = []
    for case in cases:
        rows.append(measure(args, device, *case) if device.type == "cuda" else in_a_process(args, *case))
        figures = [rows[-1].get(key, "") for key in ("added_mib", "estimate_mib", "ms")]
        print("|", " | ".join(str(x) for x in (*case, *figures)), "|", rows[-1].get("refused", ""), flush=True)
    result = {
        "device": device.type,
        "torch": torch.__version__,
        "heads": args.heads,
        "d_head": args.d_head,
        "rows": rows,
    }
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name()
    if args.limit_gb is not None:
        result |= {"limit_gb": args.limit_gb, "limited": limited(args, device)}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


def in_a_process(args: argparse.Namespace, length: int, kind: str, passes: str, backend: str) -> Row:
    """One row, measured in a process of its own."""
    command = [sys.executable, __file__, "--row", "--lengths", str(length), "--kinds", kind, "--passes", passes]
    command += ["--backends", backend]
    command += [x for name in ("heads", "d_head", "chunk") for x in (f"--{name}", str(getattr(args, name)))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(args: argparse.Namespace, device: torch.device, length: int, kind: str, passes: str, backend: str) -> Row:
    """One row of the table."""
    way, backward = WAYS[backend], passes != "forward"
    row: Row = {"length": length, "kind": kind, "pass": passes, "backend": backend}
    row["chunk"] = args.chunk if way.chunked else None
    problem = make(args, length, kind, backward, device)
    why = way.refuses(problem, SELECTOR)
    if why is not None:
        return row | {"refused": why}
    grad = torch.randn_like(problem.q)
    try:
        if device.type == "cuda":
            run(problem, grad, backend, args.chunk)
        else:
            warm = make(args, 256, kind, backward, device)
            run(warm, torch.randn_like(warm.q), backend, args.chunk)
        before = mark(device)
        times = [run(problem, grad, backend, args.chunk)]
        added = peak(device) - before
        if device.type == "cuda":
            times = [run(problem, grad, backend, args.chunk) for _ in range(3)]
    except torch.cuda.OutOfMemoryError:
        return row | {"out_of_memory": True}
    estimate = way.adds(problem, args.chunk)
    row |= {"added_mib": round(added / 2**20, 2), "estimate_mib": round(estimate / 2**20, 2)}
    return row | {"ms": round(statistics.median(times), 3)}


def make(args: argparse.Namespace, length: int, kind: str, backward: bool, device: torch.device) -> Problem:
    """A call of random numbers: padding of an eighth of the keys, a bias for each head and key; both, one a query."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    shape = (1, length, args.heads, args.d_head)
    q, k, v = (random(*shape).transpose(1, 2).requires_grad_(backward) for _ in range(3))
    mask: torch.Tensor | None = None
    biases: tuple[torch.Tensor, ...] = ()
    if kind in ("padding", "both"):
        mask = (torch.arange(length, device=device) < length - length // 8)[None, None, None]
    if kind in ("bias", "both"):
        bias = random(1, args.heads, *((1, length) if kind == "bias" else (length, 1)))
        biases = (bias.requires_grad_(backward),)
    return Problem(q, k, v, mask, biases, scale=args.d_head**-0.5)


def run(problem: Problem, grad: torch.Tensor, backend: str, chunk: int) -> float:
    """One call of the backend; the milliseconds it took."""
    start = time.perf_counter()
    out = WAYS[backend].run(problem, chunk, SELECTOR)
    if problem.grad:
        torch.autograd.grad(out, [problem.q, problem.k, problem.v, *problem.biases], grad)
    if problem.q.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def limited(args: argparse.Namespace, device: torch.device) -> list[Row]:
    """The last length with little memory: what is chosen, and what becomes of a choice that was too large."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(args.limit_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    real, rows = memory.free_memory, []
    for told in ("as it is", "said to be 1 PiB"):
        memory.free_memory = real if told == "as it is" else lambda device: 1 << 50
        for asked, kind, backward in LIMITED:
            row: Row = {"length": args.lengths[-1], "kind": kind, "pass": PASSES[backward], "asked": asked}
            rows.append(row | {"free_memory": told} | choose(args, device, asked, kind, bool(backward)))
            torch.cuda.empty_cache()
            print(rows[-1], flush=True)
    memory.free_memory = real
    return rows


def choose(args: argparse.Namespace, device: torch.device, asked: str, kind: str, backward: bool) -> Row:
    """Let a Chooser run one call; its difference from chunks of 64 queries, and the retries of a second call."""
    problem = make(args, args.lengths[-1], kind, backward, device)
    chooser = Chooser(asked, args.lengths[-1], False, None)
    start = time.perf_counter()
    try:
        out, report = chooser.run(problem)
        if backward:
            out.float().sum().backward()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError as error:
        return {"raised": type(error).__name__}
    elapsed = (time.perf_counter() - start) * 1e3
    with torch.no_grad():
        difference = (out - WAYS["chunked_queries"].run(problem, 64, None)).abs().max().item()
    again = chooser.run(problem)[1].retries
    row: Row = {"backend": report.backend, "chunk": report.chunk, "retries": report.retries, "retries_again": again}
    return row | {"ms": round(elapsed, 1), "difference": difference}


def mark(device: torch.device) -> int:
    """Start a new peak; the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes in use since :func:`mark`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """A number of bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
