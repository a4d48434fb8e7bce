"""Measure this GPU, so that ``backend="auto"`` knows where sparse attention is faster than dense.

    python -m spas_attn.measure                       # writes the user's own table, which is read from then on
    python -m spas_attn.measure --out table.json --head-dims 64 96 128 256

For every head dim and size of mask blocks, causal and not: exact dense backends, and every sparse one at a few lengths
and densities, with and without selection. To the times lines are fitted (cost_model.py), and the crossover to dense is
printed. It takes about three minutes, in which nothing else should run on the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import backends, cost_model
from .attention import block_sparse_attention, sparse_attention
from .block_mask import BlockMask
from .call import Call
from .cost_model import Line, Row, Work
from .select import select
from .selectors import ExactKeys

SPARSE = (
    ("triton", "native"),
    ("triton", "int8_bf16"),
    ("triton", "int8_fp8"),
    ("flash", "native"),
    ("cudnn", "native"),
)
DENSE = ("sdpa", "flash")
BLOCKS = ((128, 128), (128, 64), (64, 64))
LENGTHS = (1024, 4096, 12288, 32768)
MASSES = (1.0, 0.375, 0.0625)  # of random keys, which matter alike: nearly the densities
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Point:
    """One time: ``ms`` of some work at a density; errors of a line count relative to ``unit`` milliseconds."""

    work: Work
    density: float
    ms: float
    unit: float


def fit(points: Sequence[Point]) -> Line:
    """The line with the least squared relative error; no part of it is negative."""
    import numpy as np
    from scipy.optimize import nnls

    features = np.array([[1.0, point.work.tokens, point.work.pairs * point.density] for point in points])
    units = np.array([point.unit for point in points])
    scale = features.max(0)  # the solver tells by absolute size what is zero
    solution, _ = nnls(features / scale / units[:, None], np.array([point.ms for point in points]) / units)
    return Line(*(float(x) for x in solution / scale))


def measure(
    device: str,
    head_dim: int,
    is_causal: bool,
    timer: Timer,
    *,
    heads: int = 24,
    lengths: Sequence[int] = LENGTHS,
    masses: Sequence[float] = MASSES,
    dense: Sequence[str] = DENSE,
    sparse: Sequence[tuple[str, str]] = SPARSE,
    blocks: tuple[int, int] = (128, 128),
) -> tuple[dict[str, Line], Line, dict[str, Line]]:
    """Time what runs on this machine.

    Returns:
        The lines of the dense backends by name, of selection, and of the sparse ones by "name/precision".
    """
    times: dict[str, list[Point]] = {}
    selection: list[Point] = []
    for length in lengths:
        call = _call(device, heads, length, head_dim, is_causal)
        work = Work.of(heads, length, length)
        for name in dense:
            chosen = backends.get(name)
            if chosen.missing() is None and chosen.declines(call) is None:
                ms = timer(functools.partial(chosen.run, call))
                times.setdefault(name, []).append(Point(work, 1.0, ms, ms))
        for mass in masses:
            selector = ExactKeys(mass, block_q=blocks[0], block_k=blocks[1])
            mask = select(selector, call).mask
            density = float(mask.density(is_causal).mean())
            for name, precision in sparse:
                chosen = backends.get(name)
                if chosen.missing() is not None or chosen.declines(call.replace(mask=mask, precision=precision)):
                    continue
                given, whole = _given_and_whole(call, mask, selector, timer, backend=name, precision=precision)
                times.setdefault(f"{name}/{precision}", []).append(Point(work, density, given, given))
                selection.append(Point(work, 1.0, whole - given, whole))
    if not selection:
        raise RuntimeError(f"no sparse backend runs on this machine at head dim {head_dim}")
    lines = {name: fit(points) for name, points in times.items()}
    kernels = {name: line for name, line in lines.items() if "/" in name}
    return {name: line for name, line in lines.items() if name not in kernels}, fit(selection), kernels


def _given_and_whole(
    call: Call, mask: BlockMask, selector: ExactKeys, timer: Timer, **options: Any
) -> tuple[float, float]:
    """Milliseconds of a call whose mask is given, and of one that selects it."""
    options |= {"is_causal": call.is_causal, "strict": True}
    tensors = call.q, call.k, call.v
    given = timer(functools.partial(block_sparse_attention, *tensors, mask, **options))
    return given, timer(functools.partial(sparse_attention, *tensors, selector, **options))


def _call(device: str, heads: int, length: int, head_dim: int, is_causal: bool) -> Call:
    generator = torch.Generator(device).manual_seed(length)
    q, k, v = (
        torch.randn(1, heads, length, head_dim, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    return Call(q, k, v, is_causal=is_causal, scale=head_dim**-0.5)


def crossover_density(row: Row, precision: str, length: int, heads: int = 24) -> float | None:
    """The density above which dense attention is faster in this row; None when it is at any density.

    1 when sparse attention is faster even if it keeps all blocks.
    """
    work = Work.of(heads, length, length)
    dense = min(line(work) for line in row.dense.values()) - row.select(work)
    reach = [
        (dense - line(work, 0.0)) / max(line.per_pair * work.pairs, 1e-9)
        for name, line in row.sparse.items()
        if name.endswith(f"/{precision}")
    ]
    best = max(reach, default=0.0)
    return None if best <= 0 else min(best, 1.0)


def report(row: Row) -> str:
    """Where dense attention becomes faster, by precision and length."""
    lines = [str(row)]
    for precision in dict.fromkeys(name.partition("/")[2] for name in row.sparse):
        cells = []
        for length in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
            density = crossover_density(row, precision, length)
            cells.append(f"{length}: {'never' if density is None else f'{density:.0%}'}")
        lines.append(f"  {precision}: sparse is faster up to density " + ", ".join(cells))
    return "\n".join(lines)


def merge(new: Sequence[Row], old: Sequence[Row]) -> tuple[Row, ...]:
    """The new rows, and the old ones that they do not replace."""

    def key(row: Row) -> tuple[Any, ...]:
        return row.device, row.head_dim, row.is_causal, row.blocks

    measured = {key(row) for row in new}
    return (*new, *(row for row in old if key(row) not in measured))


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "flash-attn-4", "nvidia-cudnn-frontend"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cost_model.user_table(), help="default: %(default)s")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--ms", type=float, default=30, help="milliseconds of repetitions for each time")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU: there is nothing to measure (on a CPU the backend `cpu` is always chosen)")
    from triton.testing import do_bench

    def timer(call: Callable[[], object]) -> float:
        return float(do_bench(call, warmup=max(1, int(options.ms / 5)), rep=options.ms, return_mode="median"))

    rows = []
    gpu = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    when = datetime.date.today().isoformat(), _versions()
    for head_dim, is_causal in itertools.product(options.head_dims, (False, True)):
        known: dict[str, Line] = {}  # dense attention knows no blocks
        for blocks in BLOCKS:
            found = measure(
                "cuda", head_dim, is_causal, timer, heads=options.heads, dense=() if known else DENSE, blocks=blocks
            )
            known = known or found[0]
            rows.append(Row(*gpu, head_dim, is_causal, known, *found[1:], *when, blocks))
            print(report(rows[-1]), flush=True)
    table = merge(rows, cost_model.read(options.out) if options.out.exists() else ())
    cost_model.write(table, options.out)
    cost_model.forget()
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
