"""What every backend is: a name, the calls it declines (with the reason), and one function with one signature."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import epoch
from ..call import Call


@dataclass(frozen=True)
class Backend:
    """One way of computing a masked attention.

    Attributes:
        name: the name users give.
        missing: None when the backend can run on this machine, else what is missing.
        declines: None when the backend serves this call, else the reason.
        run: computes the call without its attention sinks; returns ``[B, Hq, Lq, D]`` in q's dtype. Calls go through
            :meth:`compute`.
        skips_pv: whether PV skip is carried out (if not, the error only falls).
        skips_blocks: whether dropped blocks save time.
        takes_keys: whether 8-bit precisions take ``Call.keys`` and ``Call.values``, as selection has quantised them.
        run_with_lse: as ``run``, and the natural log of the sum of each query's exponentials, float32 ``[B, Hq, Lq]``
            (-inf for a query that sees nothing); None where the backend does not tell.
        pv_skip_left_out: why PV skip is left out of a call that asks for it, None when it is carried out.
        replays: all that it computes on a GPU goes through ``kernels.recorded.launch``, so that its calls can be
            recorded (replay.py).
        differentiable: torch differentiates what ``run`` and ``run_with_lse`` do.
        backward: gradients of q, k and v of a call with a block mask, from (call, output, log-sum-exp, gradient of the
            output, gradient of the log-sum-exp or None); computed over the kept blocks alone, in native precision and
            without PV skip, and laid out like ``torch.empty_like`` of q, k and v, as the output then is of q. None: as
            ``differentiable`` says.
    """

    name: str
    missing: Callable[[], str | None]
    declines: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]
    skips_pv: bool = False
    skips_blocks: bool = True
    takes_keys: bool = False
    run_with_lse: Callable[[Call], tuple[Tensor, Tensor]] | None = None
    pv_skip_left_out: Callable[[Call], str | None] = lambda call: None
    replays: bool = False
    differentiable: bool = False
    backward: Callable[[Call, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]] | None = None

    def why_not(self, call: Call) -> str | None:
        """Why this backend does not run the call here; None when it does."""
        why = self.missing() or self.declines(call)
        if why is None and call.sinks is not None and self.run_with_lse is None:
            why = "attention sinks need the log-sum-exp of the scores, which it does not tell"
        if why is None and call.wants_gradients:
            if not self.has_backward(call) and not self.differentiable:
                why = "gradients are asked for, and it has no backward pass" + " without a mask" * bool(self.backward)
            elif call.precision not in ("native", "auto"):
                why = f"gradients are computed in native precision, not in {call.precision!r}"
        return why

    def has_backward(self, call: Call) -> bool:
        """Whether ``backward`` gives this call's gradients."""
        return self.backward is not None and call.mask is not None

    def compute(self, call: Call) -> Tensor:
        """The output of a call, attention sinks included."""
        return self.run(call) if call.sinks is None else self.compute_with_lse(call)[0]

    def compute_with_lse(self, call: Call) -> tuple[Tensor, Tensor]:
        """The output, and the log of the sum of the exponentials, that of the sink included; PV skip is left out."""
        assert self.run_with_lse is not None
        out, lse = self.run_with_lse(call.replace(sinks=None, pv_threshold=None))
        return add_sinks(call, out, lse)

    def leaves_pv_skip_out(self, call: Call) -> str | None:
        """Why this call's PV skip is not carried out; None when it is, or none is asked for."""
        if call.pv_threshold is None:
            return None
        if call.sinks is not None:
            return "attention sinks need the log-sum-exp of all kept blocks"
        if call.wants_gradients and self.has_backward(call):
            return "gradients are computed over all kept blocks"
        return self.pv_skip_left_out(call) if self.skips_pv else "this backend has none"


def add_sinks(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call, from those without its attention sinks.

    Softmax over the keys and the sink is softmax over the keys times 1 / (1 + exp(sink - lse)).
    """
    if call.sinks is None:
        return out, lse
    sinks = call.sinks.to(lse.device)[:, None]
    share = torch.sigmoid(lse - sinks)[..., None]
    return (out.float() * share).to(out.dtype), torch.logaddexp(lse, sinks.expand_as(lse))


def missing_package(module: str, install: str) -> str | None:
    """Why a backend on an optional package for CUDA GPUs cannot run here, or None.

    Args:
        module: what is imported.
        install: the name that pip knows.
    """
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        return f"the package {module} is not installed (`pip install {install}`)"
    return None if torch.cuda.is_available() else "no CUDA GPU"


def declines_8_bits(call: Call) -> str | None:
    """For backends that compute exactly: they decline an 8-bit call rather than ignore its precision."""
    if call.precision == "native":
        return None
    return f"precision {call.precision!r} is not available: this backend computes exactly"


_REGISTRY: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Make a backend known under its name."""
    _REGISTRY[backend.name] = backend
    epoch.advance()
    return backend


def get(name: str) -> Backend:
    """The backend of that name, or a ValueError that lists the names."""
    if name not in _REGISTRY:
        raise ValueError(f"backend must be 'auto' or one of {sorted(_REGISTRY)}, got {name!r}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered names."""
    return list(_REGISTRY)
