"""The options of a training with head masks: transformers' TrainingArguments, and what the masks add."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

Mode = Literal["masks", "masks and weights", "weights with fixed masks"]
COSINE = "cosine_with_min_lr"
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}} | dict.fromkeys(AUTO, "auto")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class MaskTrainingArguments(TrainingArguments):
    """TrainingArguments of :class:`modify_model.mask_trainer.MaskTrainer`.

    The names are those of PruLong (arXiv 2506.17121), whose comments call its modes by each other's names; see
    :attr:`mode` for what is trained. The defaults are its masks-only run.

    Raises:
        ValueError: on options that exclude each other, and numbers out of range.
    """

    freeze_non_mask_parameters: bool = _option(True, "train no weights")
    freeze_mask_parameters: bool = _option(False, "keep the masks as they are loaded: 0 or 1")
    objective: Literal["lm", "distill"] = _option(
        "lm", "lm: predict the next token; distill: be near the dense model's last hidden states (DuoAttention)"
    )
    start_head_sparsity: float = _option(0.0, "target share of streaming KV heads at the first step")
    end_head_sparsity: float = _option(0.7, "target share of streaming KV heads after the warm-up")
    sparsity_warmup_ratio: float = _option(0.8, "share of the steps over which the target moves")
    warmup_type: Literal["linear", "logarithmic"] = _option(
        "linear", "how the target moves; logarithmic: linear in log(1 - s)"
    )
    mask_learning_rate: float = _option(1.0, "highest learning rate of the gates")
    reg_learning_rate: float = _option(1.0, "highest learning rate of the multipliers lambda")
    mask_max_grad_norm: float = _option(1.0, "clip the gradient of gates and multipliers at this norm; 0: do not")
    disable_linear_regularization_term: bool = _option(False, "leave lambda_1 (s - t) out of the penalty")
    enable_layerwise_sparsity: bool = _option(False, "a target for each layer instead of one for the whole model")
    layerwise_sparsity_schedule: Literal["high-low-high"] = _option(
        "high-low-high", "layers with the highest targets: the first and the last"
    )
    layerwise_sparsity_min_ratio: float = _option(0.5, "relative target of the middle layers")
    layerwise_sparsity_max_ratio: float = _option(1.0, "relative target of the first and last layer")
    layerwise_sparsity_power: float = _option(1.0, "of the curve between them")
    sink_size: int = _option(128, "tokens of the attention sink in streaming heads")
    window: int = _option(
        1024, "tokens of the local window in streaming heads", aliases=["--context_window_if_toggled"]
    )
    toggle_type: Literal["streaming", "local"] = _option("streaming", "streaming: sink and window; local: window alone")
    load_masks_from: str | None = _option(None, "begin with the masks of this table or its folder")
    load_masks_sparsity: float | None = _option(
        None, "round a loaded table to 0 and 1 at this share of streaming heads"
    )
    seq_parallel_size: int = _option(
        1, "processes that hold a sequence together, by DeepSpeed's Ulysses; --deepspeed is ZeRO stage 1 if left out"
    )
    min_lr_ratio: float = _option(0.01, f"lowest over highest learning rate, of --lr_scheduler_type {COSINE}")

    # Other defaults than TrainingArguments has: PruLong's.
    learning_rate: float = _option(1e-5, "highest learning rate of the weights")
    adam_beta2: float = _option(0.95, "of AdamW")
    weight_decay: float = _option(0.1, "of the weights; gates and multipliers have none")
    max_steps: int = _option(1000, "number of updates")
    per_device_train_batch_size: int = _option(1, "rows of a batch, joined to one")
    warmup_steps: float = _option(0.1, "steps in which learning rates rise; below 1 a share of all")
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "of the schedule; left out: --min_lr_ratio"}
    )
    lr_scheduler_type: str = _option(COSINE, "how learning rates fall; all groups of parameters alike")
    logging_steps: float = _option(10, "log every so many steps; below 1 a share of all")

    @property
    def mode(self) -> Mode:
        """What is trained."""
        if self.freeze_mask_parameters:
            return "weights with fixed masks"
        return "masks" if self.freeze_non_mask_parameters else "masks and weights"

    def __post_init__(self) -> None:
        """Check what the masks add, before transformers looks at the rest."""
        if self.freeze_mask_parameters and self.freeze_non_mask_parameters:
            raise ValueError("freeze_mask_parameters and freeze_non_mask_parameters leave nothing to train")
        if self.freeze_mask_parameters and not self.load_masks_from:
            raise ValueError("freeze_mask_parameters needs load_masks_from, the table of the masks")
        if self.freeze_mask_parameters and self.objective != "lm":
            raise ValueError(f"objective must be 'lm' with fixed masks, got {self.objective!r}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        for name in ("mask_learning_rate", "reg_learning_rate", "mask_max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.fp16:
            raise ValueError("fp16 scales the loss, which gates with a clip of their own do not stand: use bf16")
        if self.seq_parallel_size < 1:
            raise ValueError(f"seq_parallel_size must be 1 or more, got {self.seq_parallel_size}")
        if self.seq_parallel_size > 1 and not vars(self)["deepspeed"]:
            self.deepspeed = dict(ZERO)
        if self.lr_scheduler_type == COSINE and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": self.min_lr_ratio}
        super().__post_init__()
