"""Backend `triton`: block-sparse attention kernels for GPUs, also run by Triton's interpreter on CPU tensors.

Precision "bf16" computes both products in the inputs' own type (fp32 in IEEE arithmetic), "int8_bf16" quantises Q and
K. PV skip is judged per block of the mask and needs tiles of that size; where they do not fit on the GPU
(``pv_skip_left_out``) it is left out, which only lowers the error.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from .base import Backend, Call, register

PRECISIONS = ("bf16", "int8_bf16")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_DIM = 256
_MIN_CAPABILITY = (8, 0)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _missing() -> str | None:
    if not _installed():
        return "Triton is not installed (it comes with PyTorch's CUDA builds for Linux; `pip install triton`)"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA GPU (TRITON_INTERPRET=1 runs the kernels on a processor, slowly)"
    return None


def _declines(call: Call) -> str | None:
    if call.q.device.type != "cuda" and not _interpreted():
        return f"its kernels run on CUDA tensors, these are on {call.q.device}"
    if call.q.is_cuda and torch.cuda.get_device_capability(call.q.device) < _MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or higher"
    if call.precision not in PRECISIONS:
        return f"precision {call.precision!r} is not among {PRECISIONS}"
    if call.q.dtype not in _DTYPES:
        return f"it computes in fp16, bf16 and fp32, not in {call.q.dtype}"
    if call.q.shape[-1] > _MAX_DIM:
        return f"head dim {call.q.shape[-1]} is above {_MAX_DIM}"
    if call.attn_mask is not None and call.attn_mask.dim() != 2:
        return "of attention masks it takes key padding [B, Lk] only, no 4-D mask"
    if call.mask is not None and call.mask.cu_seqlens_q is not None:
        return "packed sequences have to come one by one"
    if not call.scale > 0:
        return f"scale has to be positive, not {call.scale}"
    return None


def pv_skip_left_out(call: Call) -> str | None:
    """Why PV skip is not carried out for a call that asks for it, else None."""
    if call.pv_threshold is None:
        return None
    if call.mask is None:
        return "there is no block mask"
    from ..kernels.forward import whole_block_config

    if whole_block_config(call.q, call.mask, call.precision == "int8_bf16") is None:
        shape = f"{call.mask.block_q} x {call.mask.block_k}"
        return f"tiles of {shape} at head dim {call.q.shape[-1]} do not fit on this GPU"
    return None


def run(call: Call, out: Tensor | None = None) -> Tensor:
    """Compute the call; ``out`` is where to write, shaped like q (a new tensor by default)."""
    from ..kernels.forward import sparse_attention_fwd

    threshold = call.pv_threshold
    if threshold is not None:
        threshold = threshold.to(call.q.device, torch.float32).contiguous()
    return sparse_attention_fwd(
        call.q,
        call.k,
        call.v,
        call.mask,
        scale=call.scale,
        is_causal=call.is_causal,
        window=call.window,
        key_mask=call.key_mask,
        pv_threshold=threshold,
        int8=call.precision == "int8_bf16",
        out=out,
    )


register(Backend("triton", _missing, _declines, run, skips_pv=True, pv_skip_left_out=pv_skip_left_out))
