"""How an attention layer of our shape models calls the SparseAttention that ``patch`` installed in it, if any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from autotune import SparseAttention

from ..families import count_dense_call
from .schedule import scheduled

MERGED = "the condition is one token that stands for many equal ones, which blocks cannot say"


def joint_attention(
    layer: nn.Module,
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    engine: Any,
    repeats: int,
) -> Tensor:
    """Attention of one layer; q, k, v and the result are ``[B, H, L, D]``.

    Args:
        layer: may have a child ``inner_attention``.
        attend: the layer's own attention, :func:`~.attention.attend`.
        engine, repeats: as there.
    """
    inner = layer._modules.get("inner_attention")
    if not isinstance(inner, SparseAttention) or inner.mode == "dense":
        return attend(q, k, v, engine, repeats)
    if repeats != 1:
        if inner.mode == "sparse" and not scheduled():
            count_dense_call(MERGED)
        return attend(q, k, v, engine, repeats)
    return inner(
        q,
        k,
        v,
        dense=lambda: attend(q, k, v, engine),
        is_causal=False,
        scale=q.shape[-1] ** -0.5,
        scheduled=scheduled(),
    )
