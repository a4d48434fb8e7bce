"""Launching the forward kernel: 8-bit preparation where none was made, tiles, and how K and V are loaded."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..block_mask import BlockMask, cdiv
from . import config as configs
from .arithmetic import INTERPRETED
from .forward import sparse_attention_fwd_kernel
from .prepare import LOG2E, as_bytes, key_sums, prepare, prepare_v
from .prepare import padded_dim as padded_dim_8_bits

KINDS = {"int8_fp8": "fp8", "int8_bf16": "int8"}  # other precisions compute in the inputs' own type


class Keys(NamedTuple):
    """K in 8 bits.

    Attributes:
        int8: ``[B, Hkv, Lk, dim]``, smoothed; scale: float32 ``[B, Hkv, key blocks]``.
        total, number: float32 ``[B * Hkv, 1, dim]`` and ``[B * Hkv, 1]``: a sum of keys and how many: what was smoothed
            away is their mean.
    """

    int8: Tensor
    scale: Tensor
    total: Tensor
    number: Tensor

    def mean(self) -> Tensor:
        """What was subtracted from every key, float32 ``[B * Hkv, dim]``."""
        return self.total[:, 0] / self.number.clamp(min=1)


def prepare_k(k: Tensor, block: int, dim: int, *, valid: Tensor | None = None) -> Keys:
    """K to int8, one scale for every ``block`` keys, for calls whose mask is given."""
    sums = key_sums(k, dim, valid, exact=False)
    side = prepare(k, dim, tile=block, sums=sums, valid=valid)
    assert side.int8 is not None
    assert side.scale is not None
    return Keys(side.int8, side.scale, *sums)


def kind_of(q: Tensor, precision: str) -> str:
    """What the kernel holds its operands in, as the configuration table calls it."""
    return KINDS.get(precision) or ("float" if q.dtype == torch.float32 else "half")


def padded_dim(dim: int, int8: bool) -> int:
    """Head dim as the kernels hold it: a power of two, at least what the matrix units take."""
    return padded_dim_8_bits(dim) if int8 else max(16, triton.next_power_of_2(dim))


def whole_block_config(q: Tensor, blocks: tuple[int, int], precision: str) -> configs.Config | None:
    """The configuration that judges PV skip per block of (block_q, block_k), or None where such tiles do not fit."""
    kind = kind_of(q, precision)
    dim = padded_dim(q.shape[-1], kind in ("int8", "fp8"))
    return configs.choose_whole_blocks(kind, dim, configs.shared_memory_limit(q.device), blocks)


def choose_config(q: Tensor, mask: BlockMask | None, precision: str) -> configs.Config:
    """The configuration of a launch without PV skip."""
    kind = kind_of(q, precision)
    dim = padded_dim(q.shape[-1], kind in ("int8", "fp8"))
    blocks = None if mask is None else (mask.block_q, mask.block_k)
    return configs.choose(kind, dim, configs.shared_memory_limit(q.device), blocks, configs.capability(q.device))


def sparse_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    pv_threshold: Tensor | None = None,
    precision: str = "native",
    keys: Keys | None = None,
    values: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """Launch the forward kernel, and before it what 8-bit precisions need and the caller has not made yet.

    Args:
        q: ``[B, Hq, Lq, D]``; k, v ``[B, Hkv, Lk, D]``, any strides; fp16, bf16 or fp32.
        mask: the blocks to compute, None for all.
        scale: positive factor on q·k.
        is_causal: lower-right aligned.
        window: with causality, a query sees its last ``window`` keys.
        key_mask: bool ``[B, Lk]``, True = attend.
        pv_threshold: float32 ``[Hq]``, log2 units; only with a mask whose blocks fit (``whole_block_config``).
        precision: "native" (the inputs' own type), "int8_bf16" or "int8_fp8". In 8 bits K is smoothed by a mean over
            keys: under causality a later token reaches earlier outputs through that and the scales, within the
            quantisation error.
        keys: K in int8 with one scale per key block of the mask, from ``prepare_k`` or a selection.
        values: V in fp8 and its scales, from ``prepare_v``.
        out: where to write, shaped like q.
        lse: float32 ``[B, Hq, Lq]``, contiguous: where to write the natural log of the sum of the exponentials (-inf
            for a query that sees nothing).
        config: tiles; chosen from the table by default.
    """
    out = torch.empty_like(q) if out is None else out
    if out.numel() == 0:
        return out
    skip = pv_threshold is not None and mask is not None and config is None
    if skip and mask is not None:
        config = whole_block_config(q, (mask.block_q, mask.block_k), precision)
        skip = config is not None
    config = config or choose_config(q, mask, precision)
    threshold = pv_threshold if skip else None
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        valid = None if key_mask is None else as_bytes(key_mask)
        if precision in KINDS:
            dim, block = padded_dim(q.shape[-1], True), config.block_n if mask is None else mask.block_k
            keys = keys or prepare_k(k, block, dim, valid=valid)
            if precision == "int8_fp8":
                values = values or prepare_v(v, dim, valid=valid)
        else:
            keys = values = None
        _launch(q, k, v, mask, scale, is_causal, window, valid, threshold, keys, values, out, lse, config)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    scale: float,
    is_causal: bool,
    window: int | None,
    valid: Tensor | None,
    pv_threshold: Tensor | None,
    keys: Keys | None,
    values: tuple[Tensor, Tensor] | None,
    out: Tensor,
    lse: Tensor | None,
    config: configs.Config,
) -> None:
    (batch, heads, q_len, d), k_len = q.shape, k.shape[2]
    dim, group = padded_dim(d, keys is not None), heads // k.shape[1]
    if keys is not None:
        k = keys.int8
        if d % 16:
            # Seen with Triton 3.6 on an H200: rows that do not end at a multiple of 16 elements are quantised to zeros.
            q = torch.nn.functional.pad(q, (0, dim - d))
        v = v.to(torch.bfloat16) if v.dtype == torch.float32 else v
    if values is not None:
        v = values[0].transpose(-1, -2)
    counts = indices = q
    if mask is not None:
        counts = mask.counts.expand(batch, heads, -1).contiguous()
        indices = mask.indices.expand(batch, heads, -1, -1)
        indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    block_n = config.block_n
    k_tile = _tiles(k, (block_n, dim))
    v_tile = _tiles(v if values is None else values[0], (block_n, dim) if values is None else (dim, block_n))
    tma = k_tile is not None and v_tile is not None
    options = {"maxnreg": config.registers} if config.registers and q.is_cuda else {}
    mask_k = mask.block_k if mask else block_n
    # fmt: off
    sparse_attention_fwd_kernel[(cdiv(q_len, config.block_m) * batch * heads,)](
        q, k_tile if tma else k, v_tile if tma else v, out, q if lse is None else lse,
        q if keys is None else keys.scale, q if keys is None or lse is None else keys.mean(),
        q if values is None else values[1], counts, indices,
        q if valid is None else valid, q if valid is None else _tile_valid(valid, block_n),
        q if pv_threshold is None else pv_threshold,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        *counts.stride()[:2], *indices.stride()[:3], *((0, 0) if valid is None else valid.stride()),
        heads, group, q_len, k_len, window or 0, scale * LOG2E,
        D=d, Q_D=q.shape[-1], QK_D=dim if keys else d, V_D=dim if values else d, DPAD=dim, BLOCK_M=config.block_m,
        BLOCK_N=block_n, MASK_Q=mask.block_q if mask else config.block_m, MASK_K=mask_k,
        SPARSE=mask is not None, CAUSAL=is_causal, WINDOW=is_causal and window is not None,
        PADDING=valid is not None, RAGGED=k_len % mask_k != 0, INT8=keys is not None, FP8=values is not None,
        SKIP=pv_threshold is not None, WITH_LSE=lse is not None, TMA=tma, INTERPRET=INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages, **options,
    )
    # fmt: on


def _tiles(x: Tensor, tile: tuple[int, int]) -> TensorDescriptor | None:
    """A descriptor with which the copy engine of Hopper and later loads tiles of ``x``; None where it cannot.

    It wants addresses and strides of whole 16 bytes and the last dimension dense.
    """
    if not x.is_cuda or configs.capability(x.device) < (9, 0):
        return None
    size = x.element_size()
    strides = list(x.stride())
    for dim in range(3):
        if x.shape[dim] == 1:
            strides[dim] = max(16, x.shape[3])  # never stepped along, but checked
    if strides[3] != 1 or x.data_ptr() % 16 or any(s <= 0 or s * size % 16 for s in strides[:3]):
        return None
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, *tile])


def _tile_valid(valid: Tensor, block: int) -> Tensor:
    """uint8 ``[B, ceil(Lk / block)]``: 1 where all keys of the tile may be attended to."""
    padded: Any = torch.nn.functional.pad(valid, (0, -valid.shape[1] % block))
    return padded.unflatten(1, (-1, block)).amin(-1)
