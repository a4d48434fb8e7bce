#!/usr/bin/env python
"""Recall without a model: the share of true attention mass that each selector keeps at equal density.

    python evaluate/studies/recall.py                       # print the table, three minutes on a CPU
    python evaluate/studies/recall.py --write               # and write docs/benchmarks/recall.md

Queries and keys are made so that attention has a known structure. Every selector keeps the same share of the causal
blocks: its own threshold is set to what gives that density, per head, so that methods which spend their blocks unevenly
over the rows may do so. The oracle takes the blocks of most true mass (exact scores, `pool=1`), which nothing can beat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autotune.patterns import CANDIDATES
from spas_attn.block_mask import blockwise
from spas_attn.call import Call
from spas_attn.selectors import (
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    Selector,
    TopK,
    XAttention,
)
from spas_attn.selectors.last_queries import last_queries, over_columns, over_diagonals
from spas_attn.selectors.minference import LAST_QUERIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "recall.md"
DIM, BLOCK = 64, 128
ORACLE, STREAMING, SEARCHED = "oracle", "Streaming", "MInference, searched"
SELECTORS: dict[str, Selector] = {
    "XAttention": XAttention(stride=16),
    "FlexPrefill": FlexPrefill(min_budget=0),
    "FlashPrefill": FlashPrefill(local=0, sink_blocks=1, last_blocks=0),
    "MeanSimilarity, pool 16": MeanSimilarity(pool=16, local=0),
    "TopK, block means": TopK(pool=BLOCK, local=0),
}
# Which selectors serve a structure by their papers, and how far below the best of all they may stay, in points.
CLAIMS = {
    "local": {STREAMING: 1.0, SEARCHED: 1.0},
    "sink": {STREAMING: 1.0, SEARCHED: 1.0},
    "vertical": {SEARCHED: 1.0, "FlexPrefill": 3.0, "XAttention": 3.0},
    "slash": {"XAttention": 1.0, SEARCHED: 7.0},
    "blocks": {"FlexPrefill": 1.0},
    "needles": {"FlashPrefill": 6.0},
}


HEAD = """# Recall of the selectors on synthetic structure

Written by `python evaluate/studies/recall.py --write`; no model is needed, and a CPU will do. Percent of the true
attention mass that each selector keeps at equal density: {length:,} tokens, causal, {heads} heads of dim {dim},
blocks of {block} x {block}, seeds: {seeds}. Bold: the best, the oracle aside (exact block masses, which nothing can
beat).

Structures: `local` (mass falls with distance), `sink` (the first four keys, and nearby), `vertical` (6 single keys for
all queries), `slash` (two fixed distances), `blocks` (stretches of 128 tokens with 8 topics), `needles` (8 queries of
each block ask for 8 keys at a random place).

Each selector's threshold is set to the density, per head. MInference has the best of its search's patterns per head.
FlexPrefill runs without its budgets. Means and antidiagonals dilute single keys: one key in a group of 16 counts for a
sixteenth of its score, which is what XAttention and the pooled scores lose on `vertical`. The needles are asked for by
few queries; the last queries, by which MInference and FlexPrefill judge, tell nothing of them, and what MInference
keeps there is what a window keeps.
"""


def _positions(index: Tensor) -> Tensor:
    """Features whose product falls with the distance of two positions, ``[L, DIM // 2]`` of length 1."""
    rates = torch.logspace(0, -2.2, DIM // 4)
    angles = index[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1) * (DIM // 4) ** -0.5


def _unit(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def _local(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    index = torch.arange(length, dtype=torch.float32)
    x = torch.cat([_positions(index), torch.zeros(length, DIM // 2)], -1)
    return 16 * x, x


def _sink(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Most mass on the first four keys, the rest nearby."""
    q, k = _local(length, generator)
    direction = _unit(DIM // 2, generator=generator)
    q[:, DIM // 2 :] = 16 * direction
    k[:4, DIM // 2 :] = direction
    return q, k


def _vertical(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Six single keys that every query attends to."""
    q, k = (_unit(length, DIM, generator=generator) for _ in range(2))
    direction = _unit(DIM, generator=generator)
    columns = torch.randperm(length // 2, generator=generator)[:6]
    k[columns] = direction
    return 4 * q + 12 * direction, k


def _slash(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries attend to the keys at two fixed distances."""
    index = torch.arange(length, dtype=torch.float32)
    half = [16 * _positions(index - length * share) for share in (0.21, 0.43)]
    keys = _positions(index)
    return torch.cat([half[0] + half[1], torch.zeros(length, DIM // 2)], -1), torch.cat([keys, keys * 0], -1)


def _blocks(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stretches of 128 tokens with a topic each; queries attend to the stretches of their topic."""
    topics = _unit(8, DIM, generator=generator)
    topic = torch.randint(8, (-(-length // BLOCK),), generator=generator).repeat_interleave(BLOCK)[:length]
    noise = [_unit(length, DIM, generator=generator) for _ in range(2)]
    return 10 * topics[topic] + 4 * noise[0], topics[topic] + noise[1]


def _needles(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every query block asks, with eight of its queries, for a stretch of eight keys at a random place."""
    q, k = (_unit(length, DIM, generator=generator) for _ in range(2))
    for start in range(BLOCK, length - BLOCK + 1, BLOCK):
        direction = _unit(DIM, generator=generator)
        place = int(torch.randint(start - 8, (1,), generator=generator))
        k[place : place + 8] = direction
        asking = start + torch.randperm(BLOCK, generator=generator)[:8]
        q[asking] = 16 * direction
    return q, k


STRUCTURES: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "local": _local, "sink": _sink, "vertical": _vertical, "slash": _slash, "blocks": _blocks, "needles": _needles,
}  # fmt: skip


def make_call(structure: str, length: int, heads: int, seed: int = 0) -> Call:
    """A causal call of ``heads`` independent heads with one structure, scale 1."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [STRUCTURES[structure](length, generator) for _ in range(heads)]
    q, k = (torch.stack(x)[None] for x in zip(*pairs, strict=True))
    return Call.make(q, k, k, is_causal=True, scale=1.0)


def true_mass(call: Call) -> Tensor:
    """Exact softmax mass of every block, summed over its queries, float32 ``[1, H, nq, nk]``."""
    parts = []
    for start in range(0, call.q_len, BLOCK):
        seen = call.token_mask(start, min(start + BLOCK, call.q_len))
        assert seen is not None
        scores = call.q[:, :, start : start + BLOCK] @ call.k.mT * call.scale
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(blockwise(probs, BLOCK).sum(-1).sum(2))
    return torch.stack(parts, 2)


def recall_of(levels: Tensor, mass: Tensor, visible: Tensor, density: float) -> Tensor:
    """Share of each head's mass in the ``density`` of its visible blocks that have the lowest levels, percent ``[H]``.

    Of the blocks whose level crosses the density (those of one column, say) each is kept in part, all alike.
    """
    level = levels.masked_fill(~visible, torch.inf).flatten(2)
    wanted = density * int(visible.sum())
    crossing = level.sort(-1).values[..., int(wanted), None]
    below, at = level < crossing, level == crossing
    part = (wanted - below.sum(-1, keepdim=True)) / at.sum(-1, keepdim=True)
    mass = mass.flatten(2)
    kept = (mass * below).sum(-1) + (mass * at).sum(-1) * part[..., 0]
    return (100 * kept / mass.sum(-1))[0]


def streaming_levels(call: Call, forced: Tensor) -> Tensor:
    """The sink first, then by distance: a window as long as the density allows."""
    index = torch.arange(forced.shape[-1], dtype=torch.float32)
    return (index[:, None] - index).masked_fill(forced, -torch.inf)


def searched_levels(call: Call, forced: Tensor) -> list[Tensor]:
    """Of every pattern that MInference's search tries, the levels whose threshold is the scale of its sizes."""
    selector, heads, found = MInference(), call.q.shape[1], []
    for pattern, vertical, slash in CANDIDATES:
        if pattern == "block_sparse":
            level = selector.block_places(call)
        else:
            last = last_queries(call, LAST_QUERIES) if pattern == "vertical_slash" else None
            columns, diagonals = selector.line_places(call, (pattern,) * heads, last)
            level = torch.minimum(
                over_columns(selector, columns) / max(vertical, 1e-6),
                over_diagonals(selector, call, diagonals) / max(slash, 1e-6),
            )
        found.append(level.expand(1, heads, *forced.shape[-2:]).masked_fill(forced, -torch.inf))
    return found


def recalls(structure: str, length: int, heads: int, densities: list[float], seed: int = 0) -> list[dict[str, float]]:
    """For every density, percent of the true mass by selector; for MInference the best pattern of each head counts."""
    call = make_call(structure, length, heads, seed)
    mass, visible = true_mass(call), SELECTORS["XAttention"].visible(call)
    forced = SELECTORS["XAttention"].forced(call)
    levels = {
        ORACLE: [-mass],
        STREAMING: [streaming_levels(call, forced)],
        SEARCHED: searched_levels(call, forced),
        **{name: [selector.final_levels(call)] for name, selector in SELECTORS.items()},
    }

    def best(tried: list[Tensor], density: float) -> float:
        return float(torch.stack([recall_of(level, mass, visible, density) for level in tried]).amax(0).mean())

    return [{name: best(tried, density) for name, tried in levels.items()} for density in densities]


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per selector, a column per structure."""
    names = list(next(iter(rows.values())))
    lines = ["| selector | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for name in names:
        cells = []
        for found in rows.values():
            best = max(value for other, value in found.items() if other != ORACLE)
            mark = "**" if name != ORACLE and found[name] >= best - 0.05 else ""
            cells.append(f"{mark}{found[name]:.1f}{mark}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(rows: dict[str, dict[str, float]]) -> list[str]:
    """A line for every claim: held, or how far it is missed."""
    lines = []
    for structure, claims in CLAIMS.items():
        best = max(value for name, value in rows[structure].items() if name != ORACLE)
        for name, margin in claims.items():
            gap = best - rows[structure][name]
            said = "holds" if gap <= margin else "**does not hold**"
            lines.append(f"- {structure}, {name}: {said} ({gap:.1f} points below the best, {margin:.0f} allowed)")
    return lines


def page(tables: dict[float, dict[str, dict[str, float]]], length: int, heads: int, seeds: int) -> str:
    """docs/benchmarks/recall.md."""
    parts = [HEAD.format(length=length, heads=heads, seeds=seeds, dim=DIM, block=BLOCK)]
    for density, rows in tables.items():
        parts += [
            f"## Density {density:.0%}\n",
            table(rows),
            "\nWhat the papers say of their methods, at this density:\n",
        ]
        parts += [*verdicts(rows), ""]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens")
    parser.add_argument("--heads", type=int, default=2, help="heads with one structure each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args(argv)
    tables: dict[float, dict[str, dict[str, float]]] = {density: {} for density in args.densities}
    for structure in STRUCTURES:
        runs = [recalls(structure, args.length, args.heads, args.densities, seed) for seed in range(args.seeds)]
        for at, density in enumerate(args.densities):
            found = [run[at] for run in runs]
            tables[density][structure] = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
    text = page(tables, args.length, args.heads, args.seeds)
    print(text)
    if args.write:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
