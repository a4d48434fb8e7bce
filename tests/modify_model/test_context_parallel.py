"""Ulysses on two processes (gloo): every rank takes its heads' thresholds, and the result is that of one device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from two_ranks import outputs_of_two_ranks

from modify_model.context_parallel import Exchange, exchange_for

WORKER = """
import sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from diffusers import ContextParallelConfig
from families import CASES, run
from autotune import calibrate
from autotune.module import sparse_modules
from autotune.tuned import PV_OFF, Tuned
from modify_model import patch
from spas_attn import fallback_counts

folder, kind, rank, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), 2
names = sys.argv[4:]
device = torch.device(kind, rank if kind == "cuda" else None)
if kind == "cpu":
    torch.accelerator.device_count = lambda: 1  # diffusers does not count a CPU as a device
else:
    torch.cuda.set_device(device)
backend = {"cpu": "gloo", "cuda": "nccl"}[kind]
dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
mesh = dist.device_mesh.init_device_mesh(kind, (1, size), mesh_dim_names=("ring", "ulysses"))
for name in names:
    case = CASES[name]
    model, inputs = case.model().to(device), case.inputs()
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    if "encoder_attention_mask" in inputs and name == "LTX-Video":
        inputs["encoder_attention_mask"] = None  # diffusers' own cross-attention fails with one under Ulysses (0.42)
    patch(model, backend="auto" if kind == "cpu" else "triton")
    thresholds = torch.tensor([0.2, 0.5])  # of two heads: each rank has one of them
    for layer in sparse_modules(model).values():
        layer.set_thresholds(Tuned(torch.tensor([True, True]), thresholds, -torch.ones(2), torch.full((2,), PV_OFF)))
        layer.record_density = True
    with torch.no_grad():
        alone = run(model, inputs)
        densities = [layer.last_density[0] for layer in sparse_modules(model).values()]
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size, mesh=mesh))
        shared = run(model, inputs)
    error = float((shared - alone).norm() / alone.norm())
    assert error < 1e-5, (name, error)
    for layer, whole in zip(sparse_modules(model).values(), densities):
        own, whole = layer.last_density[0].cpu(), whole.cpu()
        assert own.shape == (1,) and float((own - whole[rank]).abs()) < 1e-6, (name, own, whole)
        assert 0 < float(own) < 0.97, (name, own)
    assert not fallback_counts(), fallback_counts()
    if name == names[0]:
        try:
            with calibrate(model) as calibration, torch.no_grad():
                for _ in calibration.prompts([0]):
                    run(model, inputs)
        except ValueError as error:
            assert "without enable_parallelism" in str(error), error
        else:
            raise AssertionError("a calibration under parallelism went through")
    print("right", name)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_one_device(kind: str, tmp_path: Path) -> None:
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    names = ["Wan", "Flux", "QwenImage", "LTX-Video"]
    outputs = outputs_of_two_ranks(WORKER, [str(tmp_path), kind], names)
    assert all(f"right {name}" in output for name in names for output in outputs)


def _mesh_like(degree: int, ring: int = 1) -> object:
    from types import SimpleNamespace

    mesh = SimpleNamespace(get_group=lambda: None, get_local_rank=lambda: 1)
    parallel = SimpleNamespace(ring_degree=ring, ulysses_degree=degree, _ulysses_mesh=mesh)
    return SimpleNamespace(context_parallel_config=parallel)


def test_what_it_does_not_serve() -> None:
    made, why = exchange_for(_mesh_like(2), 4, ((0, 8),))
    assert (made, why) == (Exchange(None, 1, 2, (0, 8)), None)
    assert "3 heads do not divide" in str(exchange_for(_mesh_like(2), 3, ())[1])
    assert "ring attention" in str(exchange_for(_mesh_like(1, ring=2), 4, ())[1])
    assert "several ranges" in str(exchange_for(_mesh_like(2), 4, ((0, 8), (9, 10)))[1])


@pytest.mark.parametrize("text", [(0, 0), (0, 5), (3, 8)])
def test_order_of_one_device(text: tuple[int, int]) -> None:
    """Parts come with their text; put together, all text stands where one device has it."""
    start, stop = text
    parts = torch.arange(2 * 8).view(2, 8)  # the tokens of each rank
    exchange = Exchange(None, 0, 2, text)
    whole = exchange._joined(parts)
    both = [parts[:, a:b].flatten() for a, b in ((0, start), (start, stop), (stop, 8))]
    assert torch.equal(whole, torch.cat(both))
    assert torch.equal(exchange._apart(whole[:, None])[..., 0], parts)
