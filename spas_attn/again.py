"""Calls given by their arguments: made, checked and run the first times, from a plan later (replay.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import backends, replay
from .attend import AttentionStats, attend, attend_with_lse, no_autocast, with_density
from .block_mask import BlockMask
from .call import Call
from .plan import Plan
from .selectors import Selector


def attend_again(
    q: Tensor, k: Tensor, v: Tensor, selector: Selector | None, options: Mapping[str, Any], *, backend: str = "auto",
    strict: bool = False, wants_stats: bool = False, trusted: Mapping[str, Any] | None = None, static: bool = False,
) -> tuple[Tensor, AttentionStats | None]:  # fmt: skip
    """:func:`attend` for the arguments of a call; from the third call of a signature on its plan is run (replay.py).

    Args:
        options: what :meth:`Call.make` takes beside q, k and v.
        wants_stats: without, the stats of the result may be None.
        trusted: attributes to set in the checked call.
        static: run the plan as a CUDA graph where the inputs lie at the same addresses again; the output is then
            overwritten by the next such call.
    """

    def made() -> Call:
        call = Call.make(q, k, v, **options)
        return call.replace(**trusted) if trusted else call

    request = None
    if not torch.compiler.is_compiling() and not _reads_values(options):
        request = replay.request(q, q, k, v, selector, options, trusted, backend, strict, wants_stats)
    if request is None:
        return attend(made(), selector, backend=backend, strict=strict)
    if request.plan is not None:
        out, *lists = request.run(static)
        return out, _stats_again(request.plan.about, made(), selector, lists) if wants_stats else None
    chosen = request.about
    out, stats = request.watch(lambda: attend(made(), selector, backend=backend, strict=strict, chosen=chosen))
    lists = [] if not wants_stats or stats.computed is None else [stats.computed.counts, stats.computed.indices]
    request.keep([out, *lists], stats.plan, _obstacle(stats.backend))
    return out, stats


def _obstacle(backend: str) -> str | None:
    return None if backends.get(backend).replays else f"backend {backend!r} is not recorded"


def _reads_values(options: Mapping[str, Any]) -> bool:
    """Whether the checks of a call's arguments read tensors, so that they have to be made every time."""
    return options.get("cu_seqlens_q") is not None or isinstance(options.get("pv_threshold"), Tensor)


def _stats_again(chosen: Plan, call: Call, selector: Selector | None, lists: list[Tensor]) -> AttentionStats:
    """The stats of a call that was run from a plan, whose lists of blocks these are (none for a dense call)."""
    call, mask = with_density(call, selector).replace(precision=chosen.precision), call.mask
    if lists:
        assert selector is not None
        counts, indices = lists
        mask = BlockMask(counts, indices, selector.block_q, selector.block_k, call.q_len, call.k_len, trusted=True)
    return AttentionStats(chosen, call.replace(mask=mask), mask)


def with_lse_again(q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """:func:`attend_with_lse` for the arguments of a call, as :func:`attend_again`."""

    def compute() -> tuple[Tensor, Tensor, str]:
        with no_autocast(q):
            return attend_with_lse(Call.make(q, k, v, **options), backend)

    request = None
    if not torch.compiler.is_compiling() and not _reads_values(options):
        request = replay.request(q, q, k, v, options, backend, "lse")
    if request is None:
        out, lse, _ = compute()
        return out, lse
    if request.plan is not None:
        out, lse = request.run()
        return out, lse
    out, lse, name = request.watch(compute)
    request.keep([out, lse], obstacle=_obstacle(name))
    return out, lse
