"""Problem: one attention computation, its mask and bias brought to one meaning and left unexpanded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

READ_AS = "[B, Lk] (keys), [Lq, Lk], [B, Lq, Lk] or [B or 1, H or 1, Lq or 1, Lk]"


@dataclass(frozen=True)
class Problem:
    """What is to be computed: softmax(q·kᵀ·scale + biases, where the mask lets see)·v.

    Attributes:
        q: ``[B, H, Lq, D]``.
        k, v: ``[B, H, Lk, D]``.
        mask: bool, 4-D, broadcastable to ``[B, H, Lq, Lk]``, True = attend; or None.
        biases: added to the scores; in q's dtype, 4-D, broadcastable to ``[B, H, Lq, Lk]``; -inf hides.
        scale: factor on q·k.
        dropout: probability of dropping an attention weight; 0 outside training.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    biases: tuple[Tensor, ...] = ()
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, Lq, Lk."""
        return (*self.q.shape[:3], self.k.shape[2])

    @property
    def accumulator(self) -> torch.dtype:
        """What sums and the softmax are computed in: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def grad(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v, *self.biases))

    @property
    def key_mask(self) -> Tensor | None:
        """The mask as ``[B, Lk]`` when it is the same for all heads and queries, else None."""
        if self.mask is None or self.mask.shape[1:3] != (1, 1):
            return None
        return self.mask[:, 0, 0].expand(self.q.shape[0], -1)


def make_problem(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, dropout: float
) -> Problem:
    """Check mask and bias and bring them to the forms of :class:`Problem`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed.
    """
    problem = Problem(q, k, v, scale=scale, dropout=dropout)
    biases = []
    if mask is not None:
        _check_tensor("mask", mask, q)
        four = _mask_4d(mask, problem.sizes)
        if mask.is_floating_point():
            _refuse_zeros_and_ones(mask)
            biases.append(to_dtype(four, q.dtype))
            mask = None
        else:
            mask = _as_bool(four)
    if bias is not None:
        _check_tensor("attention_bias", bias, q)
        if not bias.is_floating_point():
            raise TypeError(f"attention_bias must be floating (it is added to the scores), got {bias.dtype}")
        biases.append(to_dtype(_bias_4d(bias, problem.sizes), q.dtype))
    return Problem(q, k, v, mask, tuple(biases), scale, dropout)


def to_dtype(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in another dtype; finite numbers stay finite, because -inf would hide what a large number does not."""
    if bias.dtype == dtype:
        return bias
    if torch.finfo(bias.dtype).min < torch.finfo(dtype).min:
        bias = torch.where(bias == -torch.inf, bias, bias.clamp(min=torch.finfo(dtype).min))
    return bias.to(dtype)


def part(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """A slice of a broadcast tensor: all of it in a dimension of size 1."""
    return x if x.shape[dim] == 1 else x.narrow(dim, start, stop - start)


def mask_from_multihead_attention(
    key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None, *, num_heads: int
) -> Tensor | None:
    """The masks of ``torch.nn.MultiheadAttention`` (boolean: True = hidden) as one mask for EfficientAttention.

    Args:
        key_padding_mask: bool ``[B, Lk]``, True = padding; or float, added to the scores.
        attn_mask: bool ``[Lq, Lk]`` or ``[B·H, Lq, Lk]``, True = hidden; or float, added to the scores.
        num_heads: H.

    Returns:
        bool (True = attend) when all that is given is boolean, else float, additive; 4-D. None when nothing is given.
    """
    parts = []
    if key_padding_mask is not None:
        if key_padding_mask.dim() != 2:
            raise ValueError(f"key_padding_mask must be [B, Lk], got {tuple(key_padding_mask.shape)}")
        parts.append(key_padding_mask[:, None, None])
    if attn_mask is not None:
        if attn_mask.dim() == 3 and attn_mask.shape[0] % num_heads == 0:
            parts.append(attn_mask.unflatten(0, (-1, num_heads)))
        elif attn_mask.dim() == 2:
            parts.append(attn_mask[None, None])
        else:
            raise ValueError(
                f"attn_mask must be [Lq, Lk] or [B·H, Lq, Lk] with H={num_heads}, got {tuple(attn_mask.shape)}"
            )
    for x in parts:
        if x.dtype != torch.bool and not x.is_floating_point():
            raise TypeError(f"masks of nn.MultiheadAttention are boolean or floating, got {x.dtype}")
    if all(x.dtype == torch.bool for x in parts):
        hidden = parts[0] if len(parts) == 1 else parts[0] | parts[1] if parts else None
        return None if hidden is None else ~hidden
    added = [
        x if x.is_floating_point() else torch.zeros(x.shape).to(x.device).masked_fill(x, -torch.inf) for x in parts
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _check_tensor(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(x).__name__}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the query's device {q.device}, got {x.device}")
    if x.is_complex():
        raise TypeError(f"{name} must be boolean, integer or floating, got {x.dtype}")


def _mask_4d(mask: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    batch, heads, q_len, k_len = sizes
    shape = tuple(mask.shape)
    wrong = f"mask must be {READ_AS} with B={batch}, H={heads}, Lq={q_len}, Lk={k_len}, got {shape}"
    if len(shape) not in (2, 3, 4):
        raise ValueError(wrong)
    if shape[-1] != k_len:
        hint = "; it looks like a mask of queries: a mask says which keys are seen" if shape[-1] == q_len else ""
        raise ValueError(wrong + hint)
    if len(shape) == 2:
        if batch == q_len and shape[0] == batch and batch > 1:
            raise ValueError(
                f"mask {shape} is ambiguous, because B = Lq = {batch}: pass mask[:, None] for key padding [B, 1, Lk] "
                "or mask[None] for [1, Lq, Lk]"
            )
        mask = mask[:, None, None] if shape[0] == batch else mask[None, None]
    elif len(shape) == 3:
        if shape[0] not in (1, batch) and shape[0] in (heads, batch * heads):
            hint = "mask[None]" if shape[0] == heads else "mask.unflatten(0, (B, H))"
            raise ValueError(f"{wrong}; for one mask a head pass {hint}")
        mask = mask[:, None]
    if any(size not in (1, whole) for size, whole in zip(mask.shape[:3], sizes[:3], strict=True)):
        raise ValueError(wrong)
    return mask


def _bias_4d(bias: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    shape = tuple(bias.shape)
    four = bias[None, None] if bias.dim() == 2 else bias
    if bias.dim() == 3 and shape[0] == 1:
        four = bias[None]
    if four.dim() != 4 or any(size not in (1, whole) for size, whole in zip(four.shape, sizes, strict=True)):
        hint = ""
        if bias.dim() == 3:
            hint = "; of 3 dimensions pass bias[None] for one bias a head, bias[:, None] for one a sample"
        raise ValueError(
            f"attention_bias must be [Lq, Lk] or 4-D, broadcastable to [B, H, Lq, Lk] = {list(sizes)}, got "
            f"{shape}{hint}"
        )
    return four


def _as_bool(mask: Tensor) -> Tensor:
    """A boolean mask; an integer one must hold 0 and 1 only (its values are read)."""
    if mask.dtype == torch.bool:
        return mask
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"mask of {mask.dtype} must hold 0 (hidden) and 1 (seen) only, got {int(mask.min())} to {int(mask.max())}"
        )
    return mask.bool()


def _refuse_zeros_and_ones(mask: Tensor) -> None:
    """A floating mask is added to the scores; one of zeros and ones was meant as a boolean one (values are read)."""
    if mask.requires_grad:
        return
    if bool(((mask == 0) | (mask == 1)).all()) and bool((mask == 1).any()):
        raise ValueError(
            "mask is floating and holds only 0 and 1, which is ambiguous: pass mask.bool() to hide where it is 0, or "
            "attention_bias to add it to the scores"
        )
