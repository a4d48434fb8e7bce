"""Which of the ranks that split the heads of every layer among them this process is, as DeepSpeed knows it."""

from __future__ import annotations

import sys

import torch.distributed as dist
from torch import Tensor

from spas_attn.traced import constant_when_traced

STATE = "deepspeed.runtime.sequence_parallel.parallel_state_sp"


@constant_when_traced
def deepspeed_ranks() -> tuple[int, int] | None:
    """(rank, size) among the processes that hold a sequence together under DeepSpeed's sequence parallelism (Ulysses,
    arXiv 2309.14509), each with an equal part of the heads in order; None where it is not set up.
    """
    state = sys.modules.get(STATE)  # it is imported where sequence parallelism is set up
    if state is None:
        return None
    try:
        size = state.get_sequence_parallel_world_size()
        return (state.get_sequence_parallel_rank(), size) if size > 1 else None
    except AssertionError:  # there are no groups
        return None


def mean_over_parts(x: Tensor) -> Tensor:
    """The mean, over the ranks that hold a sequence together, of a tensor that each has; without gradients."""
    state = sys.modules[STATE]
    total = x.detach().float()
    dist.all_reduce(total, group=state.get_sequence_parallel_group())
    return total / state.get_sequence_parallel_world_size()
