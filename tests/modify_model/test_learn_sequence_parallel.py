"""Gates under Ulysses on two processes (gloo): every rank takes its heads' gates; gradients are those of one device."""

from __future__ import annotations

from pathlib import Path

from two_ranks import outputs_of_two_ranks

WORKER = """
import sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from tiny_transformers import make
from ulysses import part_of, ulysses, whole_of
from autotune.learn import Regulariser, learn
from modify_model import patch

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
LENGTH = 512
ids = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
one = torch.arange(LENGTH)[None]
packed = torch.cat([torch.arange(n) for n in (350, 100, 62)])[None]


def close(got, expected, what):
    error = float((got - expected).norm() / expected.norm())
    assert error < 1e-4, (what, error)


for heads in (2, 1):  # one KV head: both ranks hold it, with their own query heads
    model = patch(make("Llama", "sdpa", num_key_value_heads=heads))
    learning = learn(model, sink_size=64, window=64)
    with torch.no_grad():
        for index, gates in enumerate(learning.gates):
            gates.log_alpha.copy_(torch.tensor([-0.5, 0.6])[:heads] - 0.2 * index)
    regulariser = Regulariser()
    with torch.no_grad():
        regulariser.lambda_1.fill_(3.0), regulariser.lambda_2.fill_(2.0)
    for positions in (one, packed):
        what = (heads, "packed" if positions is packed else "one sequence")
        model.zero_grad()
        logits = model(ids, position_ids=positions, use_cache=False).logits
        (logits.square().mean() + regulariser(learning.sparsity(), 0.7)).backward()
        alone = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        with ulysses(model):
            part = model(part_of(ids), position_ids=part_of(positions), use_cache=False).logits
        loss = part.square().mean() + regulariser(learning.sparsity(), 0.7)
        close(whole_of(part.detach()), logits.detach(), what)
        # The exchange back is part of the graph: all ranks run their backward pass together.
        with ulysses(model):
            loss.backward()
        for name, p in model.named_parameters():
            dist.all_reduce(p.grad)
            close(p.grad / 2, alone[name], (*what, name))
        model.zero_grad()
        # The penalty's own gradient needs no exchange, and each rank has all of it.
        regulariser(learning.sparsity(), 0.7).backward()
        assert all(float(gates.log_alpha.grad.abs().min()) > 1e-3 for gates in learning.gates)
    table = torch.zeros(2, heads)
    table[0, 0] = 1
    learning.freeze(table)
    with torch.no_grad():
        expected = model(ids, position_ids=packed, use_cache=False).logits
        with ulysses(model):
            close(whole_of(model(part_of(ids), position_ids=part_of(packed), use_cache=False).logits), expected, heads)
dist.barrier()
dist.destroy_process_group()
print("right")
"""


def test_gates_of_two_ranks_are_those_of_one_device(tmp_path: Path) -> None:
    outputs = outputs_of_two_ranks(WORKER, [str(tmp_path)])
    assert all("right" in output for output in outputs)
