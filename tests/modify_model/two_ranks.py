"""Runs a program as two processes, the ranks of a group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def outputs_of_two_ranks(program: str, before: Sequence[str], after: Sequence[str] = ()) -> list[str]:
    """What the ranks print; an assertion fails when one of them ends badly.

    Args:
        program: Python, with the repository and this folder on its path.
        before, after: its arguments before and after the number of the rank.
    """
    paths = [str(ROOT), str(ROOT / "tests" / "modify_model"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, *before, str(rank), *after], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(output[-4000:] for output in outputs)
    return outputs
