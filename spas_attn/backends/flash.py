"""Backend `flash`: the block-sparse kernels of flash-attn-4 (CuTe DSL) for Hopper and Blackwell; fp16 and bf16, exact.

An optional dependency: ``pip install --pre flash-attn-4``. What is declined here follows its 4.0.0b36. Its tiles fix
what masks it takes: on Hopper every size of mask block up to head dim 128, above that key blocks of 64 only (its tile
of 112 or 80 keys does not divide 128); on Blackwell it computes 256 queries at once, so masks of 128 x 128 do not fit.
128 x 128 is the fast size on Hopper; 64 on either side is slower (one H200, head dim 128).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..traced import constant_when_traced
from .base import Backend, declines_8_bits, register
from .block_lists import split_blocks

_DTYPES = (torch.float16, torch.bfloat16)
_MODULE = "flash_attn.cute.interface"
_BLACKWELL_ROWS = 256  # query rows that one program computes there, unless there are at most 128 in all


@functools.cache
def _module() -> Any:
    return importlib.import_module(_MODULE)


@constant_when_traced
@functools.cache
def _import_problem() -> str | None:
    """Why the package cannot be used, or None; importing it takes seconds, once."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn-4 is not installed (pip install --pre flash-attn-4)"
    try:
        _module()
    except ImportError as error:  # flash-attn 2 alone, or a part of version 4 is absent
        return f"flash-attn-4 cannot be imported: {error}"
    return None


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return _import_problem()


def _declines(call: Call) -> str | None:
    if call.q.device.type != "cuda":
        return f"its kernels run on CUDA tensors, these are on {call.q.device}"
    major, minor = torch.cuda.get_device_capability(call.q.device)
    if major not in (9, 10):
        return f"its kernels take block masks on Hopper (9.x) and Blackwell (10.x), not on capability {major}.{minor}"
    if call.q.dtype not in _DTYPES:
        return f"it computes in fp16 and bf16, not in {call.q.dtype}"
    if call.attn_mask is not None:
        return "it takes no attention mask"
    if call.window is not None:
        return "it takes no sliding window beside a block mask"
    return declines_8_bits(call) or _declines_shape(call, major)


def _declines_shape(call: Call, major: int) -> str | None:
    dim, blocks = call.q.shape[-1], call.blocks
    if dim % 8:
        return f"the head dim has to be a multiple of 8, not {dim}"
    if major == 10 and dim > 128 and dim != 256:
        return f"on Blackwell it serves head dims up to 128, and 256, not {dim}"
    if blocks is None:
        return None
    if major == 9 and dim > 128 and blocks[1] != 64:
        return f"above head dim 128 it takes key blocks of 64 on Hopper, not {blocks[1]}"
    if major == 10 and dim != 256 and call.q.shape[2] > 128:
        return f"on Blackwell it takes query blocks of {_BLACKWELL_ROWS}, not {blocks[0]}"
    if major == 10 and blocks != (128, 128):
        return f"on Blackwell it takes blocks of 128 x 128, not {blocks[0]} x {blocks[1]}"
    return None


def run(call: Call) -> Tensor:
    """Attention by ``flash_attn_func``; PV skip is left out. Nothing is read on the host."""
    return _run(call, with_lse=False)[0]


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the natural log of the sum of the exponentials, float32 ``[B, Hq, Lq]``."""
    return _run(call, with_lse=True)


def _run(call: Call, with_lse: bool) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))  # it takes [B, L, H, D], any aligned strides
    mask = call.mask
    lists: list[Tensor] = []
    if mask is not None and call.is_causal:
        split = split_blocks(mask, is_causal=True)
        lists = [split.partial_counts, split.partial_indices, split.full_counts, split.full_indices]
    elif mask is not None:
        # The last block of a list is always checked against the number of keys: a ragged end needs no other list.
        none = torch.zeros_like(mask.counts)
        lists = [none, none[..., None], mask.counts, mask.indices]
    lists = [x.contiguous() for x in lists]
    blocks = [0, 0] if mask is None else [mask.block_q, mask.block_k]
    out, lse = _attend(q, k, v, lists, blocks, call.is_causal, call.scale, with_lse)
    return out.transpose(1, 2), lse


# An operator of its own: torch.compile cannot trace the package's launcher.
@torch.library.custom_op("spas_attn::flash_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, lists: list[Tensor], blocks: list[int], is_causal: bool, scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output ``[B, L, H, D]`` and, if it is asked for, the log-sum-exp (else an empty tensor)."""
    flash = _module()
    sparse = flash.BlockSparseTensorsTorch(*lists, block_size=tuple(blocks)) if lists else None
    more = {"return_lse": True} if with_lse else {}
    with torch.cuda.device(q.device if q.is_cuda else -1):
        out = flash.flash_attn_func(q, k, v, softmax_scale=scale, causal=is_causal, block_sparse_tensors=sparse, **more)
    # Some releases return (output, log-sum-exp), others the output alone.
    out, lse = out if isinstance(out, tuple) else (out, None)
    return out, lse if with_lse else q.new_empty(0, dtype=torch.float32)


@_attend.register_fake
def _(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    lse = (q.shape[0], q.shape[2], q.shape[1]) if args[-1] else (0,)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(lse, dtype=torch.float32)


register(Backend("flash", _missing, _declines, run, run_with_lse=run_with_lse))
