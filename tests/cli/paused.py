"""Runs the command, but halts it for good once its calibration has written its first checkpoint.

    python paused.py [ARGUMENT ...]

A test can then interrupt or kill it at a known point, however fast the machine is.
"""

import signal
import sys
import time
from typing import Any

from autotune.checkpoint import Checkpoint
from modify_model.cli.main import main

save = Checkpoint.save


def save_and_halt(self: Checkpoint, *arguments: Any) -> None:
    save(self, *arguments)
    print("halted", flush=True)
    while True:  # signal.pause() could miss a signal that comes just before it
        time.sleep(0.1)


signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
Checkpoint.save = save_and_halt  # type: ignore[method-assign]
sys.exit(main())
