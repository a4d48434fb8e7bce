"""Which backend runs a call, and why: the one asked for by name, or with "auto" the fastest that serves it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import backends, crossover
from .backends import Call

# By device type; without measurements in this order. Exact dense `sdpa` comes last.
_AUTO = {"cpu": ("cpu",), "cuda": ("triton", "flash")}
_MEASURED_DTYPES = (torch.float16, torch.bfloat16)

# Relative L1 of 8-bit arithmetic on random normal data, the largest that was measured; fastest first.
QUANTISATION_ERROR = {"int8_fp8": 0.042, "int8_bf16": 0.015}
# Quantisation may take this share of an error bound. Its errors and those of selection are independent and add up as
# squares do: half of the bound leaves selection 87% of it.
QUANTISATION_SHARE = 0.5
DEFAULT_BOUND = 0.07


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, why, and why the others do not.

    Attributes:
        backend: the one that runs.
        reason: why.
        declined: why others do not, by name; "sparse" says why a call that should be sparse has to run dense.
        pv_skip_left_out: why PV skip, if asked for, is not carried out.
        instead_of: the sparse backend that would have run, where exact dense attention is faster and runs instead:
            nothing is selected then, and it is no fallback.
    """

    backend: str
    reason: str
    declined: dict[str, str]
    pv_skip_left_out: str | None = None
    instead_of: str | None = None

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.reason}"]
        if self.pv_skip_left_out is not None:
            lines[0] += f"; leaves PV skip out (the error only falls): {self.pv_skip_left_out}"
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.declined.items()])


def resolve_precision(call: Call, error_bound: float = DEFAULT_BOUND) -> Call:
    """The call with ``precision="auto"`` replaced by the fastest precision that ``error_bound`` allows.

    Fastest by measurement (crossover.py) where there is one of every candidate, else the fewest bits. Processors and
    fp32 inputs compute exactly.

    Raises:
        ValueError: if ``error_bound`` is not above 0.
    """
    if call.precision != "auto":
        return call
    if not error_bound > 0:
        raise ValueError(f"error_bound must be above 0 (a relative error), got {error_bound}")
    exact = call.replace(precision="bf16")
    if call.q.device.type != "cuda" or call.q.dtype not in _MEASURED_DTYPES:
        return exact
    triton = backends.get("triton")
    quantised = [
        call.replace(precision=name)
        for name, error in QUANTISATION_ERROR.items()
        if error <= QUANTISATION_SHARE * error_bound
    ]
    candidates = [c for c in quantised if triton.missing() is None and triton.declines(c) is None] + [exact]
    times = [_sparse_ms(candidate) for candidate in candidates]
    if math.inf in times:
        return candidates[0]
    return candidates[times.index(min(times))]


def _sparse_ms(call: Call) -> float:
    """Predicted milliseconds of a sparse call on the fastest backend that is there; infinite if not measured."""
    measured = _predict(call, selects=True, density=call.expected_density)
    times = {} if measured is None else measured.sparse
    usable = [ms for name, ms in times.items() if backends.get(name).missing() is None]
    return min(usable, default=math.inf)


def choose(call: Call, backend: str, sparse: bool, *, mask_given: bool = False) -> Explanation:
    """The backend for a call.

    Args:
        call: with its mask, or one that stands in for what will be selected.
        backend: a name, or "auto".
        sparse: whether blocks are to be left out.
        mask_given: whether the mask is the caller's own: then dense attention would be another result.
    """
    dense_reason = needs_dense(call) if sparse or call.mask is not None else None
    if backend != "auto":
        return _by_name(call, backend, dense_reason)
    if dense_reason is not None:
        return Explanation("sdpa", "exact and differentiable", {"sparse": dense_reason})
    density = call.expected_density if call.mask is not None else 1.0
    prediction = _predict(call, selects=not mask_given and call.mask is not None, density=density)
    if not sparse and call.mask is None and call.precision == "bf16":
        name = _fastest_dense(call, prediction)
        return Explanation(name, "a dense call" if name == "sdpa" else "the fastest for a dense call", {})
    device, expected = call.q.device.type, {} if prediction is None else prediction.sparse
    declined: dict[str, str] = {}
    # sorted() keeps the order of _AUTO among backends without a measurement.
    for name in sorted(_AUTO.get(device, ()), key=lambda name: expected.get(name, math.inf)):
        candidate = backends.get(name)
        why = candidate.missing() or candidate.declines(call)
        if why is not None:
            declined[name] = why
            continue
        if prediction is None or name not in expected:
            reason = f"first choice on {device}" + (f"; {_no_measurement(call)}" if device == "cuda" else "")
            return Explanation(name, reason, declined, candidate.leaves_pv_skip_out(call))
        dense = _fastest_dense(call, prediction)
        if not mask_given and _dense_is_plain(call) and prediction.dense.get(dense, math.inf) <= expected[name]:
            reason = f"exact dense attention is faster here: {prediction.numbers()}"
            return Explanation(dense, reason, declined, instead_of=name)
        reason = f"the fastest here: {prediction.numbers()}"
        return Explanation(name, reason, declined, candidate.leaves_pv_skip_out(call))
    why = "; ".join(f"{name}: {reason}" for name, reason in declined.items()) or f"no backend for {device}"
    return Explanation("sdpa", "the exact dense backend serves every call", {**declined, "sparse": why})


def _by_name(call: Call, backend: str, dense_reason: str | None) -> Explanation:
    chosen = backends.get(backend)
    # The exact backends honour a given mask whatever else is asked; without one the call would be silently dense.
    why = None if call.mask is not None and backend in ("sdpa", "reference") else dense_reason
    why = why or chosen.missing() or chosen.declines(call)
    if why is None:
        return Explanation(backend, "asked for by name", {}, chosen.leaves_pv_skip_out(call))
    return Explanation("sdpa", "the exact dense backend serves every call", {backend: why})


def needs_dense(call: Call) -> str | None:
    """Why a call cannot be sparse on any backend."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return "gradients are asked for, and only the exact dense path is differentiable"
    if call.attn_mask is not None and call.attn_mask.dim() == 4:
        return "attn_mask is a full 4-D mask, which only exact dense backends honour"
    return None


def _predict(call: Call, selects: bool, density: float | None) -> crossover.Prediction | None:
    if call.q.device.type != "cuda" or call.q.dtype not in _MEASURED_DTYPES:
        return None
    batch, heads, q_len, dim = call.q.shape
    return crossover.predict(
        call.q.device,
        batch * heads,
        q_len,
        call.k.shape[2],
        dim,
        is_causal=call.is_causal,
        precision=call.precision,
        density=density,
        selects=selects,
    )


def _no_measurement(call: Call) -> str:
    if call.q.dtype not in _MEASURED_DTYPES:
        return f"{call.q.dtype} is not measured"
    return f"no measurement of {call.precision} on a GPU like this one (python -m spas_attn.tune_kernels makes one)"


def _dense_is_plain(call: Call) -> bool:
    """Whether dense backends run this call in the kernel that was measured, without a mask of tokens."""
    square = call.q.shape[2] == call.k.shape[2]
    return call.attn_mask is None and call.window is None and (square or not call.is_causal)


def _fastest_dense(call: Call, prediction: crossover.Prediction | None) -> str:
    """The exact dense backend for the call: the fastest measured one that serves it, else `sdpa`."""
    dense = call.replace(mask=None, precision="bf16", pv_threshold=None)
    if prediction is not None and needs_dense(dense) is None and _dense_is_plain(call):
        for name in sorted(prediction.dense, key=lambda name: prediction.dense[name]):
            candidate = backends.get(name)
            if candidate.missing() is None and candidate.declines(dense) is None:
                return name
    return "sdpa"
