"""Plan: which backend and precision serve a call, why, and whether that is a fallback."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch

from . import backends, cost_model
from .call import Call
from .selectors import Dense, Selector

# By device type; without measurements in this order. Exact dense `sdpa` comes last.
AUTOMATIC = {"cpu": ("cpu",), "cuda": ("triton", "flash", "cudnn")}
_MEASURED_DTYPES = (torch.float16, torch.bfloat16)

# Relative L1 of 8-bit arithmetic on random normal data, the largest that was measured; fastest first.
QUANTISATION_ERROR = {"int8_fp8": 0.042, "int8_bf16": 0.015}
# Quantisation may take this share of an error bound. Its errors and those of selection are independent and add up as
# squares do: half of the bound leaves selection 87% of it.
QUANTISATION_SHARE = 0.5

_fallbacks: Counter[str] = Counter()


@dataclass(frozen=True)
class Plan:
    """Which backend runs a call, why, and why the others do not.

    Attributes:
        backend: the one that runs.
        reason: why.
        precision: what it computes in.
        selects: whether blocks are selected for the call.
        fallback: why exact dense attention does the call instead of what was asked; None when it runs as asked.
        instead_of: the sparse backend that would have run, where exact dense attention is faster and runs instead:
            nothing is selected then, and it is no fallback.
        declined: why other backends do not run, by name.
        pv_skip_left_out: why PV skip, if asked for, is not carried out.
    """

    backend: str
    reason: str
    precision: str = "native"
    selects: bool = False
    fallback: str | None = None
    instead_of: str | None = None
    declined: dict[str, str] = field(default_factory=dict)
    pv_skip_left_out: str | None = None

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.reason}"]
        if self.pv_skip_left_out is not None:
            lines[0] += f"; leaves PV skip out (the error only falls): {self.pv_skip_left_out}"
        lines += [f"  not {name}: {why}" for name, why in self.declined.items()]
        if self.fallback is not None and self.fallback not in self.declined.values():
            lines.append(f"  not sparse: {self.fallback}")
        return "\n".join(lines)


def plan(call: Call, selector: Selector | None = None, backend: str = "auto") -> Plan:
    """Decide how a call runs.

    Args:
        call: with a mask of its own, or without one.
        selector: what will select its blocks, where it has no mask; None and Dense compute all.
        backend: a name, or "auto".
    """
    given = call.mask is not None
    sparse = given or not (selector is None or isinstance(selector, Dense))
    dense_reason = _needs_dense(call) if sparse else None
    selects = not given and sparse and dense_reason is None
    call = call.replace(precision=resolve_precision(call))
    if selects:
        assert selector is not None
        call = call.replace(blocks=(selector.block_q, selector.block_k))
    if backend != "auto":
        return _by_name(call, backend, dense_reason, selects)
    if dense_reason is not None:
        return Plan("sdpa", "exact and differentiable", call.precision, fallback=dense_reason)
    if not sparse and call.precision == "native":
        name = _fastest_dense(call, _predict(call, 1.0, selects=False))
        return Plan(name, "a dense call" if name == "sdpa" else "the fastest for a dense call")
    return _fastest(call, given, selects, selector.selection_ms if selects and selector is not None else 0.0)


def resolve_precision(call: Call) -> str:
    """The precision of a call: with "auto" the fastest that its ``error_bound`` allows.

    Fastest by measurement (cost_model.py) where there is one of every candidate, else the fewest bits. On a CPU, with
    fp32 inputs and where gradients are asked for: native.
    """
    if call.precision != "auto":
        return call.precision
    if call.q.device.type != "cuda" or call.q.dtype not in _MEASURED_DTYPES or call.wants_gradients:
        return "native"
    triton = backends.get("triton")
    quantised = [name for name, error in QUANTISATION_ERROR.items() if error <= QUANTISATION_SHARE * call.error_bound]
    served = [n for n in quantised if triton.missing() is None and triton.declines(call.replace(precision=n)) is None]
    candidates = [*served, "native"]
    times = [_sparse_ms(call.replace(precision=name)) for name in candidates]
    if math.inf in times:
        return candidates[0]
    return candidates[times.index(min(times))]


def fallback_counts() -> dict[str, int]:
    """How many calls ran on exact dense attention instead of what was asked, by reason, since the process began."""
    return dict(_fallbacks)


def count_fallback(reason: str) -> None:
    """Count one call that fell back to dense attention; the first of each reason also warns."""
    _fallbacks[reason] += 1
    if _fallbacks[reason] == 1:
        warnings.warn(f"spas_attn: running exact dense attention instead: {reason}", RuntimeWarning, stacklevel=3)


def _by_name(call: Call, backend: str, dense_reason: str | None, selects: bool) -> Plan:
    chosen = backends.get(backend)
    # The exact backends honour a given mask whatever else is asked; without one the call would be silently dense.
    why = None if call.mask is not None and backend in ("sdpa", "reference") else dense_reason
    why = why or chosen.why_not(call)
    if why is None:
        left_out = chosen.leaves_pv_skip_out(call)
        return Plan(backend, "asked for by name", call.precision, selects, pv_skip_left_out=left_out)
    return _fallback(call, selects, why, {backend: why})


def _fastest(call: Call, given: bool, selects: bool, extra: float = 0.0) -> Plan:
    """The first backend that serves the call, in the order of the cost model; exact dense attention where that wins.

    ``extra``: milliseconds of selection beyond the measured one.
    """
    device = call.q.device.type
    density = call.expected_density if call.blocks is not None else 1.0
    prediction = _predict(call, density, selects=selects, extra=extra)
    expected = {} if prediction is None else prediction.sparse
    declined: dict[str, str] = {}
    # sorted() keeps the order of AUTOMATIC among backends without a measurement.
    for name in sorted(AUTOMATIC.get(device, ()), key=lambda name: expected.get(name, math.inf)):
        candidate = backends.get(name)
        why = candidate.why_not(call)
        if why is not None:
            declined[name] = why
            continue
        left_out = candidate.leaves_pv_skip_out(call)
        if prediction is None or name not in expected:
            reason = f"first choice on {device}" + (f"; {_no_measurement(call)}" if device == "cuda" else "")
            return Plan(name, reason, call.precision, selects, declined=declined, pv_skip_left_out=left_out)
        dense = _fastest_dense(call, prediction)
        if not given and _dense_is_plain(call) and prediction.dense.get(dense, math.inf) <= expected[name]:
            reason = f"exact dense attention is faster here: {prediction.numbers()}"
            return Plan(dense, reason, instead_of=name, declined=declined)
        reason = f"the fastest here: {prediction.numbers()}"
        return Plan(name, reason, call.precision, selects, declined=declined, pv_skip_left_out=left_out)
    why = "; ".join(f"{name}: {reason}" for name, reason in declined.items()) or f"no backend for {device}"
    return _fallback(call, selects, why, declined)


def _fallback(call: Call, selects: bool, why: str, declined: dict[str, str]) -> Plan:
    """Exact dense attention (under the selected blocks, if any) in place of what was asked."""
    return Plan("sdpa", "the exact dense backend serves every call", call.precision, selects, why, declined=declined)


def _needs_dense(call: Call) -> str | None:
    """Why a call cannot be sparse on any backend."""
    if call.mask is None and call.wants_gradients:
        return (
            "gradients are asked for, and only given blocks and the exact dense path are differentiable; call the "
            "model under torch.no_grad() if none are needed"
        )
    if call.attn_mask is not None and call.attn_mask.dim() == 4:
        return "attn_mask is a full 4-D mask, which only exact dense backends honour"
    return None


def _sparse_ms(call: Call) -> float:
    """Predicted milliseconds of a sparse call on the fastest backend that is there; infinite if not measured."""
    measured = _predict(call, call.expected_density, selects=True)
    times = {} if measured is None else measured.sparse
    usable = [ms for name, ms in times.items() if backends.get(name).missing() is None]
    return min(usable, default=math.inf)


def _predict(call: Call, density: float | None, *, selects: bool, extra: float = 0.0) -> cost_model.Prediction | None:
    if call.q.device.type != "cuda" or call.q.dtype not in _MEASURED_DTYPES:
        return None
    return cost_model.predict(call, density, selects=selects, extra=extra)


def _no_measurement(call: Call) -> str:
    if call.q.dtype not in _MEASURED_DTYPES:
        return f"{call.q.dtype} is not measured"
    return f"no measurement of {call.precision} on a GPU like this one (python -m spas_attn.measure makes one)"


def _dense_is_plain(call: Call) -> bool:
    """Whether dense backends run this call in the kernel that was measured, without a mask of tokens."""
    square = call.q_len == call.k_len
    plain = call.attn_mask is None and call.window is None and call.sinks is None and call.document_start is None
    return plain and (square or not call.is_causal)


def _fastest_dense(call: Call, prediction: cost_model.Prediction | None) -> str:
    """The exact dense backend for the call: the fastest measured one that serves it, else `sdpa`."""
    dense = call.replace(mask=None, blocks=None, precision="native", pv_threshold=None)
    if prediction is not None and _needs_dense(dense) is None and _dense_is_plain(call):
        for name in sorted(prediction.dense, key=lambda name: prediction.dense[name]):
            candidate = backends.get(name)
            if candidate.why_not(dense) is None:
                return name
    return "sdpa"
