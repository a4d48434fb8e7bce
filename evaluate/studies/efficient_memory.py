"""Peak memory and time of every backend of EfficientAttention, forward alone and with backward.

    python evaluate/studies/efficient_memory.py [--length 4096] [--heads 16] [--d_head 64] [--chunk 512]

On a CPU each backend runs in a process of its own: after a short warm-up the kernel's high-water mark of resident
memory is reset (/proc/self/clear_refs), and what it rises by during one call is printed. On a GPU it is the rise of
torch.cuda.max_memory_allocated. Inputs, [1, heads, length, d_head], are not counted; outputs and gradients are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from spas_attn.efficient.problem import Problem
from spas_attn.efficient.ways import WAYS
from spas_attn.selectors import TopK

SELECTOR = TopK(keep=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 4096), ("heads", 16), ("d_head", 64), ("chunk", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", choices=[*WAYS], help="this one only, in this process")
    parser.add_argument("--backward", action="store_true", help="with --backend: the backward pass too")
    args = parser.parse_args()
    if args.backend is not None:
        measure(args)
        return
    print("| backend | pass | added, MiB | estimate, MiB | ms |\n|---|---|---|---|---|", flush=True)
    for name in WAYS:
        for backward in ([], ["--backward"]):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--backend", name, *backward], check=True)


def measure(args: argparse.Namespace) -> None:
    """Print one row of the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    way, kind = WAYS[args.backend], "forward and backward" if args.backward else "forward"
    run(make(args, 256, device), args, device)
    problem = make(args, args.length, device)
    why = way.refuses(problem, SELECTOR)
    if why is not None:
        print(f"| {way.name} | {kind} | {why} | | |", flush=True)
        return
    before = mark(device)
    start = time.perf_counter()
    run(problem, args, device)
    elapsed = (time.perf_counter() - start) * 1e3
    added = peak(device) - before
    estimate = way.adds(problem, args.chunk)
    print(f"| {way.name} | {kind} | {added / 2**20:,.0f} | {estimate / 2**20:,.0f} | {elapsed:,.0f} |", flush=True)


def make(args: argparse.Namespace, length: int, device: torch.device) -> Problem:
    """A call of random numbers; float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = (1, args.heads, length, args.d_head)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_(args.backward) for _ in range(3))
    return Problem(q, k, v, scale=args.d_head**-0.5)


def run(problem: Problem, args: argparse.Namespace, device: torch.device) -> None:
    """One call of the backend, finished when this returns."""
    way = WAYS[args.backend]
    if way.refuses(problem, SELECTOR) is None:
        out = way.run(problem, args.chunk, SELECTOR)
        if args.backward:
            out.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def mark(device: torch.device) -> int:
    """Start a new peak; the bytes in use now."""
    if device.type == "cuda":
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
