"""Block-sparse attention on a processor against dense attention: the `cpu` backend and PyTorch's SDPA, side by side.

The block mask is given (nothing is selected), random, the same share of blocks for every head, and ragged: query
blocks keep different numbers of key blocks. Before anything is timed, the result is compared with `reference`.

    python evaluate/benchmark_cpu.py
    python evaluate/benchmark_cpu.py --length 8192 --density 0.1 --threads 4 --json cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from spas_attn import BlockMask, block_sparse_attention
from spas_attn.block_mask import cdiv, visible_blocks
from spas_attn.metrics import relative_l1

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"fp32": 1e-5, "bf16": 0.003, "fp16": 0.003}  # relative L1 against `reference`


def ragged_mask(
    batch: int, heads: int, length: int, block_q: int, block_k: int, density: float, is_causal: bool, seed: int
) -> BlockMask:
    """A random mask that keeps ``density`` of the visible blocks of every head, the diagonal among them."""
    generator = torch.Generator().manual_seed(seed)
    nq, nk = cdiv(length, block_q), cdiv(length, block_k)
    visible = visible_blocks(length, length, block_q, block_k, is_causal=is_causal)
    # Rows differ in how much they like to keep, so that their counts differ.
    liking = torch.rand(batch, heads, nq, nk, generator=generator)
    liking += torch.rand(batch, heads, nq, 1, generator=generator)
    starts_q, starts_k = torch.arange(nq)[:, None] * block_q, torch.arange(nk) * block_k
    diagonal = (starts_k < starts_q + block_q) & (starts_q < starts_k + block_k)
    liking = liking.masked_fill(diagonal, 3.0).masked_fill(~visible, -1.0)
    best = liking.flatten(2).topk(round(density * int(visible.sum())), dim=-1).indices
    kept = torch.zeros(batch, heads, nq * nk, dtype=torch.bool).scatter_(-1, best, True)
    return BlockMask.from_dense(kept.view(batch, heads, nq, nk) & visible, length, length, block_q, block_k)


def medians(calls: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Median milliseconds of each call; the calls take turns, so that a disturbance hits them alike."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repetitions + 1):
        for call, taken in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                taken.append((time.perf_counter() - begin) * 1e3)
    return [statistics.median(taken) for taken in times]


def processor() -> str:
    """The processor's name, as well as this system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    blocks: str
    dtype: str
    causal: bool
    density: float
    counts: tuple[int, int]
    error: float
    dense_ms: float
    sparse_ms: float

    TITLE: ClassVar[str] = (
        f"{'blocks':>8} {'dtype':>5} {'causal':>6} {'kept a row':>10} {'error':>8} {'dense':>9} {'sparse':>9} speedup"
    )

    def __str__(self) -> str:
        kept = f"{self.counts[0]} to {self.counts[1]}"
        times = f"{self.dense_ms:6.1f} ms {self.sparse_ms:6.1f} ms {self.dense_ms / self.sparse_ms:6.2f}x"
        return (
            f"{self.blocks:>8} {self.dtype:>5} {'yes' if self.causal else 'no':>6} {kept:>10} {self.error:8.1e} {times}"
        )


def measure(options: argparse.Namespace, blocks: str, dtype: str, is_causal: bool) -> Row:
    """Check one configuration and time it; a wrong result ends the program."""
    block_q, block_k = (int(size) for size in blocks.split("x"))
    shape = (options.batch, options.heads, options.length, options.dim)
    generator = torch.Generator().manual_seed(options.seed)
    q, k, v = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    mask = ragged_mask(*shape[:3], block_q, block_k, options.density, is_causal, options.seed)

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    def sparse(backend: str = "cpu") -> torch.Tensor:
        return block_sparse_attention(q, k, v, mask, is_causal=is_causal, backend=backend, strict=True)

    error = float(relative_l1(sparse(), sparse("reference")))
    if not error <= LIMITS[dtype]:
        sys.exit(f"wrong result: {blocks} {dtype} causal={is_causal}: relative L1 {error:.2e} > {LIMITS[dtype]}")
    density, counts = float(mask.density(is_causal).mean()), (int(mask.counts.min()), int(mask.counts.max()))
    return Row(blocks, dtype, is_causal, density, counts, error, *medians([dense, sparse], options.repetitions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=64, help="head dim")
    parser.add_argument("--density", type=float, default=0.25, help="share of the (visible) blocks that are kept")
    parser.add_argument("--blocks", nargs="+", default=["128x128", "128x64", "64x64"], help="query x key block sizes")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    machine = {
        "processor": processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if hasattr(os, "getloadavg"):
        print(f"load average before: {os.getloadavg()[0]:.1f} (other work on the machine makes the times meaningless)")
    shape = [options.batch, options.heads, options.length, options.dim]
    print(f"q, k, v {shape}, {1 - options.density:.0%} of the blocks dropped, mask given")
    print(f"medians of {options.repetitions} turns\n\n{Row.TITLE}")
    rows = []
    for is_causal in (False, True):
        for dtype in options.dtypes:
            for blocks in options.blocks:
                rows.append(measure(options, blocks, dtype, is_causal))
                print(rows[-1], flush=True)
    if options.json:
        report = {"machine": machine, "shape": shape, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
