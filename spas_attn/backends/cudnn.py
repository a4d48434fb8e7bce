"""Backend `cudnn`: the block-sparse kernels of nvidia-cudnn-frontend for Hopper; fp16 and bf16, not causal, exact.

An optional dependency: ``pip install nvidia-cudnn-frontend``. What is declined here follows its 1.32: masks of 64 x 64
or 128 x 128, head dims 64, 96 and 128, lengths of whole query blocks, no causality, no token masks. Its 8-bit kernels
want as many key blocks in every row of the mask, which selections by mass do not give, so they are not used.
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

_MODULE = "cudnn.block_sparse_attention"
_DTYPES = (torch.float16, torch.bfloat16)
_DIMS = (64, 96, 128)
_SIZES = ((64, 64), (128, 128))


@functools.cache
def _module() -> Any:
    return importlib.import_module(_MODULE)


@constant_when_traced
@functools.cache
def _import_problem() -> str | None:
    """Why the package cannot be used, or None; importing it takes seconds, once."""
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed (pip install nvidia-cudnn-frontend)"
    try:
        _ = _module().block_sparse_attention_forward
    except (ImportError, AttributeError, OSError) as error:  # an older release, or no cuDNN beside it
        return f"nvidia-cudnn-frontend has no block-sparse attention here: {error}"
    return None


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return _import_problem()


def _declines(call: Call) -> str | None:
    if call.blocks is None:
        return "it computes block masks; there is none"
    if call.q.device.type != "cuda":
        return f"its kernels run on CUDA tensors, these are on {call.q.device}"
    capability = torch.cuda.get_device_capability(call.q.device)
    if capability[0] != 9:
        return f"it was tried on Hopper (9.x) only, this GPU has capability {capability[0]}.{capability[1]}"
    if call.q.dtype not in _DTYPES:
        return f"it computes in fp16 and bf16, not in {call.q.dtype}"
    if call.is_causal or call.attn_mask is not None:
        return "it knows no causality, window or padding"
    if call.q.shape[-1] not in _DIMS:
        return f"it serves head dims {_DIMS}, not {call.q.shape[-1]}"
    if call.blocks not in _SIZES:
        return f"it takes blocks of 64 x 64 and 128 x 128, not {call.blocks[0]} x {call.blocks[1]}"
    if call.q_len % call.blocks[0] or call.k_len % call.blocks[1]:
        return f"lengths have to be multiples of {call.blocks[0]}, not {call.q_len} and {call.k_len}"
    return declines_8_bits(call)


def run(call: Call) -> Tensor:
    """Block-sparse attention; PV skip is left out. Nothing is read on the host."""
    return run_with_lse(call)[0]


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the natural log of the sum of the exponentials, float32 ``[B, Hq, Lq]``."""
    mask = call.mask
    assert mask is not None
    lists = (mask.indices.contiguous(), mask.counts.contiguous())
    return _attend(call.q, call.k, call.v, *lists, mask.block_q, call.scale)


# An operator of its own: torch.compile cannot trace the package's launcher.
@torch.library.custom_op("spas_attn::cudnn_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    found = _module().block_sparse_attention_forward(
        q, k, v, indices, q2k_block_nums=counts, sparse_block_size=block, softmax_scale=scale
    )
    return found["o_tensor"], found["lse_tensor"]


@_attend.register_fake
def _(q: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


register(Backend("cudnn", _missing, _declines, run, run_with_lse=run_with_lse))
