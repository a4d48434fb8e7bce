"""Methods that are compared on long prompts: each at its published setting, at a given density, and calibrated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sweep
import torch
from torch import Tensor, nn

import autotune
from autotune import Grid
from modify_model import patch, restore
from modify_model.cli.arguments import sparse_backend
from spas_attn.selectors import (
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    Selector,
    Streaming,
    TopK,
    XAttention,
)

CLOSE = 0.01  # how near a measured density must come to the target
STEPS = 12  # of the search at most
LOW, HIGH = -8.0, 9.0  # of the settings searched


@dataclass(frozen=True)
class Method:
    """One way of choosing blocks.

    Attributes:
        published: the selector as its authors run it; the library's own default where it is the library's.
        at: the selector at a setting from LOW to HIGH; it keeps more the higher the setting is.
    """

    published: Selector
    at: Callable[[float], Selector]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _tuned(selector: Selector, **changes: Any) -> Callable[[float], Selector]:
    """The selector with its own threshold at a logit."""

    def at(x: float) -> Selector:
        return dataclasses.replace(selector, **{selector.tuned: _sigmoid(x)}, **changes)

    return at


OURS = MeanSimilarity(pool=8, block_q=64, block_k=64)
METHODS: dict[str, Method] = {
    "MeanSimilarity": Method(OURS, _tuned(OURS)),
    "TopK": Method(TopK(), _tuned(TopK())),
    "XAttention": Method(XAttention(), _tuned(XAttention())),
    # The least budget of 1,024 tokens would keep a quarter of a prompt of 8,192 by itself.
    "FlexPrefill": Method(FlexPrefill(), _tuned(FlexPrefill(), min_budget=128)),
    "MInference": Method(MInference(), _tuned(MInference(adaptive_budget=0.5))),
    "FlashPrefill": Method(FlashPrefill(), lambda x: FlashPrefill(alpha=_sigmoid(-x))),
    "Streaming": Method(Streaming(), lambda x: Streaming(local_tokens=round(2 ** (x + 9)))),
}


def install(model: nn.Module, selector: Selector, backend: str | None = None) -> None:
    """Run the model with a selector as it is; by default on the sparse kernels whatever the length."""
    backend = backend or sparse_backend(next(model.parameters()).device)
    patch(restore(model), selector=selector, calibrated=False, backend=backend)


def serve(model: nn.Module, method: str | None = None, tuned: str | None = None, backend: str | None = None) -> str:
    """Patch a model anew: with a calibrated file, or by a method as published, or without either dense.

    Returns:
        What a table calls that: the file's name, the method, or "dense".
    """
    if tuned is None and method is not None:
        install(model, METHODS[method].published, backend)
        return method
    patch(restore(model), backend=backend or sparse_backend(next(model.parameters()).device))
    if tuned is None:
        return "dense"
    autotune.load_sparse_attention_state_dict(model, tuned)
    return Path(tuned).name


@torch.inference_mode()
def density_of(model: nn.Module, window: Tensor) -> float:
    """Share of the blocks of dense causal attention that a forward pass over ids ``[B, L]`` computed."""
    with autotune.record_density(model) as densities:
        model(input_ids=window, use_cache=False, logits_to_keep=1)
    return densities.mean


def search(density: Callable[[float], float], target: float) -> tuple[float, float]:
    """The setting whose density comes nearest to ``target``, and that density, by bisection between LOW and HIGH.

    ``density`` may be flat in places, but must not fall.
    """
    low, high = LOW, HIGH
    best = (math.inf, low, math.nan)  # distance, setting, density
    for step in range(STEPS):
        x = (low, high)[step] if step < 2 else (low + high) / 2
        found = density(x)
        best = min(best, (abs(found - target), x, found))
        if best[0] <= CLOSE / 4 or (step == 0 and found > target) or (step == 1 and found < target):
            break
        if step > 1:
            low, high = (x, high) if found < target else (low, x)
    return best[1], best[2]


class Calibrated:
    """Calibrations of one selector under several bounds; the error curves are computed once.

    Args:
        model: the model.
        selector: the rule.
        windows: ids ``[1, L]`` to calibrate on.
        folder: for what is kept between calibrations.
    """

    def __init__(self, model: nn.Module, selector: Selector, windows: Sequence[Tensor], folder: Path) -> None:
        self.model, self.selector, self.windows, self.folder = model, selector, windows, folder

    def items(self) -> tuple[Sequence[Tensor], dict[str, Any]]:
        """What a calibration runs, and its options; as :class:`sweep.Sweep` has it."""
        return self.windows, {}

    def observe(self, window: Tensor) -> None:
        """Run a window."""
        self.model(input_ids=window, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def install(self, l1: float, tail: float | None) -> None:
        """Run the model calibrated within these bounds, PV skip left out."""
        device = next(self.model.parameters()).device
        bounds = {"l1": l1, "pv_l1": 1.2 * l1, "tail": tail}
        restore(self.model)
        patch(self.model, selector=self.selector, backend=sparse_backend(device), **bounds)
        sweep.calibrate(self, Grid(), self.folder / "curves")  # type: ignore[arg-type]
