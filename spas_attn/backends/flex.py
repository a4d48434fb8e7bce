"""Backend `flex`: PyTorch's FlexAttention, compiled, over a block mask; exact.

Blocks that every query sees whole are handed over as full blocks, so that only diagonal and ragged ones pay for a mask.
The first calls are compiled, which takes seconds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..call import Call
from .base import Backend, declines_8_bits, register
from .block_lists import split_blocks


def _missing() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA GPU"


def declines(call: Call) -> str | None:
    """The reason why this backend does not serve the call, or None."""
    if call.blocks is None:
        return "it computes block masks; there is none"
    if call.attn_mask is not None:
        return "it is not set up for attention masks"
    if call.window is not None:
        return "it is not set up for sliding windows"
    if call.q.device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {call.q.device} (on a CPU its code breaks as lengths vary)"
    return declines_8_bits(call)


@functools.cache
def _compiled(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: past the limit on recompilations torch would otherwise run it uncompiled, with all scores in memory.
    # On a CPU the C++ that torch 2.13 generates for symbolic shapes does not compile.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if device == "cpu" else None)


def flex_mask(mask: BlockMask, is_causal: bool) -> Any:
    """The mask as a ``flex_attention.BlockMask``, full and partial blocks apart.

    Compiled, its ``mask_mod`` is asked about the tokens of partial blocks only. It looks at the blocks as well, because
    uncompiled FlexAttention ignores the lists of blocks.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    split = split_blocks(mask, is_causal)
    kept = mask.to_dense()
    last = torch.arange(mask.q_len, device=kept.device) + (mask.k_len - mask.q_len)  # the last key of each query
    block_q, block_k = mask.block_q, mask.block_k

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = kept[b, h, i // block_q, j // block_k]
        return inside & (j <= last[i]) if is_causal else inside

    nk = split.full_indices.shape[-1]
    partial = torch.nn.functional.pad(split.partial_indices, (0, nk - split.partial_indices.shape[-1]))
    # The transposed lists serve the backward pass only; older releases always make them.
    forward_only = "compute_q_blocks" in inspect.signature(FlexMask.from_kv_blocks).parameters
    options: dict[str, Any] = {"compute_q_blocks": False} if forward_only else {}
    return FlexMask.from_kv_blocks(
        split.partial_counts,
        partial,
        split.full_counts,
        split.full_indices,
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(mask.q_len, mask.k_len),
        **options,
    )


def attend(call: Call, block_mask: Any, *, return_lse: bool = False) -> Any:
    """Compiled FlexAttention over a mask that :func:`flex_mask` made; with ``return_lse``, the log-sum-exp too."""
    # Its tiles have to divide the blocks of the mask; left alone, it takes tiles of 128.
    small = {name: 64 for name, size in zip(("BLOCK_M", "BLOCK_N"), block_mask.BLOCK_SIZE, strict=True) if size == 64}
    return _compiled(call.q.device.type)(
        call.q,
        call.k,
        call.v,
        block_mask=block_mask,
        scale=call.scale,
        enable_gqa=call.group > 1,
        kernel_options=small or None,
        return_lse=return_lse,
    )


def run(call: Call) -> Tensor:
    """Block-sparse attention by FlexAttention; PV skip is left out."""
    assert call.mask is not None
    out: Tensor = attend(call, flex_mask(call.mask, call.is_causal))
    return out


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the natural log of the sum of the exponentials, float32 ``[B, Hq, Lq]``."""
    assert call.mask is not None
    out, lse = attend(call, flex_mask(call.mask, call.is_causal), return_lse=True)
    return out, lse


register(Backend("flex", _missing, declines, run, run_with_lse=run_with_lse))
