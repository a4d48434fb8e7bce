"""Tune mode: calibration without a loop over prompts."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from . import report
from .calibration import Calibration, calibrate

_open: weakref.WeakKeyDictionary[Any, Calibration] = weakref.WeakKeyDictionary()


def enable_tune_mode(
    model: Any, enabled: bool = True, *, verbose: bool = False, printer: Callable[[str], None] = print
) -> Calibration:
    """Tune without a loop over prompts: switch on, run the model as usual, switch off.

    Switching off chooses and checks the thresholds, on a bounded sample of the calls seen (2 GiB of host memory).

    Returns:
        The calibration; after switching off it has its statistics and can be saved.
    """
    if enabled:
        if model in _open:
            raise RuntimeError("tune mode is already on for this model")
        _open[model] = calibrate(model).__enter__()
        return _open[model]
    if model not in _open:
        raise RuntimeError("tune mode is not on for this model: enable_tune_mode(model, True) first")
    calibration = _open.pop(model)
    calibration.__exit__(None, None, None)
    if verbose:
        printer(report.table(calibration.statistics))
    return calibration
