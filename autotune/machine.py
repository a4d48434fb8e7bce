"""What a layer's attention is expected to take on this machine, dense and sparse, by the cost model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spas_attn import cost_model
from spas_attn.cost_model import Work
from spas_attn.selectors import Selector

from .tradeoff import Shape


@dataclass(frozen=True)
class Times:
    """Expected milliseconds of one call of a layer.

    Attributes:
        dense: of the fastest exact dense backend.
        fixed: of a sparse call whatever it keeps: selection, launches, tokens.
        blocks: of a sparse call that keeps every block, beyond that; a share of the blocks takes that share of it.
    """

    dense: float
    fixed: float
    blocks: float

    def sparse(self, density: float) -> float:
        """Of a sparse call that keeps this share of the blocks."""
        return self.fixed + self.blocks * density


def times(shape: Shape, device: torch.device, precision: str, selector: Selector) -> Times | None:
    """Expected times of calls of a shape; None where nothing was measured on a machine like this one.

    Args:
        shape: (B · Hq, Lq, Lk, D, causal).
        device: where the model runs.
        precision: of the sparse kernel; "auto" takes the fastest.
        selector: whose block sizes and selection count.
    """
    heads, q_len, k_len, head_dim, is_causal = shape
    found = _row(device, head_dim, is_causal, (selector.block_q, selector.block_k))
    if found is None:
        return None
    work = Work.of(heads, q_len, k_len)
    wanted = {name: line for name, line in found.sparse.items() if precision in ("auto", name.split("/")[1])}
    if not wanted or not found.dense:
        return None
    line = min(wanted.values(), key=lambda line: line(work, 0.5))
    fixed = found.select(work) + selector.selection_ms + line(work, 0.0)
    return Times(min(dense(work) for dense in found.dense.values()), fixed, line(work) - line(work, 0.0))


def _row(device: torch.device, head_dim: int, is_causal: bool, blocks: tuple[int, int]) -> cost_model.Row | None:
    """The measured row that speaks for a device, None without one."""
    if device.type != "cuda":
        return None
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    found = cost_model.nearest(cost_model.rows(), name, capability, head_dim, is_causal, blocks)
    return None if found is None else found[0]
