"""Backend `sage`: the optional package sageattention: dense attention with int8 Q·K, whatever ``precision`` says.

Releases 1.x (PyPI; Triton) and 2.x (built from source; CUDA, Triton on compute capability 8.6) share one function. 1.x
subtracts the mean from the caller's K in place, and the Triton kernels of both leave the tail keys of a ragged last
block unmasked unless the call is causal.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..call import Call
from .base import Backend, missing_package, register

KEY_BLOCK = 64  # keys per block of the Triton kernels
_DTYPES = (torch.float16, torch.bfloat16)
_DIMS_1 = (64, 96, 128)
_MAX_DIM_2 = 128
_CAPABILITIES_2 = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1))
_TRITON_CAPABILITIES_2 = ((8, 6),)


def _function() -> Callable[..., Tensor]:
    import sageattention

    function: Callable[..., Tensor] = sageattention.sageattn
    return function


@functools.cache
def _major() -> int:
    """Major version of the package; what does not tell counts as 1, the release with the traps."""
    try:
        return int(importlib.metadata.version("sageattention").split(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 1


def _missing() -> str | None:
    return missing_package("sageattention", "sageattention")


def _declines(call: Call) -> str | None:
    if call.blocks is not None:
        return "it is dense and takes no block mask"
    if call.attn_mask is not None:
        return "it takes no attention mask"
    if call.window is not None:
        return "it has no sliding window"
    if call.is_causal and call.q.shape[2] != call.k.shape[2]:
        return f"causal calls need as many queries as keys, not {call.q.shape[2]} and {call.k.shape[2]}"
    if call.q.dtype not in _DTYPES:
        return f"it computes in fp16 and bf16, not in {call.q.dtype}"
    if not math.isclose(call.scale, call.q.shape[-1] ** -0.5) and not _takes_scale():
        return f"the installed sageattention takes no scale, and {call.scale} is not 1 / sqrt(head dim)"
    return _declines_shape(call)


def _declines_shape(call: Call) -> str | None:
    """Reasons that lie in the device, the head dim or the length, and depend on the release."""
    if call.q.device.type != "cuda":
        return f"its kernels run on CUDA tensors, these are on {call.q.device}"
    dim, k_len, major = call.q.shape[-1], call.k.shape[2], _major()
    capability = torch.cuda.get_device_capability(call.q.device)
    if major < 2 and dim not in _DIMS_1:
        return f"sageattention 1.x serves head dims {_DIMS_1}, not {dim}"
    if major >= 2 and dim > _MAX_DIM_2:
        return f"sageattention 2.x serves head dims up to {_MAX_DIM_2}, not {dim}"
    if major >= 2 and capability not in _CAPABILITIES_2:
        return f"sageattention 2.x has no kernel for compute capability {capability[0]}.{capability[1]}"
    triton_kernel = major < 2 or capability in _TRITON_CAPABILITIES_2
    if triton_kernel and not call.is_causal and k_len % KEY_BLOCK:
        return (
            f"its kernel does not mask the tail keys of the last block: {k_len} keys are no multiple of {KEY_BLOCK}, "
            "and the call is not causal"
        )
    return None


def _takes_scale() -> bool:
    return "sm_scale" in inspect.signature(_function()).parameters


def run(call: Call) -> Tensor:
    """Dense attention by ``sageattn``."""
    # The package wants rows that lie in one piece, and 1.x writes into K.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    if _major() < 2 and k.data_ptr() == call.k.data_ptr():
        k = k.clone()
    options = {"sm_scale": call.scale} if _takes_scale() else {}
    with torch.cuda.device(call.q.device if call.q.is_cuda else -1):
        return _function()(q, k, v, tensor_layout="HND", is_causal=call.is_causal, **options)


register(Backend("sage", _missing, _declines, run, skips_blocks=False))
