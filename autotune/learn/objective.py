"""What learning gates minimises: the target of sparsity over the steps, its penalty, and the loss of a distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

WARMUP_TYPES = ("linear", "logarithmic")
SCHEDULES = ("high-low-high",)


@dataclass(frozen=True)
class SparsityTarget:
    """The share of streaming heads to reach, over the steps of a training.

    Attributes:
        start_head_sparsity, end_head_sparsity: shares of the KV heads, in [0, 1].
        sparsity_warmup_ratio: share of the steps in which the target goes from one to the other; then it stays.
        warmup_type: "linear" in s, or "logarithmic": linear in log(1 − s), so below 1.

    Raises:
        ValueError: on shares outside [0, 1] and other types.
    """

    start_head_sparsity: float = 0.0
    end_head_sparsity: float = 0.7
    sparsity_warmup_ratio: float = 0.8
    warmup_type: Literal["linear", "logarithmic"] = "linear"

    def __post_init__(self) -> None:
        for name in ("start_head_sparsity", "end_head_sparsity", "sparsity_warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if self.warmup_type not in WARMUP_TYPES:
            raise ValueError(f"warmup_type must be one of {WARMUP_TYPES}, got {self.warmup_type!r}")
        if self.warmup_type == "logarithmic" and 1 in (self.start_head_sparsity, self.end_head_sparsity):
            raise ValueError("warmup_type 'logarithmic' needs sparsities below 1, got 1")

    def at(self, step: int, steps: int) -> float:
        """The target in a step, counted from 0, of a training of ``steps``."""
        warmup = math.ceil(self.sparsity_warmup_ratio * steps)
        part = min(1.0, step / warmup) if warmup else 1.0
        start, end = self.start_head_sparsity, self.end_head_sparsity
        if self.warmup_type == "linear":
            return start + part * (end - start)
        return 1 - (1 - start) ** (1 - part) * (1 - end) ** part


def layerwise_targets(
    target: float, layers: int, *, schedule: str = "high-low-high", min_ratio: float = 0.5, max_ratio: float = 1.0,
    power: float = 1.0,
) -> Tensor:  # fmt: skip
    """Targets of the single layers, whose mean is ``target``.

    Args:
        target: of the whole model.
        layers: number of layers.
        schedule: "high-low-high": most streaming heads in the first and last layers.
        min_ratio, max_ratio: relative sizes of the targets of the middle and of the two ends.
        power: of the curve between them: |distance from the middle| ** power.

    Returns:
        float32 ``[layers]``; no target exceeds 1, the others make up for what is cut off.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if not 0 < min_ratio <= max_ratio:
        raise ValueError(f"ratios must be 0 < min_ratio <= max_ratio, got {min_ratio} and {max_ratio}")
    if not (0 <= target <= 1 and power > 0 and layers > 0):
        raise ValueError(f"target must be in [0, 1], power and layers above 0, got {target}, {power} and {layers}")
    distance = torch.linspace(-1, 1, layers).abs() if layers > 1 else torch.ones(1)
    shape = min_ratio + (max_ratio - min_ratio) * distance**power
    targets = torch.zeros(layers)
    for _ in range(layers):  # each round cuts at least one more layer off at 1, or is the last
        free = targets < 1
        if not bool(free.any()):
            break
        rest = target * layers - float((~free).sum())
        targets = torch.where(free, (shape * rest / shape[free].sum()).clamp(max=1.0), targets)
    return targets


class _Ascent(torch.autograd.Function):
    """Identity whose gradient is flipped: an optimiser that descends then ascends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Regulariser(nn.Module):
    """λ₁ (s − t) + λ₂ (s − t)², minimised over the gates and maximised over λ₁ and λ₂, which begin at 0.

    The gradient of λ is flipped here, so that every optimiser can hold it beside the rest (PruLong has a group with
    ``maximize``, and its weight decay pulls gates and λ to 0 as well: give these groups none). s comes from the
    parameters (:meth:`Learning.sparsity`): every rank knows it without communication. PruLong sums sampled gates with
    an all_gather that carries no gradient, so that under sequence parallelism its gates never feel this penalty.

    Args:
        disable_linear_regularization_term: leave the term of λ₁ out.

    Attributes:
        lambda_1, lambda_2: float32 ``[1]`` (FSDP2 takes no scalars); ``lambda_1`` is None when it is left out.
    """

    lambda_1: nn.Parameter | None
    lambda_2: nn.Parameter

    def __init__(self, *, disable_linear_regularization_term: bool = False) -> None:
        super().__init__()
        self.register_parameter(
            "lambda_1", None if disable_linear_regularization_term else nn.Parameter(torch.zeros(1))
        )
        self.lambda_2 = nn.Parameter(torch.zeros(1))

    def forward(self, sparsity: Tensor, target: float | Tensor) -> Tensor:
        """The penalty, a scalar.

        Args:
            sparsity: of the whole model, a scalar, or of the layers, ``[layers]``: the mean over them is taken.
            target: the same.
        """
        excess = sparsity - torch.as_tensor(target, dtype=sparsity.dtype, device=sparsity.device)
        loss = _ascended(self.lambda_2, excess) * excess.square()
        if self.lambda_1 is not None:
            loss = loss + _ascended(self.lambda_1, excess) * excess
        return loss.mean()


def _ascended(value: Tensor, like: Tensor) -> Tensor:
    ascended: Tensor = _Ascent.apply(value)
    return ascended.to(like.device)


def distillation_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, labels_mask: Tensor, count: Tensor | int | None = None
) -> Tensor:
    """Mean squared error of the final hidden states over the labelled tokens (DuoAttention, arXiv 2410.10819).

    Args:
        student_hidden, teacher_hidden: ``[B, L, hidden]``; no gradient flows to the teacher.
        labels_mask: bool ``[B, L]``, the tokens that count.
        count: what the sum over tokens is divided by, where a step has more tokens than this call (several ranks,
            gradient accumulation); by default the labelled tokens here.

    Raises:
        ValueError: on shapes that do not fit.
    """
    if student_hidden.shape != teacher_hidden.shape or labels_mask.shape != student_hidden.shape[:-1]:
        shapes = [tuple(x.shape) for x in (student_hidden, teacher_hidden, labels_mask)]
        raise ValueError(
            f"student_hidden and teacher_hidden must be [B, L, hidden] and labels_mask [B, L], got {shapes}"
        )
    labelled = labels_mask.bool()
    errors = (student_hidden[labelled].float() - teacher_hidden.detach()[labelled].float()).square().mean(-1)
    total = labelled.sum() if count is None else torch.as_tensor(count, device=errors.device)
    return errors.sum() / total.clamp(min=1)
