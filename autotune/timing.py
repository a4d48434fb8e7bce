"""Times of a layer's call on this machine, dense and as it will be served, for the report of a calibration."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from spas_attn import backends
from spas_attn.again import attend_again
from spas_attn.call import Call
from spas_attn.plan import plan

from .module import SparseAttention

REPEATS = 3
WARM = 3  # calls of a signature before its plan runs (spas_attn/replay.py)


@torch.no_grad()
def timed(module: SparseAttention, call: Call) -> tuple[float, float]:
    """Milliseconds of a call with exact dense attention, and with the layer's thresholds (selection included).

    The sparse kernels are timed even where dense attention is expected to be faster; a layer whose heads are all dense
    has one time for both. The least of a few runs counts, after one to warm up.
    """
    dense = _least(lambda: backends.get("sdpa").compute(call.replace(precision="native")), call.q.device)
    tuned = module.tuned
    assert tuned is not None
    if tuned.all_dense:
        return dense, dense
    selector, pv = module.serving(call)
    skip = pv if tuned.skips and call.q.device.type != "cpu" else None  # as SparseAttention serves it
    served = call.replace(pv_threshold=skip, expected_density=tuned.expected_density)
    backend = plan(served, selector, module.backend).instead_of or module.backend
    options = {
        name: getattr(call, name) for name in ("is_causal", "scale", "attn_mask", "window", "sinks", "precision")
    }
    trusted = {"pv_threshold": skip, "expected_density": tuned.expected_density, "text": call.text}

    def run() -> Any:
        return attend_again(call.q, call.k, call.v, selector, options, backend=backend, trusted=trusted)

    return dense, _least(run, call.q.device)


def _least(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(WARM + REPEATS):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        times.append(1000 * (time.perf_counter() - began))
    return min(times[WARM:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
