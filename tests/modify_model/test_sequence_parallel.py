"""DeepSpeed's Ulysses on two processes (gloo): every rank takes its heads' thresholds; the result is one device's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_transformers import make
from two_ranks import outputs_of_two_ranks

from modify_model import patch, sequence_parallel

WORKER = """
import os, sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from tiny_transformers import make
from ulysses import part_of, say, ulysses, whole_of
from autotune import calibrate
from autotune.module import sparse_modules
from autotune.tuned import PV_OFF, Tuned
from modify_model import patch
from spas_attn import fallback_counts
from spas_attn.selectors import MeanSimilarity

folder, kind, rank, size, real = sys.argv[1], sys.argv[2], int(sys.argv[3]), 2, sys.argv[4] == "real"
device = torch.device(kind, rank if kind == "cuda" else None)
if kind == "cuda":
    torch.cuda.set_device(device)
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
backend = {"cpu": "gloo", "cuda": "nccl"}[kind]
dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)

LENGTH = 512
ids = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
one = torch.arange(LENGTH, device=device)[None]
packed = torch.cat([torch.arange(n, device=device) for n in (290, 140, 82)])[None]
# name of the model, implementation, changes of its config, whether its layers can be sparse
CASES = {
    "grouped queries": ("Llama", "sdpa", {}, True),
    "one KV head for both ranks": ("Llama", "sdpa", dict(num_key_value_heads=1), True),
    "eager": ("Llama", "eager", {}, True),
    "window": ("Qwen2 SWA", "sdpa", {}, True),
    "softcap and window": ("Gemma 2", "eager", {}, False),
}


def close(got, expected, what, ratio=1e-5 if kind == "cpu" else 1e-4):
    error = float((got - expected).norm() / expected.norm())
    assert error < ratio, (what, error)


def run(model, positions, shared):
    inputs = dict(input_ids=ids, position_ids=positions)
    inputs = {k: part_of(x) for k, x in inputs.items()} if shared else inputs
    logits = model(**inputs, use_cache=False).logits
    return whole_of(logits) if shared else logits


for case, (name, attention, changes, can_be_sparse) in CASES.items():
    model = make(name, attention, **changes).to(device)
    dense = torch.tensor([False, True, False, False])
    selector = MeanSimilarity(pool=16, local=0, block_q=64, block_k=64, dense_heads=dense)
    patch(model, backend="auto" if kind == "cpu" else "triton", selector=selector)
    layers = sparse_modules(model).values()
    thresholds = torch.tensor([0.1, 0.9, 0.5, 0.3])
    sparse = torch.tensor([True, True, True, False])
    for mode in ("dense", "sparse"):
        if mode == "sparse":
            for layer in layers:
                layer.set_thresholds(Tuned(sparse, thresholds, -torch.ones(4), torch.full((4,), PV_OFF)))
                layer.record_density = True
        for positions in (one, packed):
            what = (case, mode, "packed" if positions is packed else "one sequence")
            before = sum(fallback_counts().values())
            with torch.no_grad():
                alone = run(model, positions, False)
                whole = [layer.last_density for layer in layers]
                dense_calls, before = sum(fallback_counts().values()) - before, sum(fallback_counts().values())
                with ulysses(model, real):
                    shared = run(model, positions, True)
            close(shared, alone, what)
            assert sum(fallback_counts().values()) - before == dense_calls, (what, fallback_counts())
            if mode == "sparse" and can_be_sparse:
                assert dense_calls == 0, (what, fallback_counts())
                for layer, density in zip(layers, whole):
                    own, expected = layer.last_density[0], density[0].view(2, -1)[rank]
                    assert own.shape == (2,) and torch.allclose(own, expected), (what, own, density)
                    assert float(density[0, 0]) < 0.9 < float(density[0, 1]), (what, density)

# Gradients of a model that is not tuned.
model = make("Llama", "sdpa").to(device).train()
patch(model)
run(model, packed, False).square().sum().backward()
alone = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()
with ulysses(model, real):
    inputs = {"input_ids": part_of(ids), "position_ids": part_of(packed)}
    model(**inputs, use_cache=False).logits.square().sum().backward()
for name, p in model.named_parameters():
    dist.all_reduce(p.grad)
    close(p.grad, alone[name], name)
model.eval()

# What it refuses.
def refused(text, work):
    try:
        work()
    except ValueError as error:
        assert text in str(error), error
    else:
        raise AssertionError(text)


with ulysses(model, real):
    refused("calibrate before that", lambda: calibrate(model))
if not real:
    say(rank, size)
    refused("set up around another attention", lambda: run(model, one, True))
print("right")
dist.destroy_process_group()
"""


def run(folder: Path, kind: str, which: str) -> None:
    outputs = outputs_of_two_ranks(WORKER, [str(folder), kind], [which])
    assert all("right" in output for output in outputs)


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_one_device(kind: str, tmp_path: Path) -> None:
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    run(tmp_path, kind, "double")


@pytest.mark.slow
def test_equals_one_device_under_deepspeed_itself(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    run(tmp_path, "cpu", "real")


def test_heads_that_are_split_otherwise() -> None:
    inner = SimpleNamespace(heads=8, mode="sparse")
    assert sequence_parallel.share_of(None, 8, inner) is None
    assert sequence_parallel.share_of((1, 2), 8, inner) is None  # no exchange during evaluation
    assert sequence_parallel.share_of((1, 2), 4, inner) == (1, 2)
    for held, heads in ((None, 4), ((1, 2), 2)):
        with pytest.raises(ValueError, match=f"8 query heads was called with {heads}"):
            sequence_parallel.share_of(held, heads, inner)
    assert sequence_parallel.share_of(None, 4, SimpleNamespace(heads=8, mode="dense")) is None


def test_options_for_the_trainer() -> None:
    pytest.importorskip("accelerate")
    model = patch(make("Llama", "sdpa"))
    config = sequence_parallel.ulysses_config(model, 2, 6)
    assert (config.sp_size, config.dp_shard_size, config.sp_backend) == (2, 3, "deepspeed")
    assert config.sp_handler.sp_attn_implementation == model.config._attn_implementation != "sdpa"
    with pytest.raises(ValueError, match="seq_parallel_size must divide the 4 processes, got 3"):
        sequence_parallel.ulysses_config(model, 3, 4)
    batch = dict(input_ids=1, labels=2, position_ids=3, cu_seq_lens_q=4, max_length_q=5)
    assert sequence_parallel.without_bounds(batch) == dict(input_ids=1, labels=2, position_ids=3)
