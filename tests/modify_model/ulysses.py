"""A double of DeepSpeed's ``UlyssesSPAttentionHF.register_with_transformers``, for machines without DeepSpeed.

It does what that one does to an attention function: it takes its place under the registered name, drops the mask,
gathers ``position_ids``, exchanges parts of the sequence for heads and back with gradients, repeats KV heads where
there are fewer than ranks, and says which rank this is in the place where DeepSpeed does.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

STATE = "deepspeed.runtime.sequence_parallel.parallel_state_sp"


class _Swap(torch.autograd.Function):
    """``[size, ...]``: part r to rank r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Swap.forward(ctx, grad)


def register(model: Any) -> None:
    """Split the sequences of a model over all ranks."""
    size, rank, name = dist.get_world_size(), dist.get_rank(), model.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def to_heads(x: Tensor) -> Tensor:
        """``[B, H, part, D]`` to ``[B, H / size, whole, D]``."""
        x = x.repeat_interleave(max(1, size // x.shape[1]), dim=1)
        return _Swap.apply(x.unflatten(1, (size, -1)).movedim(1, 0)).movedim(0, 2).flatten(2, 3)

    def exchanged(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        positions = whole_of(kwargs["position_ids"])
        q, k, v = (to_heads(x) for x in (query, key, value))
        if key.shape[1] < size:
            module.num_key_value_groups = q.shape[1] // k.shape[1]
        out, weights = attend(module, q, k, v, None, **(kwargs | {"position_ids": positions}))
        parts = _Swap.apply(out.unflatten(1, (size, -1)).movedim(1, 0))  # [size, B, part, H / size, D]
        return parts.movedim(0, 2).flatten(2), weights

    ALL_ATTENTION_FUNCTIONS[name] = exchanged
    say(rank, size)


def say(rank: int, size: int) -> None:
    """Say which rank this is, as DeepSpeed does."""
    state: Any = SimpleNamespace(get_sequence_parallel_rank=lambda: rank, get_sequence_parallel_world_size=lambda: size)
    sys.modules[STATE] = state


def register_deepspeed(model: Any) -> None:
    """The real one."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed(dist.get_backend())
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=model.config._attn_implementation,
        sequence_parallel_size=dist.get_world_size(), micro_batch_size=1,
    )  # fmt: skip


@contextlib.contextmanager
def ulysses(model: Any, real: bool = False) -> Iterator[None]:
    """Split the sequences of a model for a while."""
    name = model.config._attn_implementation
    groups = {m: m.num_key_value_groups for m in model.modules() if hasattr(m, "num_key_value_groups")}
    (register_deepspeed if real else register)(model)
    try:
        yield
    finally:
        for module, count in groups.items():  # which DeepSpeed changes for good
            module.num_key_value_groups = count
        del ALL_ATTENTION_FUNCTIONS[name]  # what was put over the registered function
        if real:
            importlib.import_module(STATE)._release_sequence_parallel_groups()
        else:
            del sys.modules[STATE]


def part_of(x: Tensor) -> Tensor:
    """This rank's part of ``[B, L]``."""
    return x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def whole_of(part: Tensor) -> Tensor:
    """``[B, part, ...]`` of all ranks as ``[B, L, ...]``."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, dim=1)
