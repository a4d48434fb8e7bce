"""Gradients of attention over given blocks: an operator for autograd, whose backward pass is the backend's.

It keeps q, k, v, the output and the log-sum-exp, so memory grows with the tokens and not with the blocks; the scores
are computed again. Both passes are operators of torch's: torch.compile takes them as they are, and checkpoints may
compute the first one twice. The backward pass has no gradients of its own; asking for them raises a RuntimeError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, replay
from .backends.base import Backend, add_sinks
from .block_mask import BlockMask
from .call import Call


def compute(backend: Backend, call: Call) -> Tensor:
    """The output of a call on a backend; it carries gradients if the backend has some and they are asked for."""
    if call.wants_gradients and backend.has_backward(call):
        return compute_with_lse(backend, call)[0]
    return backend.compute(call)


def compute_with_lse(backend: Backend, call: Call) -> tuple[Tensor, Tensor]:
    """The output and the log of the sum of the exponentials, likewise; attention sinks carry gradients too."""
    mask = call.mask
    if mask is None or not call.wants_gradients or not backend.has_backward(call):
        return backend.compute_with_lse(call)
    out, lse = _attention(
        call.q, call.k, call.v, mask.counts, mask.indices, call.key_mask, mask.block_q, mask.block_k, call.scale,
        call.is_causal, call.window, backend.name,
    )  # fmt: skip
    return add_sinks(call, out, lse)


@torch.library.custom_op("spas_attn::block_attention", mutates_args=())
@replay.replayed
def _attention(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, key_mask: Tensor | None, block_q: int,
    block_k: int, scale: float, is_causal: bool, window: int | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, laid out like q, and log-sum-exp."""
    mask = BlockMask(counts, indices, block_q, block_k, q.shape[2], k.shape[2], trusted=True)
    run = backends.get(backend).run_with_lse
    assert run is not None
    return run(Call(q, k, v, is_causal, scale, key_mask, window, mask=mask))


@_attention.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("spas_attn::block_attention_backward", mutates_args=())
@replay.replayed
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor,
    grad_out: Tensor, grad_lse: Tensor | None, block_q: int, block_k: int, scale: float, is_causal: bool,
    window: int | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, laid out like these."""
    mask = BlockMask(counts, indices, block_q, block_k, q.shape[2], k.shape[2], trusted=True)
    backward = backends.get(backend).backward
    assert backward is not None
    call = Call(q, k, v, is_causal, scale, key_mask, window, mask=mask)
    return backward(call, out, lse, grad_out, grad_lse)


@_gradients.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_q, ctx.block_k, ctx.scale, ctx.is_causal, ctx.window, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, counts, indices, key_mask, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    options = ctx.block_q, ctx.block_k, ctx.scale, ctx.is_causal, ctx.window, ctx.backend
    grads = _gradients(q, k, v, counts, indices, key_mask, out, lse, grad_out, grad_lse, *options)
    return (*grads, *[None] * 9)


_attention.register_autograd(_backward, setup_context=_save)
