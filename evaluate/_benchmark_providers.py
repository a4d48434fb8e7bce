"""What benchmark_attention.py compares: this library per backend and precision, and the attention others provide."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _benchmark_cases import Setup
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spas_attn import BlockMask, backends, sparse_attention
from spas_attn.backends import Call, flex

Function = Callable[[], object]


class Declined(Exception):
    """A provider does not serve a case; the text says why."""


@dataclass(frozen=True)
class Runs:
    """What to run and to time for one setup.

    Attributes:
        output: gives ``[B, Hq, L, D]``, to be compared with float32.
        total: everything from q, k, v to the output; None when the mask is given.
        select, quant, kernel: the parts, as far as they can be called by themselves.
    """

    output: Callable[[], Tensor]
    total: Function | None = None
    select: Function | None = None
    quant: Function | None = None
    kernel: Function | None = None


@dataclass(frozen=True)
class Provider:
    """One way of computing attention.

    Attributes:
        name, precision: as the table shows them.
        device: "cuda" or "cpu".
        limit: largest relative L1 against float32 on random normal inputs; beyond it nothing is timed.
        missing: None when it can run on this machine, else what is missing.
        make: what to run for a setup; raises :class:`Declined`.
        dense: whether it computes all blocks, whatever the mask.
    """

    name: str
    precision: str
    device: str
    limit: float
    missing: Callable[[], str | None]
    make: Callable[[Setup], Runs]
    dense: bool = False


def _ours(setup: Setup, backend: str, precision: str) -> Runs:
    """The whole call, and its parts: selection, quantisation where there is one, and the kernel on what they made."""
    call = setup.call(precision)
    declined = backends.get(backend).declines(call)
    if declined is not None:
        raise Declined(declined)

    def total() -> Tensor:
        return sparse_attention(
            setup.q, setup.k, setup.v, setup.selector, is_causal=setup.case.is_causal, precision=precision,
            backend=backend, strict=True,
        )  # type: ignore[call-overload]  # fmt: skip

    def select() -> BlockMask:
        return setup.selector.select(setup.q, setup.k, is_causal=setup.case.is_causal)

    quant, kernel = _parts(call, backend)
    return Runs(total, total, select, quant, kernel)


def _parts(call: Call, backend: str) -> tuple[Function | None, Function]:
    """Quantisation (None without), and the kernel with everything prepared."""
    if backend != "triton" or call.precision == "bf16":
        return None, lambda: backends.get(backend).run(call)
    from spas_attn.kernels.launch import padded_dim, prepare_k, sparse_attention_fwd
    from spas_attn.kernels.prepare import prepare_v

    mask = call.mask
    assert mask is not None
    dim, fp8 = padded_dim(call.q.shape[-1], True), call.precision == "int8_fp8"

    def quant() -> object:
        return prepare_k(call.k, mask.block_k, dim), prepare_v(call.v, dim) if fp8 else None

    keys, values = prepare_k(call.k, mask.block_k, dim), prepare_v(call.v, dim) if fp8 else None

    def kernel() -> Tensor:
        return sparse_attention_fwd(
            call.q, call.k, call.v, mask, scale=call.scale, is_causal=call.is_causal, precision=call.precision,
            keys=keys, values=values,
        )  # fmt: skip

    return quant, kernel


def _sdpa(setup: Setup, kernel: SDPBackend | None) -> Runs:
    def total() -> Tensor:
        gqa, causal = setup.case.heads != setup.case.k_heads, setup.case.is_causal
        if kernel is None:
            return F.scaled_dot_product_attention(setup.q, setup.k, setup.v, is_causal=causal, enable_gqa=gqa)
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(setup.q, setup.k, setup.v, is_causal=causal, enable_gqa=gqa)

    try:
        total()
    except RuntimeError as error:
        raise Declined(f"SDPA refuses: {error}") from error
    return Runs(total, total)


def _dense(setup: Setup, backend: str) -> Runs:
    """A dense backend of this library."""
    call, chosen = setup.call().replace(mask=None), backends.get(backend)
    declined = chosen.declines(call)
    if declined is not None:
        raise Declined(declined)
    return Runs(lambda: chosen.run(call), lambda: chosen.run(call))


def _flex(setup: Setup) -> Runs:
    call = setup.call()
    block_mask = flex.flex_mask(setup.mask, setup.case.is_causal)
    return Runs(lambda: flex.attend(call, block_mask), kernel=lambda: flex.attend(call, block_mask))


def _spargeattn(setup: Setup) -> Runs:
    """The original: its output is checked with our mask in its block size, the whole call with its own selection."""
    import spas_sage_attn

    if setup.case.is_causal:
        raise Declined("it does not mask single tokens on the diagonal: not exact under causality")
    if setup.case.dim not in (64, 128):
        raise Declined(f"it serves head dims 64 and 128, not {setup.case.dim}")
    hopper = torch.cuda.get_device_capability(setup.q.device)[0] == 9
    finer = (2, 1) if hopper else (1, 2)  # its blocks are 64 x 128 on Hopper, 128 x 64 elsewhere
    kept = setup.mask.to_dense().repeat_interleave(finer[0], 2).repeat_interleave(finer[1], 3)
    grid = [-(-setup.case.length // (128 // factor)) for factor in finer]
    kept = kept[:, :, : grid[0], : grid[1]].contiguous()

    def given() -> Tensor:
        return spas_sage_attn.block_sparse_sage2_attn_cuda(setup.q, setup.k, setup.v, mask_id=kept, pvthreshd=1e6)

    def total() -> Tensor:
        return spas_sage_attn.spas_sage2_attn_meansim_topk_cuda(
            setup.q, setup.k, setup.v, simthreshd1=-1.0, topk=setup.density, pvthreshd=1e6, is_causal=False
        )

    return Runs(given, total)


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA GPU"


def _package(name: str) -> str | None:
    return _no_gpu() or (None if importlib.util.find_spec(name) else f"{name} is not installed")


def _this(name: str, precision: str, limit: float) -> Provider:
    make = functools.partial(_ours, backend=name, precision=precision)
    return Provider(f"spas_attn {name}", precision, "cuda", limit, backends.get(name).missing, make)


# By the name on the command line. The limits are those of the library's tests: bf16 0.003, 8 bits as measured in
# docs/benchmarks; a third more for packages that are not ours.
PROVIDERS = {
    "triton-bf16": _this("triton", "bf16", 0.003),
    "triton-int8_bf16": _this("triton", "int8_bf16", 0.015),
    "triton-int8_fp8": _this("triton", "int8_fp8", 0.042),
    "flash-bf16": _this("flash", "bf16", 0.003),
    "sdpa-flash": Provider(
        "SDPA flash", "bf16", "cuda", 0.003, _no_gpu,
        functools.partial(_sdpa, kernel=SDPBackend.FLASH_ATTENTION), dense=True,
    ),
    "sdpa-cudnn": Provider(
        "SDPA cuDNN", "bf16", "cuda", 0.003, _no_gpu,
        functools.partial(_sdpa, kernel=SDPBackend.CUDNN_ATTENTION), dense=True,
    ),
    "fa4": Provider(
        "flash-attn-4", "bf16", "cuda", 0.003, backends.get("flash").missing,
        functools.partial(_dense, backend="flash"), dense=True,
    ),
    "flex": Provider("FlexAttention", "bf16", "cuda", 0.003, _no_gpu, _flex),
    "sage": Provider(
        "sageattention", "int8", "cuda", 0.05, backends.get("sage").missing,
        functools.partial(_dense, backend="sage"), dense=True,
    ),
    "spargeattn": Provider(
        "SpargeAttn", "int8_fp8", "cuda", 0.06, functools.partial(_package, "spas_sage_attn"), _spargeattn
    ),
    "cpu": Provider(
        "spas_attn cpu", "fp32", "cpu", 1e-5, lambda: None, functools.partial(_ours, backend="cpu", precision="bf16")
    ),
    "cpu-sdpa": Provider("SDPA", "fp32", "cpu", 1e-5, lambda: None, functools.partial(_sdpa, kernel=None), dense=True),
    "cpu-flex": Provider("FlexAttention", "fp32", "cpu", 1e-5, lambda: None, _flex),
}  # fmt: skip
