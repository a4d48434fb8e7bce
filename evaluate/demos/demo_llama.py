#!/usr/bin/env python
"""`make demo`: the whole path on the demo LLaMA, in a few minutes on two CPU cores.

Tune (5 samples of 4,096 bytes) → save → load into a fresh model → verify → generate → compare dense with sparse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import language_demo
from language_demo import Subject

from modify_model.cli import language

# The bounds of the demo: chosen from the frontier in docs/benchmarks for a perplexity change of at most 0.3%.
SUBJECT = Subject(
    program="demo_llama.py",
    model=lambda: language.DEMO,
    bounds={"l1": 0.2, "pv_l1": 0.24, "tail": 0.9},
    calibration=lambda: None,  # the model's held-out files
    unseen=lambda: None,
    unseen_name="files that the calibration never saw",
    unit="bytes",
    prompt=language.PROMPT,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    language_demo.add_arguments(parser, "out/demo_llama.pt", 4096, SUBJECT.unit)
    return language_demo.main(SUBJECT, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
