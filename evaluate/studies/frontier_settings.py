"""What the study of the frontier compares: selectors with their candidate thresholds, and how errors are shared out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from probes import Probe

from spas_attn.selectors import ExactKeys, MeanSimilarity, PeakMass, Selector
from spas_attn.selectors.ranking import MASSES

FINE = ExactKeys.candidates


@dataclass(frozen=True)
class Setting:
    """What is judged of one way of choosing blocks.

    Attributes:
        selector: the way.
        candidates: thresholds to choose from.
        plans: how the error is shared out over the heads, see ``frontier.py``.
        targets: sparsities, where they are not those of the other settings.
    """

    selector: Selector
    candidates: Sequence[float] = MASSES
    plans: Sequence[str] = ("budget",)
    targets: Sequence[float] = ()


def exact(
    pool: int, block_q: int = 64, block_k: int = 64, queries: str = "mean", rank: str = "mass", **changes: Any
) -> Setting:
    """Exact keys for pooled queries."""
    selector = ExactKeys(pool=pool, queries=queries, rank=rank, block_q=block_q, block_k=block_k)
    return dataclasses.replace(Setting(selector), **changes)


def peak(pool: int, block_q: int = 64, queries: str = "sample", **changes: Any) -> Setting:
    """Exact keys, each block by the row that gives it most."""
    return exact(pool, block_q, queries=queries, rank="peak", candidates=FINE, **changes)


def probe(pool: int, queries: str = "sample", **options: Any) -> Setting:
    """A variation on exact keys, 64 x 64 blocks."""
    return Setting(Probe(pool=pool, queries=queries, block_q=64, block_k=64, **options))


def finely(pool: int, queries: str = "sample", **options: Any) -> Setting:
    """A variation on exact keys with the finer grid of thresholds, 64 x 64 blocks."""
    return Setting(Probe(pool=pool, queries=queries, block_q=64, block_k=64, **options), FINE)


PEAK = {"power": math.inf, "order": "share"}
ALL = ("budget", "uniform", "bounds", "weighted")
SETTINGS: dict[str, Setting] = {
    # The first one is what others are compared with: the default of language models so far.
    "means 8": Setting(MeanSimilarity(pool=8, block_q=64, block_k=64), plans=ALL),
    "exact 32": exact(32, plans=ALL),
    "exact 8, real": exact(8, queries="sample", plans=ALL),
    "exact 64": exact(64),
    "exact 16": exact(16),
    "exact 8": exact(8),
    "exact 16, real": exact(16, queries="sample", plans=("budget", "weighted")),
    "exact 32, real": exact(32, queries="sample"),
    "128x64, exact 32, real": exact(32, 128, queries="sample"),
    "128x64, exact 64": exact(64, 128),
    "128x64, exact 32": exact(32, 128),
    "128x64, exact 8, real": exact(8, 128, queries="sample", plans=("budget", "weighted")),
    "128x128, exact 32": exact(32, 128, 128),
    "128x128, exact 8, real": exact(8, 128, 128, queries="sample"),
    "128x64, exact 16, real": exact(16, 128, queries="sample", plans=("budget", "weighted")),
    "128x128, exact 16, real": exact(16, 128, 128, queries="sample"),
    # Coarse to fine: one mean query throws out what is hopeless, real queries judge the rest.
    "best half, 8 real": probe(8, alive=0.5),
    "best quarter, 8 real": probe(8, alive=0.25),
    "best quarter, 4 real": probe(4, alive=0.25),
    "best quarter of means 32, 8 real": probe(8, alive=0.25, coarse=32),
    "last 2048 by 8 real, far by means 32": probe(8, near=2048, coarse=32),
    # Which queries are real.
    "16, longest": probe(16, pick="longest"),
    "16, farthest": probe(16, pick="farthest"),
    "8, farthest": probe(8, pick="farthest"),
    "means 32 and 16 real": probe(16, means=32),
    "mean 64 and 32 real": probe(32, means=64),
    "exact 32, peak": peak(32, queries="mean"),
    "exact 16, real, peak": peak(16),
    "exact 8, real, peak": peak(8),
    "exact 16, peak": peak(16, queries="mean"),
    "exact 32, real, peak": peak(32),
    "128x64, exact 32, peak": peak(32, 128, "mean"),
    "128x64, exact 16, real, peak": peak(16, 128),
    "oracle, peak": peak(1),
    # What a threshold is for, what neighbours see, and what the other heads see.
    "exact 16, real, share": finely(16, order="share"),
    "exact 16, real, root": finely(16, order="root"),
    "exact 16, real, square": finely(16, power=2.0, order="share"),
    "exact 16, real, peak mass": finely(16, power=math.inf),
    "exact 32, root": finely(32, "mean", order="root"),
    "exact 16, real, beside": finely(16, beside=0.3),
    "exact 16, real, along": finely(16, along=0.3),
    "exact 16, real, others": finely(16, others=0.5),
    "exact 16, real, peak, beside": finely(16, beside=0.3, **PEAK),
    "exact 16, real, peak, along": finely(16, along=0.3, **PEAK),
    "exact 16, real, peak, others": finely(16, others=0.5, **PEAK),
    "exact 32, real, peak, beside": finely(32, beside=0.3, **PEAK),
    "means 32 and 16 real, peak": finely(16, means=32, **PEAK),
    "exact 16, real, floor .05": probe(16, floor=0.05),
    "exact 16, real, floor .1": probe(16, floor=0.1),
    "exact 16, real, fine grid": exact(16, queries="sample", candidates=FINE),
    "128x128, means 16": Setting(MeanSimilarity(pool=16), plans=("budget", "bounds")),
    "128x128, original": Setting(MeanSimilarity(pool=128, local=0), plans=("uniform",), targets=(0.4, 0.5, 0.6, 0.77)),
    "peak mass": Setting(PeakMass()),
    "128x128, exact 64": exact(64, 128, 128),
    "oracle": exact(1),
}

# Of the demo Wan; the first one is the default of video models so far.
BOTH = ("bounds", "budget")
VIDEO: dict[str, Setting] = {
    "peak mass": Setting(PeakMass(), plans=BOTH),
    "means 8": Setting(MeanSimilarity(pool=8, block_q=64, block_k=64), plans=BOTH),
    "exact 32": exact(32, plans=BOTH),
    "exact 16": exact(16, plans=BOTH),
    "exact 8": exact(8, plans=BOTH),
    "exact 8, real": exact(8, queries="sample", plans=BOTH),
    "exact 16, real": exact(16, queries="sample", plans=BOTH),
    "exact 32, peak": peak(32, queries="mean", plans=BOTH),
    "exact 16, peak": peak(16, queries="mean", plans=BOTH),
    "exact 8, peak": peak(8, queries="mean", plans=BOTH),
    "exact 8, real, peak": peak(8, plans=BOTH),
    "exact 16, real, peak": peak(16, plans=BOTH),
    "exact 16, real, root": dataclasses.replace(finely(16, order="root"), plans=BOTH),
    "oracle, peak": peak(1, plans=BOTH),
}
