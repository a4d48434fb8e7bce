"""What the benchmarks compare: this library by backend and precision, and the attention that others provide."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace

import torch
from attention import AttentionSetup
from registry import PROVIDERS, Declined, Provider, Runs, Setup
from torch import Tensor
from torch.nn.attention import SDPBackend

from spas_attn import backends
from spas_attn.backends import flex


def _single_call(setup: Setup) -> AttentionSetup:
    if not isinstance(setup, AttentionSetup):
        raise Declined("it is compared on single attention calls only")
    return setup


def _dense(setup: Setup, backend: str) -> Runs:
    """A dense backend of this library."""
    call, chosen = _single_call(setup).call(None), backends.get(backend)
    declined = chosen.declines(call)
    if declined is not None:
        raise Declined(declined)

    def total() -> Tensor:
        return chosen.run(call)

    return Runs(total, {"ms_total": total})


def _flex(setup: Setup) -> Runs:
    single = _single_call(setup)
    call, block_mask = single.call(single.mask), flex.flex_mask(single.mask, single.case.is_causal)

    def kernel() -> Tensor:
        return flex.attend(call, block_mask)

    return Runs(kernel, {"ms_kernel": kernel})


def _spargeattn_missing() -> str | None:
    return None if importlib.util.find_spec("spas_sage_attn") else "spas_sage_attn is not installed"


def _spargeattn(setup: Setup) -> Runs:
    """The original: its output is checked with our mask in its block size, the whole call with its own selection."""
    import spas_sage_attn

    single = _single_call(setup)
    q, k, v, length = single.q, single.k, single.v, single.case.length
    if single.case.is_causal:
        raise Declined("it does not mask single tokens on the diagonal: not exact under causality")
    if single.case.dim not in (64, 128):
        raise Declined(f"it serves head dims 64 and 128, not {single.case.dim}")
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    finer = (2, 1) if hopper else (1, 2)  # its blocks are 64 x 128 on Hopper, 128 x 64 elsewhere
    kept = single.mask.to_dense().repeat_interleave(finer[0], 2).repeat_interleave(finer[1], 3)
    grid = [-(-length // (128 // factor)) for factor in finer]
    kept = kept[:, :, : grid[0], : grid[1]].contiguous()

    def given() -> Tensor:
        return spas_sage_attn.block_sparse_sage2_attn_cuda(q, k, v, mask_id=kept, pvthreshd=1e6)

    def total() -> Tensor:
        return spas_sage_attn.spas_sage2_attn_meansim_topk_cuda(
            q, k, v, simthreshd1=-1.0, topk=single.density, pvthreshd=1e6, is_causal=False
        )

    return Runs(given, {"ms_total": total})


def _cudnn_missing() -> str | None:
    return None if importlib.util.find_spec("cudnn") else "nvidia-cudnn-frontend is not installed"


def _cudnn_fp8(setup: Setup) -> Runs:
    from cudnn_fp8 import Fp8Attention

    single = _single_call(setup)
    if single.case.window is not None or single.q.dtype != torch.bfloat16:
        raise Declined("it is compared in bf16 and without windows only")
    scale = single.case.dim**-0.5
    made = Fp8Attention(single.q, single.k, single.v, is_causal=single.case.is_causal, scale=scale)
    return Runs(made.total, {"ms_total": made.total, "ms_quant": made.quantise, "ms_kernel": made.kernel})


def _library(backend: str, device: str, precision: str = "native") -> Provider:
    def make(setup: Setup) -> Runs:
        return setup.ours(backend, precision)

    return Provider(f"spas_attn {backend}", device, make, precision, backends.get(backend).missing)


def _auto(precision: str) -> Provider:
    """What users get: this library, or exact dense attention where the cost model expects it to be faster."""

    def make(setup: Setup) -> Runs:
        return replace(setup.ours("auto", precision), dense=_single_call(setup).dense_by_choice(precision) is not None)

    return Provider("spas_attn auto", "cuda", make, precision, backends.get("triton").missing)


def _torch(name: str, device: str, kernel: SDPBackend | None, last_resort: bool = False) -> Provider:
    def make(setup: Setup) -> Runs:
        return setup.sdpa(kernel)

    return Provider(name, device, make, dense=True, last_resort=last_resort)


def _wrapped(name: str, backend: str, precision: str = "native", limit: float | None = None) -> Provider:
    make, missing = functools.partial(_dense, backend=backend), backends.get(backend).missing
    return Provider(name, "cuda", make, precision, missing, dense=True, limit=limit)


# By the name on the command line. Limits of packages that are not ours are a third higher.
PROVIDERS.update({
    "sdpa-cudnn": _torch("SDPA cuDNN", "cuda", SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": _torch("SDPA flash", "cuda", SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": _torch("SDPA efficient", "cuda", SDPBackend.EFFICIENT_ATTENTION, last_resort=True),
    "fa4": _wrapped("flash-attn-4", "flash"),
    "cudnn-fp8": Provider("cuDNN", "cuda", _cudnn_fp8, "fp8", _cudnn_missing, dense=True, limit=0.1),
    "sage": _wrapped("sageattention", "sage", "int8", 0.05),
    "triton": _library("triton", "cuda"),
    "triton-int8_bf16": _library("triton", "cuda", "int8_bf16"),
    "triton-int8_fp8": _library("triton", "cuda", "int8_fp8"),
    "auto": _auto("native"),
    "auto-int8_fp8": _auto("int8_fp8"),
    "flash": _library("flash", "cuda"),
    "cudnn": _library("cudnn", "cuda"),
    "flex": Provider("FlexAttention", "cuda", _flex),
    "spargeattn": Provider("SpargeAttn", "cuda", _spargeattn, "int8_fp8", _spargeattn_missing, limit=0.06),
    "cpu-sdpa": _torch("SDPA", "cpu", None),
    "cpu": _library("cpu", "cpu"),
    "cpu-flex": Provider("FlexAttention", "cpu", _flex),
})  # fmt: skip
