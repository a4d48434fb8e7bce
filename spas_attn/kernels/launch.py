"""Launching the forward kernel: 8-bit preparation where none was made, tiles, and how K and V are loaded."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..block_mask import BlockMask, cdiv
from . import config as configs
from .forward import sparse_attention_fwd_kernel
from .operands import Blocks, Keys, Rows, Valid, Values
from .padding import whole_tiles
from .prepare import LOG2E, as_bytes, prepare
from .prepare import padded_dim as padded_dim_8_bits
from .recorded import launch

_CACHE = 24 << 20  # bytes of the second-level cache that K and V of the heads under way may take
KINDS = {"int8_fp8": "fp8", "int8_bf16": "int8"}  # other precisions compute in the inputs' own type


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


def choose_config(q: Tensor, blocks: tuple[int, int] | None, precision: str) -> configs.Config:
    """The configuration of a launch without PV skip, whose tiles divide ``blocks``."""
    kind = kind_of(q, precision)
    dim = padded_dim(q.shape[-1], kind in ("int8", "fp8"))
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
    values: Values | None = None,
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
        keys: K in int8 with one scale per key block of the mask, from ``prepare`` or a selection.
        values: V in fp8, likewise.
        out: where to write, shaped like q.
        lse: float32 ``[B, Hq, Lq]``, contiguous: where to write the natural log of the sum of the exponentials (-inf
            for a query that sees nothing).
        config: tiles; chosen from the table by default.
    """
    out = torch.empty_like(q) if out is None else out
    if out.numel() == 0:
        return out
    blocks = (mask.block_q, mask.block_k) if mask else None
    whole = whole_block_config(q, blocks, precision) if blocks and config is None and pv_threshold is not None else None
    config = config or whole or choose_config(q, blocks, precision)
    pv_threshold = pv_threshold if whole else None  # left out where it cannot be judged
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        valid = as_bytes(key_mask)
        if precision not in KINDS:
            keys = values = None
        else:
            v_wanted = v if precision == "int8_fp8" and values is None else None
            if keys is None or v_wanted is not None:
                block_k, k_wanted = blocks[1] if blocks else config.block_n, k if keys is None else None
                made = prepare(k=k_wanted, v=v_wanted, block_k=block_k, int8=True, valid=valid)
                keys, values = keys or made.keys, values or made.values
        _launch(q, k, v, mask, scale, is_causal, window, valid, pv_threshold, keys, values, out, lse, config)
    return out


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, scale: float, is_causal: bool, window: int | None,
    valid: Tensor | None, pv_threshold: Tensor | None, keys: Keys | None, values: Values | None,
    out: Tensor, lse: Tensor | None, config: configs.Config,
) -> None:  # fmt: skip
    (batch, heads, q_len, d), k_len = q.shape, k.shape[2]
    dim, block_n = padded_dim(d, keys is not None), config.block_n
    if keys is not None:
        if d % 16:
            # Seen with Triton 3.6 on an H200: rows that do not end at a multiple of 16 elements are quantised to zeros.
            q = torch.nn.functional.pad(q, (0, dim - d))
        v = v.to(torch.bfloat16) if v.dtype == torch.float32 else v
    k_data = keys.int8 if keys else k
    v_data, v_tile = (values[0], (dim, block_n)) if values else (v, (block_n, dim))  # fp8 lies transposed
    k_desc, v_desc, k_rows, v_rows = descriptor(k_data, (block_n, dim)), descriptor(v_data, v_tile), None, None
    if k_desc is None or v_desc is None:
        k_desc = v_desc = None
        k_rows, v_rows = Rows.of(k_data), Rows.of(v_data.transpose(-1, -2) if values else v_data)
    mask_q, mask_k = (mask.block_q, mask.block_k) if mask else (config.block_m, block_n)
    together = heads_together(k_data, v_data, heads) if is_causal else 1
    options = {"maxnreg": config.registers} if config.registers and q.is_cuda else {}
    launch(
        sparse_attention_fwd_kernel, (cdiv(q_len, config.block_m) * batch * heads,),
        Rows.of(q), k_rows, v_rows, Rows.of(out), lse, k_desc, v_desc,
        keys.scale if keys else None, keys.mean if keys and lse is not None else None, values[1] if values else None,
        block_lists(mask, batch, heads) if mask else None, Valid.of(valid),
        whole_tiles(valid, block_n), pv_threshold,
        heads, heads // k.shape[1], together, q_len, k_len, window if is_causal else None, scale * LOG2E,
        D=d, DPAD=dim, BLOCK_M=config.block_m, BLOCK_N=block_n, MASK_Q=mask_q, MASK_K=mask_k,
        CAUSAL=is_causal, RAGGED=k_len % mask_k != 0,
        num_warps=config.num_warps, num_stages=config.num_stages, **options,
    )  # fmt: skip


def heads_together(k: Tensor, v: Tensor, heads: int) -> int:
    """How many heads run side by side under causality: as many as keep their K and V in the second-level cache.

    One head after the other would leave the long rows of the last one to the end, when most of the GPU is idle.
    """
    size = sum(x[0, 0].numel() * x.element_size() for x in (k, v))  # bytes of a KV head
    fit = max(1, _CACHE // max(1, size)) * (heads // k.shape[1])
    return next(n for n in range(min(heads, fit), 0, -1) if heads % n == 0)


def block_lists(mask: BlockMask, batch: int, heads: int) -> Blocks:
    """The mask's lists for every sequence and head, without a copy of lists that several share."""
    indices = mask.indices.expand(batch, heads, -1, -1)
    counts = mask.counts.expand(batch, heads, -1)
    counts, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (counts, indices))
    return Blocks(counts, counts.stride(0), counts.stride(1), indices, *indices.stride()[:3])


def descriptor(x: Tensor, tile: tuple[int, int]) -> TensorDescriptor | None:
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
