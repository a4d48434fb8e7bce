"""MaskTrainer: transformers' Trainer for gates of KV heads, with or without the weights, or for weights under masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from autotune.learn import Learning, Regulariser, SparsityTarget, distillation_loss, layerwise_targets, learn
from autotune.ulysses import deepspeed_ranks, mean_over_parts
from spas_attn.published import full_heads, write_head_table

from .mask_arguments import MaskTrainingArguments
from .sequence_parallel import ulysses_config, without_bounds

IGNORED = -100  # the label of a token that no loss is formed for
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MASKS = "masks"  # folder of the learned table, in output_dir
REGULARISER = "mask_regulariser"  # name of the module with the multipliers, in the model


class MaskTrainer(Trainer):
    """Learns which KV heads need the whole context, on a model that :func:`modify_model.patch` has patched.

    The loss is next-token cross-entropy, or the distance of the last hidden states from those of the model itself with
    dense attention (``objective="distill"``; DuoAttention, arXiv 2410.10819), and while masks are learned the penalty
    λ₁(s − t) + λ₂(s − t)² of PruLong (arXiv 2506.17121), where s is the expected share of streaming heads, t its target
    and the multipliers climb. Gates and multipliers are parameters of the model while it trains: checkpoints hold them,
    and ``train(resume_from_checkpoint=...)`` goes on with them. :meth:`finish` writes what was learned.

    They have their own learning rates, no weight decay, and a gradient clip apart from that of the weights (DeepSpeed,
    which clips inside its own step, clips all together). Under FSDP2 they are not sharded and stay float32.

    Args:
        model: a patched model of transformers. Weights that are frozen lose ``requires_grad``.
        args: the options; see :attr:`~modify_model.mask_arguments.MaskTrainingArguments.mode` for what is trained.
        more: further arguments of Trainer. Batches hold ``input_ids`` and ``labels``; rows packed without padding also
            ``position_ids``, and the bounds of their documents as ``cu_seq_lens_q`` and so on.

    Raises:
        TypeError: on arguments of another class.
        ValueError: when the model is not patched or has gates already, on a table that does not fit it, and on ZeRO 3.
    """

    args: MaskTrainingArguments
    optimizer: Any
    data_collator: Any

    def __init__(self, model: Any, args: MaskTrainingArguments, **more: Any) -> None:
        if not isinstance(args, MaskTrainingArguments):
            raise TypeError(f"args must be MaskTrainingArguments, got {type(args).__name__}")
        self.target = SparsityTarget(
            args.start_head_sparsity, args.end_head_sparsity, args.sparsity_warmup_ratio, args.warmup_type
        )
        self.learning = learn(
            model, sink_size=args.sink_size, window=args.window, toggle_type=args.toggle_type, seed=args.seed
        )
        self.regulariser = Regulariser(disable_linear_regularization_term=args.disable_linear_regularization_term)
        self.gates, self.multipliers = _begin(model, args, self.learning, self.regulariser)
        self._taken: list[tuple[nn.Parameter, Tensor]] = []
        self._penalties: list[Tensor] = []
        self._use_cache = getattr(model.config, "use_cache", None)  # Trainer switches it off for good
        args.remove_unused_columns = False  # bounds of documents are no argument of a model's forward by name
        if args.seq_parallel_size > 1:
            args.parallelism_config = ulysses_config(model, args.seq_parallel_size, args.world_size)
        super().__init__(model=model, args=args, **more)
        if args.seq_parallel_size > 1:
            collate = self.data_collator
            self.data_collator = lambda rows: without_bounds(collate(rows))
        self.add_callback(_PutBack(self))
        if self.is_fsdp_enabled:
            self._keep_whole([*self.learning.gates, self.regulariser])
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError("deepspeed must have a ZeRO stage below 3 to train under masks: gates stay whole")

    @property
    def mask_parameters(self) -> list[nn.Parameter]:
        """The gates' parameters and the multipliers; none while masks are fixed."""
        return self.gates + self.multipliers

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of ``args.optim``: groups of weights as Trainer's, one of gates and one of multipliers."""
        if self.optimizer is None:
            model = self.model if model is None else model
            own = {id(parameter) for parameter in self.mask_parameters}
            decayed = set(self.get_decay_parameter_names(model))
            weights = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
            args = self.args
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in weights if n in decayed], "weight_decay": args.weight_decay},
                {"params": [p for n, p in weights if n not in decayed], "weight_decay": 0.0},
                {"params": self.gates, "weight_decay": 0.0, "lr": args.mask_learning_rate},
                {"params": self.multipliers, "weight_decay": 0.0, "lr": args.reg_learning_rate},
            ]
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective and, while masks are learned, the penalty."""
        inputs = {**inputs, "use_cache": False}
        if self.args.objective == "distill" and model.training:
            loss, outputs = self._distilled(model, inputs, num_items_in_batch), None
        else:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss, outputs = found if return_outputs else (found, None)
        if model.training and self.mask_parameters:
            penalty = self._penalty()
            self._penalties.append(penalty.detach())
            # Trainer divides by the number of batches of a step unless their losses are shares of the step's loss.
            shares = self._shares(num_items_in_batch)
            loss = loss + (penalty / self.current_gradient_accumulation_steps if shares else penalty)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **more: Any) -> Tensor:
        """A step of Trainer, after which the masks' gradients wait for their own clip."""
        loss = super().training_step(*args, **more)
        if self.accelerator.sync_gradients:
            # Trainer clips the gradients that it finds; _PutBack brings these back before the optimiser runs.
            self._taken = [(p, p.grad) for p in self.mask_parameters if p.grad is not None]
            for parameter, _ in self._taken:
                parameter.grad = None
        return loss

    def log(self, logs: dict[str, float], *more: Any) -> None:
        """Trainer's logs; those of a step with the state of the masks, as numbers that TensorBoard draws."""
        if "loss" in logs and self.mask_parameters:
            penalty = float(torch.stack(self._penalties).mean()) if self._penalties else 0.0
            self._penalties = []
            logs = logs | {"objective_loss": logs["loss"] - penalty, "penalty": penalty} | self.facts()
        super().log(logs, *more)

    def facts(self) -> dict[str, float]:
        """The state of the masks: sparsity, its target, the multipliers, and quantiles of the gates."""
        found = {"sparsity": self.learning.sparsity().item(), "target_sparsity": self._target_now()}
        found |= {name: value.item() for name, value in self.regulariser.named_parameters()}
        values = self.learning.table().flatten()
        return found | {f"gate_q{round(100 * q)}": float(values.quantile(q)) for q in QUANTILES}

    def finish(self, folder: str | Path | None = None) -> Path:
        """Write what was learned, and leave the model without gates.

        The gates go to ``<folder>/masks/full_attention_heads.tsv``, with ``config.json`` beside them as DuoAttention
        has it, and rounded to 0 and 1 at the last target to ``masks_sp<target>.tsv``, as PruLong names it. Weights
        that were trained go to the folder itself, as ``save_pretrained`` writes them.

        Args:
            folder: ``args.output_dir`` by default.

        Returns:
            The folder of the masks.
        """
        args, place = self.args, Path(folder or self.args.output_dir)
        table, rounded = self.learning.table(), self.learning.table(args.end_head_sparsity)
        if self.is_world_process_zero():
            sink = args.sink_size if args.toggle_type == "streaming" else 0
            write_head_table(place / MASKS, table, sink, args.window)
            if not args.freeze_mask_parameters:
                lines = ["\t".join(str(int(value)) for value in row) for row in rounded.tolist()]
                file = place / MASKS / f"masks_sp{args.end_head_sparsity:g}.tsv"
                file.write_text("\n".join(lines) + "\n", "utf-8")
        self.learning.remove()
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, REGULARISER):
            delattr(model, REGULARISER)
        if self._use_cache is not None:
            model.config.use_cache = self._use_cache
        if not args.freeze_non_mask_parameters:
            self.save_model(str(place))
        return place / MASKS

    def _target_now(self) -> float:
        return self.target.at(self.state.global_step, self.state.max_steps)

    def _penalty(self) -> Tensor:
        args, target = self.args, self._target_now()
        if not args.enable_layerwise_sparsity:
            return self.regulariser(self.learning.sparsity(), target)
        targets = layerwise_targets(
            target, len(self.learning.gates), schedule=args.layerwise_sparsity_schedule,
            min_ratio=args.layerwise_sparsity_min_ratio, max_ratio=args.layerwise_sparsity_max_ratio,
            power=args.layerwise_sparsity_power,
        )  # fmt: skip
        return self.regulariser(self.learning.sparsity(layerwise=True), targets)

    def _shares(self, num_items_in_batch: Any) -> bool:
        return self.model_accepts_loss_kwargs and num_items_in_batch is not None

    def _distilled(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Distance of the last hidden states from those of the dense model, at tokens that predict a label."""
        inputs = dict(inputs)
        parts = deepspeed_ranks() is not None and "shift_labels" in inputs  # each rank has a part of the sequences
        if parts:
            predicts = inputs.pop("shift_labels") != IGNORED
        else:
            predicts = nn.functional.pad(inputs.pop("labels")[:, 1:] != IGNORED, (0, 1))
        with _last_hidden_states(self.accelerator.unwrap_model(model)) as found:
            self.learning.active = False
            try:
                with torch.no_grad():
                    model(**inputs, logits_to_keep=1)
            finally:
                self.learning.active = True
            model(**inputs, logits_to_keep=1)
        teacher, student = found
        if parts:  # gradients are averaged over the parts
            return distillation_loss(student, teacher, predicts, count=mean_over_parts(predicts.sum()))
        if not self._shares(num_items_in_batch):
            return distillation_loss(student, teacher, predicts)
        # Gradients are averaged over the ranks, and the count is that of all of them.
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return distillation_loss(student, teacher, predicts, torch.as_tensor(num_items_in_batch) / ranks)

    def _keep_whole(self, modules: list[nn.Module]) -> None:
        """Leave modules out of FSDP2: float32 whatever its precision, whole on every rank, gradients averaged here."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading or plugin.activation_checkpointing:
            # accelerate's activation checkpointing does not restore the random state: the backward pass would draw
            # other gates than the forward pass did (preserve_rng_state=False in 1.15).
            raise ValueError(
                "fsdp_config must have version 2 and neither cpu_ram_efficient_loading nor activation_checkpointing; "
                "gradient_checkpointing draws the same gates again"
            )
        plugin.ignored_modules = modules
        for module in modules:
            module.to(self.args.device)
            for parameter in module.parameters():
                dist.broadcast(parameter.data, 0)

    def _put_back(self) -> None:
        """Return the masks' gradients to the optimiser, averaged over ranks where nothing else does that, clipped."""
        for parameter, gradient in self._taken:
            if self.is_fsdp_enabled:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            parameter.grad = gradient
        if self._taken and self.args.mask_max_grad_norm:
            nn.utils.clip_grad_norm_([p for p, _ in self._taken], self.args.mask_max_grad_norm)
        self._taken = []


class _PutBack(TrainerCallback):
    """Calls the trainer between its clip of the weights' gradients and the optimiser's step."""

    def __init__(self, trainer: MaskTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **more: Any) -> None:
        self.trainer._put_back()


def _begin(
    model: Any, args: MaskTrainingArguments, learning: Learning, regulariser: Regulariser
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Load masks, freeze weights, make the multipliers part of the model; returns gates and multipliers to train."""
    if args.load_masks_from is not None:
        layers, heads = len(learning.gates), len(learning.gates[0].log_alpha)
        full = full_heads(args.load_masks_from, sparsity=args.load_masks_sparsity, layers=layers, kv_heads=heads)
        table = full.float()
        if args.freeze_mask_parameters:
            learning.freeze(table)
            return [], []
        learning.start_from(table)
    gates = [gate.log_alpha for gate in learning.gates]
    if args.freeze_non_mask_parameters:
        model.requires_grad_(False)
        for parameter in gates:
            parameter.requires_grad_(True)
    regulariser.to(gates[0].device)
    model.add_module(REGULARISER, regulariser)  # checkpoints hold it, FSDP and DeepSpeed prepare it
    # A DistributedDataParallel takes parameters that its own forward does not use for finished. The multipliers'
    # gradients follow from the gates alone and are the same on every rank.
    names = [f"{REGULARISER}.{name}" for name, _ in regulariser.named_parameters()]
    model._ddp_params_and_buffers_to_ignore = names
    return gates, list(regulariser.parameters())


@contextmanager
def _last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """What the decoder of a causal language model returns ``[B, L, hidden]``, one tensor for each of its calls."""
    found: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda *call: found.append(call[-1].last_hidden_state))
    try:
        yield found
    finally:
        handle.remove()
