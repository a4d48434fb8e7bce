"""MaskTrainer: what changes and what does not, groups and clips, penalty, distillation, resume, logs, two processes."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_training import LENGTH, SHARED, collate, learned, options, rows, trainer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from autotune.learn import layerwise_targets
from modify_model import patch, restore
from modify_model.cli import tiny
from modify_model.mask_trainer import MASKS, MaskTrainer
from spas_attn.published import streaming_heads

HERE = Path(__file__).parent
TABLE = "1\t0\n0\t1\n"


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["masks", "masks and weights", "weights with fixed masks"])
def test_what_is_trained(mode: str, tmp_path: Path, fallbacks: Any) -> None:
    (tmp_path / "table.tsv").write_text(TABLE)
    fixed = mode == "weights with fixed masks"
    made = trainer(
        tmp_path, max_steps=2, freeze_non_mask_parameters=mode == "masks", freeze_mask_parameters=fixed,
        load_masks_from=str(tmp_path / "table.tsv") if fixed else None, learning_rate=1e-3, warmup_steps=0,
    )  # fmt: skip
    assert made.args.mode == mode
    before = state(made.model)
    made.train()
    after = state(made.model)
    masks = {name for name in after if "gates" in name or "regulariser" in name}
    assert len(masks) == (2 if fixed else 4) and len(after) == len(masks) + 21
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    expected = {"masks": masks, "masks and weights": set(after), "weights with fixed masks": set(after) - masks}[mode]
    assert changed == expected
    assert not fallbacks(), "a branch ran dense"
    if fixed:
        assert made.learning.table().tolist() == [[1, 0], [0, 1]]


def test_groups(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, freeze_non_mask_parameters=False, weight_decay=0.1, mask_learning_rate=0.5, reg_learning_rate=0.25
    )
    groups = made.create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-5, 0.1), (1e-5, 0), (0.5, 0), (0.25, 0)]
    assert [len(group["params"]) for group in groups] == [16, 5, 2, 2]
    assert [id(p) for group in groups[2:] for p in group["params"]] == [id(p) for p in made.mask_parameters]


def test_masks_are_clipped_apart(tmp_path: Path) -> None:
    """One step of plain descent moves each set of parameters by its rate times its own clip."""
    made = trainer(
        tmp_path, max_steps=1, optim="sgd", lr_scheduler_type="constant", freeze_non_mask_parameters=False,
        learning_rate=0.5, max_grad_norm=0.25, mask_max_grad_norm=1e-3, start_head_sparsity=0.5,
    )  # fmt: skip
    before = state(made.model)
    made.train()
    moved = {name: value - before[name] for name, value in state(made.model).items()}
    masks = [value.flatten() for name, value in moved.items() if "gates" in name or "regulariser" in name]
    weights = [value.flatten() for name, value in moved.items() if not ("gates" in name or "regulariser" in name)]
    assert float(torch.cat(masks).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert float(torch.cat(weights).norm()) == pytest.approx(0.125, rel=1e-3)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_multipliers_climb_by_the_distance_to_the_target(accumulated: int, tmp_path: Path) -> None:
    """However many batches a step has, the penalty counts once."""
    made = trainer(
        tmp_path, max_steps=1, optim="sgd", lr_scheduler_type="constant", start_head_sparsity=0.3,
        gradient_accumulation_steps=accumulated, mask_max_grad_norm=0.0, reg_learning_rate=2.0,
    )  # fmt: skip
    excess = float(made.learning.sparsity().detach()) - 0.3
    made.train()
    assert [float(x.detach()) for x in made.multipliers] == pytest.approx([2 * excess, 2 * excess**2], rel=1e-5)


def test_targets_of_layers(tmp_path: Path) -> None:
    made = trainer(tmp_path, enable_layerwise_sparsity=True, start_head_sparsity=0.4, layerwise_sparsity_power=2.0)
    made.state.max_steps = 4
    with torch.no_grad():
        for multiplier in made.multipliers:
            multiplier.fill_(3.0)
        made.gates[0].fill_(-1.0)
        sparsity = 1 - torch.stack([torch.sigmoid(x + 1.59859).mean() for x in made.gates])
        excess = sparsity - layerwise_targets(0.4, 2, power=2.0)
        assert float(made._penalty()) == pytest.approx(float((3 * excess + 3 * excess**2).mean()), rel=1e-4)


def test_sparsity_follows_its_target(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=20, end_head_sparsity=0.5, sparsity_warmup_ratio=0.5)
    made.train()
    logs = [entry for entry in made.state.log_history if "sparsity" in entry]
    targets = [entry["target_sparsity"] for entry in logs]
    assert len(logs) == 20 and targets[:3] == pytest.approx([0.05, 0.1, 0.15]) and targets[-1] == 0.5
    assert logs[0]["sparsity"] < 0.01 and 0.3 < logs[-1]["sparsity"] < 0.9
    assert logs[5]["lambda_1"] < 0 < logs[5]["lambda_2"]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["objective_loss"] + entry["penalty"], abs=1e-4)
    quantiles = [logs[-1][f"gate_q{level}"] for level in (10, 25, 50, 75, 90)]
    assert quantiles == sorted(quantiles) and quantiles[0] >= 0
    assert made.learning.table().flatten().quantile(0.5) == pytest.approx(quantiles[2])


def test_distillation(tmp_path: Path) -> None:
    """Against the unpatched model and the same draw; only tokens before a label count."""
    plain = tiny.llama()
    made = trainer(tmp_path, objective="distill", max_steps=1)
    made.model.train()
    batch = collate(rows(1))
    batch["labels"] = batch["labels"].clone().index_fill_(1, torch.arange(LENGTH - 40), -100)
    labelled = batch["labels"][0, 1:] != -100
    with torch.no_grad():
        exact = plain(batch["input_ids"], output_hidden_states=True).hidden_states[-1][0, :-1]
        torch.manual_seed(3)
        student = made.model(**batch, output_hidden_states=True, use_cache=False).hidden_states[-1][0, :-1]
    wanted = (student - exact)[labelled].square().mean()
    torch.manual_seed(3)
    loss = made._distilled(made.model, batch, None)
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-4) and float(wanted) > 1e-6
    loss.backward()
    assert any(bool((gate.grad != 0).any()) for gate in made.gates if gate.grad is not None)
    assert all(parameter.grad is None for name, parameter in made.model.named_parameters() if "gates" not in name)
    # A count of the whole step: this batch's share of its mean.
    torch.manual_seed(3)
    share = made._distilled(made.model, batch, torch.tensor(2 * int(labelled.sum())))
    assert float(share.detach()) == pytest.approx(float(wanted) / 2, rel=1e-4)
    for gates in made.learning.gates:
        gates.fix(torch.ones(2, dtype=torch.bool))
    assert float(made._distilled(made.model, batch, None)) < 1e-9, "with all heads full it is its own teacher"


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", freeze_non_mask_parameters=False, save_strategy="steps", save_steps=2)
    whole.train()
    torch.manual_seed(5)  # the checkpoint brings the state of the generator
    model = tiny.llama()
    nn.init.normal_(model.lm_head.weight)  # and the weights
    rest = trainer(tmp_path / "b", model, freeze_non_mask_parameters=False, save_strategy="steps", save_steps=2)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert torch.equal(learned(rest), learned(whole)) and rest.state.global_step == 4
    assert torch.equal(rest.model.lm_head.weight, whole.model.lm_head.weight)


def test_gradient_checkpointing_draws_the_same_gates(tmp_path: Path) -> None:
    made = [trainer(tmp_path, gradient_checkpointing=on, max_steps=3) for on in (False, True)]
    for each in made:
        each.train()
    assert made[1].model.is_gradient_checkpointing
    assert torch.allclose(learned(made[0]), learned(made[1]), rtol=1e-5)


def test_bf16_leaves_the_gates_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, tiny.llama().to(torch.bfloat16), bf16=True, max_steps=3, mask_learning_rate=1e-3)
    before = learned(made)
    made.train()
    after = learned(made)
    assert after.dtype == torch.float32 and made.model.lm_head.weight.dtype == torch.bfloat16
    steps = (after - before)[:4].abs()  # bfloat16 has steps of 1/64 here
    assert bool(((steps > 1e-4) & (steps < 5e-3)).all()), steps


def records(file: Path) -> list[bytes]:
    """The records of an event file, as TensorBoard frames them: length, check sum, bytes, check sum."""
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        found.append(data[at + 12 : at + 12 + length])
        at += 16 + length
    return found


def test_logs_for_tensorboard(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    made = trainer(tmp_path, max_steps=3, report_to="tensorboard")
    made.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    seen: dict[str, dict[int, float]] = {}
    for event in map(Event.FromString, records(file)):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                seen.setdefault(value.tag, {})[event.step] = value.simple_value
    names = ("loss", "objective_loss", "sparsity", "target_sparsity", "lambda_1", "lambda_2", "gate_q10", "gate_q90")
    for name in names:
        assert seen[f"train/{name}"].keys() == {1, 2, 3}, name
    logged = {entry["step"]: entry["sparsity"] for entry in made.state.log_history if "sparsity" in entry}
    assert seen["train/sparsity"] == pytest.approx(logged)


def test_what_is_written(tmp_path: Path) -> None:
    """Tables that the readers take, and a model that is loaded without a trace of gates."""
    made = trainer(tmp_path, max_steps=2, freeze_non_mask_parameters=False, end_head_sparsity=0.5)
    made.train()
    table, weights = made.learning.table(), {n: p for n, p in state(made.model).items() if "gates" not in n}
    folder = made.finish()
    assert folder == tmp_path / MASKS
    read = streaming_heads(folder, query_heads=2, sparsity=0.5)
    assert (read[0].sink_tokens, read[0].local_tokens) == (128, 128) and len(read) == 2
    values = [
        [float(x) for x in line.split()] for line in (folder / "full_attention_heads.tsv").read_text().splitlines()
    ]
    assert torch.allclose(torch.tensor(values), table)
    rounded = streaming_heads(folder / "masks_sp0.5.tsv", query_heads=2)
    assert sum(int(torch.as_tensor(layer.dense_heads).sum()) for layer in rounded) == 2
    assert not any("gates" in name or "regulariser" in name for name, _ in made.model.named_parameters())
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["unexpected_keys"] and not notes["missing_keys"] and loaded.config.use_cache
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.named_parameters())
    trainer(tmp_path, made.model)  # and gates can be learned again


def test_begins_with_a_table(tmp_path: Path) -> None:
    (tmp_path / "table.tsv").write_text(TABLE)
    made = trainer(tmp_path, load_masks_from=str(tmp_path / "table.tsv"))
    assert [gate.tolist() for gate in made.gates] == [[10, -10], [-10, 10]]
    (tmp_path / "soft.tsv").write_text("0.9\t0.1\n0.8\t0.3\n")
    made = trainer(tmp_path, load_masks_from=str(tmp_path / "soft.tsv"), load_masks_sparsity=0.25)
    assert [gate.tolist() for gate in made.gates] == [[10, -10], [10, 10]]
    with pytest.raises(ValueError, match="give sparsity"):
        trainer(tmp_path, load_masks_from=str(tmp_path / "soft.tsv"))
    (tmp_path / "wide.tsv").write_text("1\t0\t1\t0\n" * 2)
    with pytest.raises(ValueError, match="2"):
        trainer(tmp_path, load_masks_from=str(tmp_path / "wide.tsv"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(freeze_mask_parameters=True), "nothing to train"),
        (dict(freeze_mask_parameters=True, freeze_non_mask_parameters=False), "needs load_masks_from"),
        (dict(fp16=True), "use bf16"),
        (dict(mask_learning_rate=-1.0), "mask_learning_rate must be 0 or more, got -1.0"),
        (dict(min_lr_ratio=2.0), "min_lr_ratio must be in"),
        (dict(seq_parallel_size=0), "seq_parallel_size must be 1 or more, got 0"),
        (dict(toggle_type="loca"), "toggle_type must be one of"),
        (dict(end_head_sparsity=1.5), "end_head_sparsity must be in"),
    ],
)
def test_wrong_options(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_wrong_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patch it first"):
        MaskTrainer(tiny.llama(), options(tmp_path))
    with pytest.raises(TypeError, match="MaskTrainingArguments"):
        MaskTrainer(patch(tiny.llama()), None)  # type: ignore[arg-type]
    made = trainer(tmp_path)
    made.finish()
    restore(made.model)
    assert not any("gates" in name for name, _ in made.model.named_modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_two_processes_learn_what_one_does(kind: str, tmp_path: Path) -> None:
    """Two ranks with a row each, one with both; FSDP2 shards the weights, and goes on from its own checkpoint."""
    alone = trainer(tmp_path / "one", per_device_train_batch_size=2, **SHARED)
    alone.train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(HERE.parents[1]), str(HERE)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "mask_training.py"), kind, str(tmp_path)], text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(output[-2500:] for output in outputs)
    got = torch.load(tmp_path / "learned.pt")
    assert torch.allclose(got, learned(alone), rtol=1e-4, atol=1e-5), (got, learned(alone))
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in alone.model.state_dict().items():
        if name in weights:
            assert torch.allclose(weights[name], value, rtol=1e-3, atol=1e-4), name
