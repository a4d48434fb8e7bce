"""Attention as the shape models need it: dense, in 8 bits, and over a token that stands for many equal ones.

``USE_SAGEATTN=1`` (denoiser and the self-attention of the VAE) and ``CA_USE_SAGEATTN=1`` (the VAE's cross-attention
from points) choose 8-bit attention of the package sageattention, as in the original code; ``engine="int8"`` is this
library's own. Attention in 8 bits has given NaN, and so empty meshes, in the 2.1 model: see :class:`Checked`.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spas_attn import sparse_attention
from spas_attn.selectors import Dense

Engine = Literal["sdpa", "sage", "int8"]
ENGINES = ("sdpa", "sage", "int8")
DENOISER_SWITCH, CROSS_SWITCH = "USE_SAGEATTN", "CA_USE_SAGEATTN"

_HALF = (torch.float16, torch.bfloat16)
_logger = logging.getLogger(__name__)


def chosen_engine(engine: str | None, switch: str = DENOISER_SWITCH) -> Engine:
    """The engine that is asked for: by name, or by an environment variable that is "1" where the name is None.

    Raises:
        ValueError: on an unknown name.
        ImportError: when it is "sage" and the package sageattention is not installed.
    """
    if engine is None:
        engine = "sage" if os.environ.get(switch, "0") == "1" else "sdpa"
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)} or None, got {engine!r}")
    if engine == "sage" and "sageattention" not in sys.modules and importlib.util.find_spec("sageattention") is None:
        raise ImportError(
            f"engine='sage' (or {switch}=1) needs the package sageattention: pip install sageattention, or "
            f"unset {switch}, or take this library's own 8-bit kernel with engine='int8'"
        )
    return engine  # type: ignore[return-value]


def attend(q: Tensor, k: Tensor, v: Tensor, engine: Engine = "sdpa", repeats: int = 1) -> Tensor:
    """Full bidirectional attention with scale ``D ** -0.5``.

    Args:
        q: ``[B, H, Lq, D]``.
        k, v: ``[B, H, Lk, D]``.
        engine: "sdpa" is exact; "sage" and "int8" compute in 8 bits.
        repeats: how many equal keys, with equal values, key 0 stands for: its exponential counts so many times.
            Other than 1 always runs exact.

    Returns:
        ``[B, H, Lq, D]``.
    """
    if repeats != 1:
        return _with_repeats(q, k, v, repeats)
    if engine == "sage":
        import sageattention

        return sageattention.sageattn(q, k.clone(), v, tensor_layout="HND", is_causal=False)  # 1.x writes into k
    if engine == "int8":
        # By name: of its own accord the library takes exact attention where that is faster.
        return sparse_attention(q, k, v, Dense(), precision="int8_bf16", backend="triton" if q.is_cuda else "auto")
    return F.scaled_dot_product_attention(q, k, v)


def _with_repeats(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    """ln(repeats) added to the scores of key 0; the fast kernels of a GPU take no bias, so there it is merged in."""
    if q.is_cuda and q.dtype in _HALF and not (torch.is_grad_enabled() and q.requires_grad):
        return merged_repeats(q, k, v, repeats, _flash)
    bias = q.new_zeros(1, 1, 1, k.shape[2])
    bias[..., 0] = math.log(repeats)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def merged_repeats(
    q: Tensor, k: Tensor, v: Tensor, repeats: int, kernel: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention where key 0 counts ``repeats`` times, from a kernel's attention over the others.

    The kernel's log-sum-exp says how much of the softmax the others have; the rest belongs to key 0.

    Args:
        q, k, v: as in :func:`attend`; at least two keys.
        repeats: how many keys the first one stands for.
        kernel: gives output ``[B, H, Lq, D]`` and natural log-sum-exp ``[B, H, Lq]``.
    """
    others, lse = kernel(q, k[:, :, 1:], v[:, :, 1:])
    score = (q.float() if q.dtype in _HALF else q) * (k[:, :, :1].to(lse.dtype) * q.shape[-1] ** -0.5)
    share = torch.sigmoid(score.sum(-1) + math.log(repeats) - lse)[..., None]
    return torch.lerp(others.to(share.dtype), v[:, :, :1].to(share.dtype), share).to(q.dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash attention, which tells its log-sum-exp."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
    return out, lse[..., : q.shape[2]]


class Checked(nn.Module):
    """A module with an attention engine, whose 8-bit results are looked at before they are passed on.

    Attributes:
        engine: what its attention runs on; "sdpa" after 8-bit attention has once given inf or NaN.
    """

    engine: Engine

    def checked(self, run: Callable[[Engine], Tensor]) -> Tensor:
        """``run(engine)``; once more with exact attention, after a warning, when 8 bits gave inf or NaN.

        The check waits for the device once for each call.
        """
        out = run(self.engine)
        if self.engine == "sdpa" or bool(out.isfinite().all()):
            return out
        warnings.warn(
            f"{type(self).__name__}: attention with engine={self.engine!r} gave inf or NaN; this call is repeated with "
            "exact attention, and later ones use it from the start",
            RuntimeWarning,
            stacklevel=4,
        )
        self.engine = "sdpa"
        return run(self.engine)


def joined(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` to ``[B, L, H * D]``."""
    return x.transpose(1, 2).flatten(2)


def report_ignored(name: str, options: dict[str, object], known: tuple[str, ...]) -> None:
    """Log the options of a configuration file that a constructor does not use, but those known to say nothing."""
    unknown = sorted(options.keys() - {*known})
    if unknown:
        _logger.warning("%s does not use these options: %s", name, ", ".join(unknown))
