"""Gates under FSDP2 on two processes (gloo): float32 in a bfloat16 model, with the gradients of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKER = """
import copy, sys, warnings
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from autotune import SparseAttention
from autotune.learn import HeadGates, Regulariser, learn, shard_gates
from spas_attn.selectors import Streaming

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 128), nn.Linear(64, 64)
        self.inner = SparseAttention(selector=Streaming(block_q=64, block_k=64))
        self.inner.set_heads(4)
        self.inner.kv_heads = 2

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in self.qkv(x).split([64, 32, 32], -1))
        dense = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.out(self.inner(q, k, v, dense=dense, is_causal=True, scale=0.25).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.training else layer(x)
        return x


def make(seed=0):
    torch.manual_seed(seed)
    model = Model()
    handle = learn(model, sink_size=64, window=64)
    with torch.no_grad():
        for gates in handle.gates:
            gates.log_alpha.copy_(torch.tensor([-0.301, 0.402]))
    return model, handle


def loss_of(model, handle, which, regulariser):
    x = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(which))
    return model(x).float().square().mean() + regulariser(handle.sparsity(), 0.7)


def multipliers():
    regulariser = Regulariser()
    with torch.no_grad():
        regulariser.lambda_1.fill_(1.0), regulariser.lambda_2.fill_(2.0)
    return regulariser


def sharded(policy):
    model, handle = make()
    shard_gates(model, mesh=mesh)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, handle


alone, handle = make()
regulariser = multipliers()
alone.eval()
(sum(loss_of(alone, handle, which, regulariser) for which in (0, 1)) / 2).backward()

model, spread = sharded(MixedPrecisionPolicy())
again = multipliers()
model.eval()
loss_of(model, spread, rank, again).backward()
for one, other in zip(alone.named_parameters(), model.named_parameters(), strict=True):
    assert one[0] == other[0]
    expected, got = one[1].grad, other[1].grad.full_tensor()
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-7), (one[0], got, expected)
assert handle.gates[0].log_alpha.grad.abs().min() > 1e-6
for name in ("lambda_1", "lambda_2"):
    assert torch.allclose(getattr(again, name).grad, getattr(regulariser, name).grad)
assert torch.equal(spread.table(), handle.table()) and spread.gates[0].log_alpha.full_tensor().shape == (2,)

seen = []
sample = HeadGates.sample
HeadGates.sample = lambda gates: seen.append(gates.log_alpha.detach().clone()) or sample(gates)
model, spread = sharded(MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
again = multipliers()
groups = [
    {"params": [g.log_alpha for g in spread.gates], "lr": 0.5},
    {"params": [p for n, p in model.named_parameters() if "gates" not in n], "lr": 1e-3},
    {"params": list(again.parameters()), "lr": 0.5},
]
optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
model.train()
torch.manual_seed(rank)  # every rank draws its own gates
for step in range(3):
    loss_of(model, spread, 2 * step + rank, again).backward()
    if step == 0:
        assert [x.dtype for x in seen] == [torch.float32] * 6, "three layers, each run twice"
        assert all(torch.equal(x, torch.tensor([-0.301, 0.402])) for x in seen), seen
        assert spread.gates[0].log_alpha.grad.dtype == torch.float32
    optimiser.step()
    optimiser.zero_grad()
assert again.lambda_2 > 2
tables = [None, None]
dist.all_gather_object(tables, (spread.table(), again.lambda_1.item()))
assert torch.equal(tables[0][0], tables[1][0]) and tables[0][1] == tables[1][1]
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
key = "layers.1.inner.gates.log_alpha"
if rank == 0:
    assert state[key].dtype == torch.float32 and state[key].shape == (2,)
spread.freeze(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
assert spread.gates[0].log_alpha.full_tensor().tolist() == [10, -10]
out = model(torch.randn(1, 300, 64))
out.float().square().mean().backward()
assert spread.gates[0].log_alpha.grad is None and model.layers[0].qkv.weight.grad is not None
dist.barrier()
dist.destroy_process_group()
print("done")
"""


def test_two_processes_with_fsdp2(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(rank)], env=environment, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=120)[0])
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "done" in output, output
