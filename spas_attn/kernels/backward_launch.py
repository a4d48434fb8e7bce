"""Launching the backward kernels: lists from the keys' side, tiles, and the chunks' workspace."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..block_mask import BlockMask, cdiv
from . import config as configs
from .backward import delta_kernel, dkv_kernel, dq_kernel, sum_kernel
from .config import Config
from .launch import block_lists, descriptor, heads_together, padded_dim
from .operands import Rows, Valid
from .padding import whole_tiles
from .prepare import LOG2E, as_bytes
from .recorded import launch
from .transpose import chunks, query_lists

_SLOTS = 512  # chunks that there can be: 64 MiB of sums at blocks of 128 and head dim 128
_ROWS = 128  # rows of the log-sum-exp are padded to whole blocks of the largest size


class Tiles(NamedTuple):
    """Configurations of the two kernels; each names queries first, keys second."""

    dq: Config
    dkv: Config


# By what q, k and v are held in and the padded head dim; the mask's blocks may make tiles smaller. Measured on an H100
# (docs/benchmarks/notes.md): as in the forward pass, programs of 4 warps share a multiprocessor, and one's exponentials
# run beside another's matrix products; a limit of registers buys a third program. Tiles of 128 were slower throughout.
_HOPPER = {
    ("half", 64): Tiles(Config(64, 64, 4, 2), Config(64, 64, 4, 3, 168)),
    ("half", 128): Tiles(Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    ("half", 256): Tiles(Config(64, 64, 4, 2), Config(64, 64, 8, 1)),
}
# Not measured: compiled by Triton 3.6 for sm_80 and 86.
_GENERAL = {
    ("half", 64): Tiles(Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    ("half", 128): Tiles(Config(64, 32, 4, 2), Config(32, 64, 4, 2)),
    ("half", 256): Tiles(Config(32, 32, 4, 1), Config(16, 32, 4, 1)),
    # No matrix unit computes fp32: larger tiles spill registers.
    ("float", 64): Tiles(Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("float", 128): Tiles(Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    ("float", 256): Tiles(Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


def choose_tiles(q: Tensor, mask: BlockMask) -> Tiles:
    """Tiles for q's type, head dim and GPU that divide the mask's blocks."""
    key = "float" if q.dtype == torch.float32 else "half", max(64, padded_dim(q.shape[-1], False))
    table = _HOPPER if configs.capability(q.device)[0] == 9 else _GENERAL
    tiles = table.get(key, _GENERAL[key])
    return Tiles(
        *(
            dataclasses.replace(x, block_m=min(x.block_m, mask.block_q), block_n=min(x.block_n, mask.block_k))
            for x in tiles
        )
    )


def sparse_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    window: int | None = None,
    key_mask: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtypes.

    Args:
        q: ``[B, Hq, Lq, D]``; k, v ``[B, Hkv, Lk, D]``, any strides; fp16, bf16 or fp32.
        mask: the blocks that were computed.
        out, lse: what the forward pass gave: ``[B, Hq, Lq, D]``, and float32 ``[B, Hq, Lq]``, contiguous.
        grad_out, grad_lse: gradients of the two, shaped like them.
        scale, is_causal, window, key_mask: of the forward pass.
        tiles: chosen from the table by default.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        tiles = tiles or choose_tiles(q, mask)
        grad_out = _whole_rows(grad_out)
        batch, heads, q_len, d = q.shape
        dim, padded = padded_dim(d, False), cdiv(q_len, _ROWS) * _ROWS
        log2_sum, delta = (torch.empty(batch, heads, padded, device=q.device) for _ in range(2))
        launch(
            delta_kernel, (cdiv(padded, 64), batch * heads), Rows.of(out), Rows.of(grad_out), lse,
            None if grad_lse is None else grad_lse.contiguous(), delta, log2_sum, heads, q_len, padded,
            D=d, DPAD=dim, BLOCK=64, num_warps=4,
        )  # fmt: skip
        valid = as_bytes(key_mask)
        common = (q, k, v, mask, grad_out, log2_sum, delta, valid, scale, is_causal, window if is_causal else None)
        _launch_dq(dq, *common, tiles.dq)
        _launch_dkv(dk, dv, *common, tiles.dkv)
    return dq, dk, dv


def _whole_rows(x: Tensor) -> Tensor:
    """``x`` with strides of its own in every dimension: a gradient may be one number, expanded."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _options(config: Config, q: Tensor) -> dict[str, int]:
    """Triton's launch options."""
    limit = {"maxnreg": config.registers} if config.registers and q.is_cuda else {}
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, **limit}


def _descriptors(
    a: Tensor, b: Tensor, tile: tuple[int, int]
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Descriptors of both or of neither."""
    # Triton 3.6 for sm_90: fp32 products of what the copy engine loads spill kilobytes a thread.
    made = (None, None) if a.dtype == torch.float32 else (descriptor(a, tile), descriptor(b, tile))
    return (None, None) if None in made else made


def _launch_dq(
    dq: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, grad_out: Tensor, log2_sum: Tensor, delta: Tensor,
    valid: Tensor | None, scale: float, is_causal: bool, window: int | None, config: Config,
) -> None:  # fmt: skip
    (batch, heads, q_len, d), k_len, block_n = q.shape, k.shape[2], config.block_n
    dim = padded_dim(d, False)
    k_desc, v_desc = _descriptors(k, v, (block_n, dim))
    rows = [Rows.of(x) if k_desc is None else None for x in (k, v)]
    launch(
        dq_kernel, (cdiv(q_len, config.block_m) * batch * heads,), Rows.of(q), *rows, Rows.of(grad_out), Rows.of(dq),
        k_desc, v_desc, log2_sum, delta, block_lists(mask, batch, heads), Valid.of(valid), whole_tiles(valid, block_n),
        heads, heads // k.shape[1], heads_together(k, v, heads) if is_causal else 1, q_len, delta.shape[2], k_len,
        window, scale * LOG2E, scale, D=d, DPAD=dim, BLOCK_M=config.block_m, BLOCK_N=block_n, MASK_Q=mask.block_q,
        MASK_K=mask.block_k, CAUSAL=is_causal, RAGGED=k_len % mask.block_k != 0,
        **_options(config, q),
    )  # fmt: skip


def _launch_dkv(
    dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, grad_out: Tensor, log2_sum: Tensor,
    delta: Tensor, valid: Tensor | None, scale: float, is_causal: bool, window: int | None, config: Config,
) -> None:  # fmt: skip
    (batch, heads, q_len, d), (k_heads, k_len) = q.shape, k.shape[1:3]
    dim, nq, nk, split = padded_dim(d, False), *mask.indices.shape[2:], mask.block_k // config.block_n
    tiles = batch * k_heads * nk
    lists = query_lists(mask, block_lists(mask, batch, heads), k_heads, is_causal, window)
    shares = chunks(lists, k_heads, min(_SLOTS, tiles))
    sums = torch.empty(shares.slots, split, 2, config.block_n, dim, device=q.device)
    q_desc, do_desc = _descriptors(q, grad_out, (config.block_m, dim))
    launch(
        dkv_kernel, ((shares.slots + tiles) * split,), Rows.of(q), Rows.of(k), Rows.of(v), Rows.of(grad_out),
        Rows.of(dk), Rows.of(dv), sums, q_desc, do_desc, log2_sum, delta, lists, shares, Valid.of(valid),
        heads, heads // k_heads, lists.heads, shares.slots, nq, q_len, delta.shape[2], k_len, window,
        scale * LOG2E, scale, D=d, DPAD=dim, BLOCK_M=config.block_m, BLOCK_N=config.block_n, MASK_Q=mask.block_q,
        MASK_K=mask.block_k, CAUSAL=is_causal, **_options(config, q),
    )  # fmt: skip
    launch(
        sum_kernel, (tiles * split,), Rows.of(dk), Rows.of(dv), sums, shares, k_heads, k_len, scale,
        D=d, DPAD=dim, BLOCK_N=config.block_n, MASK_K=mask.block_k, num_warps=8,
    )  # fmt: skip
