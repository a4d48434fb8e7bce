"""What every backend is: a name, the calls it declines (with the reason), and one function with one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..block_mask import BlockMask


@dataclass(frozen=True)
class Call:
    """One attention call, arguments already checked; the same for every backend.

    Attributes:
        q: ``[B, Hq, Lq, D]``, any strides.
        k, v: ``[B, Hkv, Lk, D]``, Hq a multiple of Hkv, any strides.
        mask: the blocks to compute, or None for all.
        is_causal: lower-right aligned causality (query i sees keys up to i + Lk - Lq).
        scale: factor on q·k before the softmax.
        attn_mask: bool ``[B, Lk]`` key padding or bool ``[B, 1 or Hq, Lq, Lk]``, True = attend, or None.
        window: with causality, a query sees its last ``window`` keys, or None.
        pv_threshold: float32 ``[Hq]``, PV skip of SpargeAttn (arXiv 2502.18137) in log2 units, or None for off.
        precision: "bf16" computes in the inputs' own 16 (or 32) bits, "int8_bf16" quantises Q and K to 8 bits.
        expected_density: share of blocks that the caller expects to keep, None when unknown; never read off this call's
            mask.
        keys: K in 8 bits, where the pass that selected the blocks has made it (``kernels.launch.Keys``).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask | None = None
    is_causal: bool = False
    scale: float = 1.0
    attn_mask: Tensor | None = None
    window: int | None = None
    pv_threshold: Tensor | None = None
    precision: str = "bf16"
    expected_density: float | None = None
    keys: tuple[Tensor, ...] | None = None

    @property
    def key_mask(self) -> Tensor | None:
        """The key-padding mask ``[B, Lk]`` when ``attn_mask`` is one."""
        return self.attn_mask if self.attn_mask is not None and self.attn_mask.dim() == 2 else None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def replace(self, **changes: object) -> Call:
        """A copy with some arguments changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def token_mask(self, start: int, stop: int) -> Tensor | None:
        """Everything that hides keys from query rows ``start`` to ``stop``, as one boolean mask.

        Returns:
            bool, broadcastable to ``[B, Hq, stop - start, Lk]``, True = attend; None when nothing is hidden.
        """
        parts: list[Tensor] = []
        q_len, k_len, device = self.q.shape[2], self.k.shape[2], self.q.device
        if self.is_causal:
            rows = torch.arange(start, stop, device=device)[:, None] + (k_len - q_len)
            columns = torch.arange(k_len, device=device)
            seen = columns <= rows
            if self.window is not None:
                seen = seen & (columns > rows - self.window)
            parts.append(seen[None, None])
        if self.attn_mask is not None:
            mask = self.attn_mask
            parts.append(mask[:, None, None] if mask.dim() == 2 else mask[:, :, start:stop])
        if self.mask is not None:
            parts.append(self.mask.token_mask(slice(start, stop)))
        if not parts:
            return None
        combined = parts[0]
        for part in parts[1:]:
            combined = combined & part
        return combined


@dataclass(frozen=True)
class Backend:
    """One way of computing a masked attention.

    Attributes:
        name: the name users give.
        missing: None when the backend can run on this machine, else what is missing.
        declines: None when the backend serves this call, else the reason.
        run: computes the call; returns ``[B, Hq, Lq, D]`` in q's dtype.
        skips_pv: whether PV skip is carried out (if not, the error only falls).
        skips_blocks: whether dropped blocks save time.
        run_with_lse: as ``run``, and the natural log of the sum of each query's exponentials, float32 ``[B, Hq, Lq]``
            (-inf for a query that sees nothing); None where the backend does not tell.
        pv_skip_left_out: why PV skip is left out of a call that asks for it, None when it is carried out.
    """

    name: str
    missing: Callable[[], str | None]
    declines: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]
    skips_pv: bool = False
    skips_blocks: bool = True
    run_with_lse: Callable[[Call], tuple[Tensor, Tensor]] | None = None
    pv_skip_left_out: Callable[[Call], str | None] = lambda call: None

    def leaves_pv_skip_out(self, call: Call) -> str | None:
        """Why this call's PV skip is not carried out; None when it is, or none is asked for."""
        if call.pv_threshold is None:
            return None
        return self.pv_skip_left_out(call) if self.skips_pv else "this backend has none"


def declines_int8(call: Call) -> str | None:
    """For backends that compute exactly: they refuse an 8-bit call rather than ignore its precision."""
    if call.precision == "bf16":
        return None
    return f"precision {call.precision!r} is not available: this backend computes exactly"


_REGISTRY: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Make a backend known under its name."""
    _REGISTRY[backend.name] = backend
    return backend


def get(name: str) -> Backend:
    """The backend of that name, or a ValueError that lists the names."""
    if name not in _REGISTRY:
        raise ValueError(f"backend must be 'auto' or one of {sorted(_REGISTRY)}, got {name!r}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered names."""
    return list(_REGISTRY)
