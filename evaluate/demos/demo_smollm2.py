#!/usr/bin/env python
"""`make demo-smollm2`: the whole path on SmolLM2-135M-Instruct, a published model, in minutes on two CPU cores.

Fetch (93 MB, the first time) → tune (5 samples of 2,048 tokens) → save → load into a fresh model → verify → generate →
compare dense with sparse. Tuned on prose, Python's help topics; judged on code, its standard library.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Sequence

import language_demo
import smollm2
from language_demo import Subject


def topics() -> list[str]:
    """Python's help topics."""
    from pydoc_data.topics import topics as found

    return list(found.values())


SUBJECT = Subject(
    program="demo_smollm2.py",
    model=smollm2.fetch,
    bounds={"l1": 0.06, "pv_l1": 0.07, "tail": 0.5},
    calibration=topics,
    unseen=lambda: sysconfig.get_path("stdlib"),
    unseen_name="the standard library; the calibration saw help topics only",
    unit="tokens",
    query_blocks=8,  # of 32
    prompt='import json\n\n\ndef read_config(path):\n    """Read a JSON file and return it as a dict."""\n',
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    language_demo.add_arguments(parser, "out/demo_smollm2.pt", 2048, SUBJECT.unit)
    return language_demo.main(SUBJECT, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
