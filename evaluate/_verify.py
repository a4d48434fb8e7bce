"""The numbered steps of the verification scripts: run one after the other, each passes or says why it failed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Step = tuple[str, Callable[[], str]]  # a title, and what returns a sentence or raises


class Failure(Exception):
    """A step failed for the reason given."""


def say(what: str, value: object) -> None:
    """Print one fact of the step in progress."""
    print(f"    {what + ':':15} {value}")


def run_steps(steps: Sequence[Step], needed: int) -> int:
    """Run the steps and print how they went; returns the exit code.

    Args:
        steps: in order.
        needed: after a failure among the first ``needed``, the others are not run: they need what it makes.
    """
    failed = 0
    for number, (title, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {title}", flush=True)
        try:
            print(f"    PASS: {step()}", flush=True)
        except (Failure, ValueError, OSError, torch.OutOfMemoryError) as error:
            print(f"    FAIL: {error}", flush=True)
            failed += 1
            if number <= needed:
                failed = len(steps) - number + 1
                for later, (title, _) in enumerate(steps[number:], number + 1):
                    print(f"[{later}/{len(steps)}] {title}\n    not run")
                break
    print(f"{len(steps) - failed}/{len(steps)} steps passed")
    return int(failed > 0)
