"""Backend `triton`: block-sparse attention kernels for GPUs, also run by Triton's interpreter on CPU tensors.

Native precision computes both products in the inputs' own type (fp32 in IEEE arithmetic), "int8_bf16" quantises Q and
K to 8 bits, "int8_fp8" P and V too. PV skip is judged per block of the mask and needs tiles of that size; where these
do not fit on the GPU or cost more than they save (``pv_skip_left_out``) it is left out, which only lowers the error.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from .. import replay
from ..block_mask import BlockMask
from ..call import Call
from ..kernels import config
from .base import Backend, register

PRECISIONS = ("native", "int8_bf16", "int8_fp8")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_DIM = 256
_MIN_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_INSTALLED = importlib.util.find_spec("triton") is not None


def _missing() -> str | None:
    if not _INSTALLED:
        return "Triton is not installed (it comes with PyTorch's CUDA builds for Linux; `pip install triton`)"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return None


def _declines(call: Call) -> str | None:
    if call.q.device.type != "cuda" and not _interpreted():
        return f"its kernels run on CUDA tensors, these are on {call.q.device}"
    if config.capability(call.q.device) < _MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or higher"
    if call.precision not in PRECISIONS:
        return f"precision {call.precision!r} is not among {PRECISIONS}"
    if call.precision == "int8_fp8" and config.capability(call.q.device) < _FP8_CAPABILITY:
        return "precision 'int8_fp8' needs a GPU of compute capability 8.9 or higher"
    if call.q.dtype not in _DTYPES:
        return f"it computes in fp16, bf16 and fp32, not in {call.q.dtype}"
    if call.q.shape[-1] > _MAX_DIM:
        return f"head dim {call.q.shape[-1]} is above {_MAX_DIM}"
    if call.attn_mask is not None and call.attn_mask.dim() != 2:
        return "of attention masks it takes key padding [B, Lk] only, no 4-D mask"
    return None


def cannot_skip(call: Call) -> str | None:
    """Why the kernels cannot carry out PV skip for a call, else None."""
    if call.blocks is None:
        return "there is no block mask"
    from ..kernels import launch

    if launch.whole_block_config(call.q, call.blocks, call.precision) is None:
        return f"tiles of {call.blocks[0]} x {call.blocks[1]} at head dim {call.q.shape[-1]} do not fit on this GPU"
    return None


def pv_skip_left_out(call: Call) -> str | None:
    """Why PV skip is not carried out for a call that asks for it, else None."""
    why = None if call.pv_threshold is None else cannot_skip(call)
    if call.pv_threshold is None or why is not None:
        return why
    from ..kernels import launch

    kind, dim = launch.kind_of(call.q, call.precision), call.q.shape[-1]
    if not config.skip_pays(kind, launch.padded_dim(dim, kind in ("int8", "fp8")), config.capability(call.q.device)):
        return f"at head dim {dim} it costs more time than it saves on this GPU"
    return None


def run(call: Call, out: Tensor | None = None, *, anyway: bool = False) -> Tensor:
    """Compute the call.

    Args:
        out: where to write, shaped like q; a new tensor by default.
        anyway: carry out PV skip also where it costs more time than it saves.
    """
    threshold = None if (cannot_skip(call) if anyway else pv_skip_left_out(call)) else call.pv_threshold
    if threshold is not None:
        threshold = threshold.to(call.q.device, torch.float32).contiguous()
    call = call.replace(pv_threshold=threshold)
    return _traced(call, False)[0] if torch.compiler.is_compiling() else _compute(call, out)


def _traced(call: Call, with_lse: bool) -> tuple[Tensor, Tensor]:
    mask, keys, values = call.mask, call.keys or (None,) * 3, call.values or (None,) * 2
    return _triton_op(
        call.q, call.k, call.v, mask.counts if mask else None, mask.indices if mask else None,
        mask.block_q if mask else 0, mask.block_k if mask else 0, call.key_mask, call.pv_threshold, *keys, *values,
        call.scale, call.is_causal, call.window, call.precision, with_lse,
    )  # fmt: skip


def _compute(call: Call, out: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    from ..kernels.launch import Keys, Values, sparse_attention_fwd

    return sparse_attention_fwd(
        call.q, call.k, call.v, call.mask, scale=call.scale, is_causal=call.is_causal, window=call.window,
        key_mask=call.key_mask, pv_threshold=call.pv_threshold, precision=call.precision,
        keys=None if call.keys is None else Keys(*call.keys),
        values=None if call.values is None else Values(*call.values), out=out, lse=lse,
    )  # fmt: skip


def run_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and the natural log of the sum of the exponentials, float32 ``[B, Hq, Lq]``."""
    call = call.replace(pv_threshold=None)
    if torch.compiler.is_compiling():
        return _traced(call, True)
    lse = torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device)
    return _compute(call, lse=lse), lse


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, over the kept blocks; the same bits every time."""
    from ..kernels.backward_launch import sparse_attention_bwd

    assert call.mask is not None
    return sparse_attention_bwd(
        call.q, call.k, call.v, call.mask, out, lse, grad_out, grad_lse,
        scale=call.scale, is_causal=call.is_causal, window=call.window, key_mask=call.key_mask,
    )  # fmt: skip


@torch.library.custom_op("spas_attn::triton_attention", mutates_args=())
@replay.replayed
def _triton_op(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None, indices: Tensor | None, block_q: int, block_k: int,
    key_mask: Tensor | None, pv_threshold: Tensor | None, k_int8: Tensor | None, k_scale: Tensor | None,
    k_mean: Tensor | None, v_fp8: Tensor | None, v_scale: Tensor | None, scale: float, is_causal: bool,
    window: int | None, precision: str, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernels as one operator, which torch.compile does not look into; an empty log-sum-exp unless asked for."""
    mask = None
    if counts is not None and indices is not None:
        mask = BlockMask(counts, indices, block_q, block_k, q.shape[2], k.shape[2], trusted=True)
    keys = tuple(x for x in (k_int8, k_scale, k_mean) if x is not None)
    values = tuple(x for x in (v_fp8, v_scale) if x is not None)
    call = Call(
        q, k, v, is_causal, scale, key_mask, window, mask=mask, pv_threshold=pv_threshold, precision=precision,
        keys=keys or None, values=values or None,
    )  # fmt: skip
    lse = torch.empty(q.shape[:3] if with_lse else (0,), dtype=torch.float32, device=q.device)
    return _compute(call, lse=lse if with_lse else None), lse


@_triton_op.register_fake
def _triton_shape(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3] if others[-1] else (0,), dtype=torch.float32)


register(
    Backend(
        "triton",
        _missing,
        _declines,
        run,
        skips_pv=True,
        takes_keys=True,
        run_with_lse=run_with_lse,
        pv_skip_left_out=pv_skip_left_out,
        replays=True,
        backward=backward,
    )
)
