"""Backend `flashinfer`: the optional package flashinfer: dense and exact, one sequence of the batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call
from .base import Backend, declines_8_bits, missing_package, register

_DTYPES = (torch.float16, torch.bfloat16)
_DIMS = (64, 128, 256)
_MIN_CAPABILITY = (8, 0)


def _missing() -> str | None:
    return missing_package("flashinfer", "flashinfer-python")


def _declines(call: Call) -> str | None:
    if call.blocks is not None:
        return "it is dense and takes no block mask"
    if call.q.device.type != "cuda":
        return f"its kernels run on CUDA tensors, these are on {call.q.device}"
    capability = torch.cuda.get_device_capability(call.q.device)
    if capability < _MIN_CAPABILITY:
        return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if call.q.dtype not in _DTYPES:
        return f"it computes in fp16 and bf16, not in {call.q.dtype}"
    if call.q.shape[-1] not in _DIMS:
        return f"it serves head dims {_DIMS}, not {call.q.shape[-1]}"
    if call.attn_mask is not None and call.attn_mask.dim() == 4 and call.attn_mask.shape[1] > 1:
        return "it takes one mask for all heads"
    return declines_8_bits(call)


def run(call: Call) -> Tensor:
    """Dense attention by ``single_prefill_with_kv_cache``; what is more than causality becomes a mask of tokens."""
    import flashinfer

    plain = call.attn_mask is None and call.window is None and call.document_start is None
    mask = None if plain else call.token_mask(0, call.q_len)
    outs = []
    with torch.cuda.device(call.q.device if call.q.is_cuda else -1):
        for item in range(call.q.shape[0]):
            q, k, v = (x[item].transpose(0, 1).contiguous() for x in (call.q, call.k, call.v))
            seen = None if mask is None else mask[item if mask.shape[0] > 1 else 0, 0].expand(call.q_len, -1)
            # With a mask the package does not look at `causal`: the mask holds that too.
            out = flashinfer.single_prefill_with_kv_cache(
                q,
                k,
                v,
                custom_mask=None if seen is None else seen.contiguous(),
                causal=call.is_causal and seen is None,
                kv_layout="NHD",
                sm_scale=call.scale,
            )
            if seen is not None:  # a query that sees nothing gives 0
                out = torch.where(seen.any(-1)[:, None, None], out, out.new_zeros(()))
            outs.append(out.transpose(0, 1))
    return torch.stack(outs)


register(Backend("flashinfer", _missing, _declines, run, skips_blocks=False))
