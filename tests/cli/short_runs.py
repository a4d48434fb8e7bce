"""Options that keep runs of tiny models short."""

from __future__ import annotations

# Bounds so loose that blocks are left out of attention with random weights.
LOOSE = ("--l1", "0.3", "--pv_l1", "0.35", "--tail", "2")
SHORT = {"tiny:Llama": ("--num_tune_samples", "3", "--max_length", "640")}
SHORT_PIPELINE = ("--num_tune_samples", "2", "--steps", "3")


def short(name: str) -> tuple[str, ...]:
    """Options that keep a run of a tiny model short."""
    return SHORT.get(name, SHORT_PIPELINE)
