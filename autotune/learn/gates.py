"""HeadGates: one learnt number per KV head, which says how much that head needs to see more than sink and window."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .branches import Branches, mix

TEMPERATURE = 2 / 3  # β of the hard concrete distribution
STRETCH = (-0.1, 1.1)  # the interval that it is stretched to before it is clipped to [0, 1]
START_MEAN, START_STD = 4.0, 0.01  # of log α: every head begins almost fully open, P(z = 1) = 0.92
DECIDED = 10.0  # log α of a head of a fixed table: z is exactly 1 at +10 and 0 at -10
ORDER = 1e-3
_SHIFT = -TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])  # 1.599: P(z > 0) = σ(log α + 1.599)
_EPSILON = 1e-6


class HeadGates(nn.Module):
    """The gates z of the KV heads of one layer, and the attention under them: z · full + (1 − z) · streaming.

    z follows the hard concrete distribution (arXiv 1712.01312) as PruLong (arXiv 2506.17121) uses it: drawn anew in
    every call while training, its deterministic value in eval mode. PruLong's code differs there: in eval mode it sets
    round(Σ P(z = 0)) heads of a layer to 0 and leaves the others soft.

    ``log_alpha`` stays float32 whatever the model is cast to: around 4, bfloat16 has steps of 1/64.

    Args:
        kv_heads, query_heads: of the layer; the query heads of a KV head share its gate.
        branches: computes the two attentions; one object for all layers of one block size.
        generator: draws the start values.
        device: of the parameter.

    Attributes:
        log_alpha: float32 ``[kv_heads]``.
        active: False = the call is the model's own, full attention (the teacher of a distillation).
        fixed: the gates of a fixed table (:meth:`fix`), one bool per KV head, True = full; None while they are learnt.
    """

    log_alpha: nn.Parameter

    def __init__(
        self, kv_heads: int, query_heads: int, branches: Branches, *, generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__()
        if kv_heads < 1 or query_heads % kv_heads:
            raise ValueError(f"query_heads must be a multiple of kv_heads {kv_heads}, got {query_heads}")
        start = START_MEAN + START_STD * torch.randn(kv_heads, generator=generator, device="cpu")
        self.log_alpha = nn.Parameter(start.to(device))
        self.group, self.branches = query_heads // kv_heads, branches
        self.active = True
        self.fixed: tuple[bool, ...] | None = None

    @property
    def values(self) -> Tensor:
        """``log_alpha`` as a plain tensor, which gradients flow through; of a parameter that FSDP2 has spread over
        ranks all of it (a collective call).
        """
        return self.log_alpha.full_tensor() if hasattr(self.log_alpha, "full_tensor") else self.log_alpha

    def keep_probability(self) -> Tensor:
        """P(z > 0) = σ(log α − β log(0.1 / 1.1)), ``[kv_heads]``, differentiable."""
        return torch.sigmoid(self.values + _SHIFT)

    def sample(self) -> Tensor:
        """One draw of z, ``[kv_heads]`` in [0, 1], differentiable; from the device's global generator, whose state
        gradient checkpointing restores.
        """
        noise = torch.rand_like(self.values, requires_grad=False).clamp(_EPSILON, 1 - _EPSILON)
        return _stretched((noise.logit() + self.values) / TEMPERATURE)

    def deterministic(self) -> Tensor:
        """z without noise, clip(1.2 σ(log α) − 0.1, 0, 1), ``[kv_heads]``, differentiable."""
        return _stretched(self.values)

    def ranked(self) -> Tensor:
        """The deterministic z, moved by at most 0.001 toward σ(log α), so that heads which the clip makes equal keep
        their order: any share of streaming heads can be chosen from it later. Of a fixed table its 0 and 1.
        """
        z = self.deterministic()
        return z if self.fixed is not None else torch.lerp(z, torch.sigmoid(self.values), ORDER)

    def fix(self, full: Tensor | None) -> None:
        """Set the gates to a row of a table, bool ``[kv_heads]``, True = full, and keep them there; None lets them be
        learnt again, from where they are.
        """
        self.fixed = None if full is None else tuple(full.tolist())
        self.log_alpha.requires_grad_(full is None)
        if full is not None:
            self.set_table(full.float())

    @torch.no_grad()
    def set_table(self, row: Tensor) -> None:
        """Set log α from a row of a table, ``[kv_heads]`` in [0, 1]: (2x − 1) · 10."""
        local = ((2 * row - 1) * DECIDED).to(self.log_alpha.device)
        spread: Any = self.log_alpha
        if hasattr(spread, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            local = distribute_tensor(local, spread.device_mesh, spread.placements)
        spread.copy_(local)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, dense: Callable[[], Tensor], share: tuple[int, int] | None = None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of one call; arguments as those of :meth:`autotune.SparseAttention.forward`.

        Heads of a fixed table pay for their own branch only.

        Raises:
            ValueError: on attention that is not causal.
        """
        if not options["is_causal"]:
            raise ValueError("gates of heads are learnt on causal attention (language models), got is_causal=False")
        if not self.active:
            return self.branches.full(q, k, v, dense, options)
        if self.fixed is not None:
            heads = self._of_queries(torch.tensor(self.fixed), q, share)
            return self.branches.fixed(q, k, v, heads, dense, options)
        z = self._of_queries(self.sample() if self.training else self.deterministic(), q, share).to(q.device)
        full = self.branches.full(q, k, v, dense, options)
        return mix(z, full, self.branches.streaming(q, k, v, options)[..., : full.shape[-1]])

    def _of_queries(self, gates: Tensor, q: Tensor, share: tuple[int, int] | None) -> Tensor:
        """Gates of the query heads of a call: under sequence parallelism those that this rank holds."""
        gates = gates.repeat_interleave(self.group)
        rank, size = share or (0, 1)
        if q.shape[1] * size != len(gates):
            raise ValueError(
                f"the layer has gates for {len(gates)} query heads, and the call has {q.shape[1]} of {size} ranks"
            )
        return gates[rank * q.shape[1] : (rank + 1) * q.shape[1]]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HeadGates:
        def moved(x: Tensor) -> Tensor:
            out = fn(x)
            return out if out.dtype == x.dtype else x.to(out.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.fixed is not None:  # another table may have been loaded
            with torch.no_grad():
                self.fixed = tuple((self.values > 0).tolist())

    def extra_repr(self) -> str:
        state = "learnt" if self.fixed is None else f"fixed, {sum(self.fixed)} full"
        return f"kv_heads={len(self.log_alpha)}, {state}, active={self.active}"


def _stretched(logits: Tensor) -> Tensor:
    low, high = STRETCH
    return (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)
