"""python mask_training.py KIND FOLDER: a short training of masks and weights, one of two processes on a CPU (gloo)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modify_model import patch
from modify_model.cli import tiny
from modify_model.mask_arguments import MaskTrainingArguments
from modify_model.mask_trainer import MaskTrainer

LENGTH = 512  # the window leaves blocks out


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Rows of random bytes that repeat, each a document."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 259, (count, LENGTH // 2), generator=generator).repeat(1, 2)
    labels = ids.clone().index_fill_(1, torch.tensor([0]), -100)  # no row predicts the first token of the next
    where = torch.arange(LENGTH)
    return [{"input_ids": row, "labels": of, "position_ids": where} for row, of in zip(ids, labels, strict=True)]


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows one after the other."""
    return {name: torch.cat([row[name] for row in batch])[None] for name in batch[0]}


def options(folder: Path, **changes: Any) -> MaskTrainingArguments:
    """A few quick steps on the CPU; the weights are frozen."""
    usual: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=4, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        window=128, logging_steps=1, weight_decay=0.0,
    )  # fmt: skip
    return MaskTrainingArguments(**(usual | changes))


def trainer(folder: Path, model: Any = None, **changes: Any) -> MaskTrainer:
    """A trainer of the tiny LLaMA."""
    model = patch(tiny.llama() if model is None else model)
    return MaskTrainer(model, options(folder, **changes), train_dataset=rows(), data_collator=collate)


def learned(made: MaskTrainer) -> Tensor:
    """log α of all gates, then the multipliers."""
    return torch.cat([parameter.detach().flatten() for parameter in made.mask_parameters])


def take_fsdp_on_a_cpu() -> None:
    """Let accelerate use FSDP in CPU processes too; it asks for GPUs, FSDP2 does not."""
    from accelerate import state

    begin = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type is state.DistributedType.MULTI_CPU:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, state.DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = init


# A large epsilon and no clips make AdamW nearly plain descent: a gradient of the wrong size would show.
SHARED: dict[str, Any] = dict(
    freeze_non_mask_parameters=False, gradient_accumulation_steps=2, adam_epsilon=10.0, learning_rate=1.0,
    max_grad_norm=0.0, mask_learning_rate=1000.0, reg_learning_rate=100.0, mask_max_grad_norm=0.0,
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    more: dict[str, Any] = {}
    if kind == "fsdp":
        take_fsdp_on_a_cpu()
        more = dict(fsdp=True, fsdp_config={"fsdp_version": 2}, save_strategy="steps", save_steps=2)
        more["gradient_checkpointing"] = True
    made = trainer(folder, **SHARED, **more)
    made.train()
    result = learned(made)
    weight = made.model.get_decoder().layers[0].mlp.up_proj.weight if kind == "fsdp" else torch.empty(0)
    made.finish()
    if kind == "fsdp":
        assert type(weight).__name__ == "DTensor" and weight.to_local().shape[0] * 2 == weight.shape[0], weight
        more["fsdp_config"] = {"fsdp_version": 2}  # the first is used up
        again = trainer(folder, **SHARED, **more)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert torch.equal(learned(again), result), (learned(again), result)
        with pytest.raises(ValueError, match="draws the same gates"):
            trainer(folder, fsdp=True, fsdp_config={"activation_checkpointing": True})
    if made.is_world_process_zero():
        torch.save(result, folder / "learned.pt")
    torch.distributed.destroy_process_group()
