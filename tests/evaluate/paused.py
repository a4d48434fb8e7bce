"""Runs a script like python does, but halts it for good once its calibration has written its first checkpoint.

    python paused.py SCRIPT [ARGUMENT ...]

A test can then interrupt or kill it at a known point, however fast the machine is.
"""

import runpy
import signal
import sys
import time
from pathlib import Path

from autotune.checkpoint import Checkpoint

save = Checkpoint.save


def save_and_halt(self: Checkpoint, rank: int, layers: list) -> None:
    save(self, rank, layers)
    print("halted", flush=True)
    while True:  # signal.pause() could miss a signal that comes just before it
        time.sleep(0.1)


signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
Checkpoint.save = save_and_halt  # type: ignore[method-assign]
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)  # where Python looks first when it runs the script itself
runpy.run_path(sys.argv[0], run_name="__main__")
