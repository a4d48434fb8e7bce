"""DeepSpeed's sequence parallelism (Ulysses) of transformers' models: whose heads a call of attention holds, its mask.

``UlyssesSPAttentionHF.register_with_transformers`` puts an exchange around the attention function that is registered
under the name of a model's implementation (arXiv 2309.14509, 2506.13996): before attention, the ranks exchange parts of
the sequence for heads. The function then sees the whole sequence of one rank's share of the heads, equal parts in
order, KV heads repeated where there are fewer of them than ranks. The exchange drops the mask, which was made for a
part of the sequence, and gathers ``position_ids``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from autotune import SparseAttention

from .masks import PreparedMask

AROUND_ANOTHER = (
    "DeepSpeed's sequence parallelism was set up around another attention than this model runs: after patching, call "
    "register_with_transformers(model, core_attn_implementation=model.config._attn_implementation, ...)"
)

# What whole_mask made last: of which positions and config, in which dtype.
_last: tuple[Tensor, Any, torch.dtype, Any] | None = None


def share_of(held: tuple[int, int] | None, heads: int, inner: SparseAttention) -> tuple[int, int] | None:
    """(rank, size) of a call by the heads that it holds; None for all of them (no exchange during evaluation).

    Args:
        held: what :func:`autotune.ulysses.deepspeed_ranks` says.
        heads: query heads of the call.
        inner: the layer's attention.

    Raises:
        ValueError: for thresholds of heads that are split in another way (tensor parallelism).
    """
    if heads == inner.heads:
        return None
    if held is not None and heads * held[1] == inner.heads:
        return held
    if inner.mode == "dense":
        return None
    raise ValueError(
        f"an attention layer with {inner.heads} query heads was called with {heads}: heads split over devices are "
        "served under DeepSpeed's sequence parallelism only"
    )


def whole_mask(module: Any, query: Tensor, positions: Any) -> Any:
    """The mask of the whole sequence, which transformers would have made of it without a padding mask.

    Packed sequences are kept apart by their positions, as on one device: for one row, where they start again. The mask
    is kept until positions change, because all layers share it; the comparison waits for the device once a layer.

    Args:
        module: the attention layer.
        query: ``[B, H, L, D]``.
        positions: ``position_ids`` as the exchange gathered them, ``[B or 1, L]``.
    """
    global _last
    if not isinstance(positions, Tensor) or positions.shape[-1] != query.shape[2]:
        return None
    known = _last
    same = known is not None and known[1] is module.config and known[2] == query.dtype
    if known is None or not same or not _equal(known[0], positions):
        known = _last = (positions, module.config, query.dtype, _masks(module.config, query[:, 0], positions))
    masks = known[3]
    if isinstance(masks, dict):
        masks = masks.get(module.config.layer_types[module.layer_idx])
    return masks if isinstance(masks, PreparedMask) else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _masks(config: Any, inputs: Tensor, positions: Tensor) -> Any:
    """The masks of a forward without a cache, by layer type where the model has several."""
    known = {
        "config": config, "inputs_embeds": inputs, "input_embeds": inputs, "attention_mask": None,
        "past_key_values": None, "position_ids": positions,
        "cache_position": torch.arange(inputs.shape[1], device=inputs.device),
    }  # fmt: skip
    names = inspect.signature(create_masks_for_generate).parameters  # which differ between versions
    return create_masks_for_generate(**{name: value for name, value in known.items() if name in names})


def ulysses_config(model: Any, size: int, world: int) -> Any:
    """accelerate's ParallelismConfig for DeepSpeed's Ulysses around the attention of a patched model of transformers.

    Args:
        model: the patched model.
        size: processes that hold a sequence together.
        world: processes in all.

    Raises:
        ValueError: when they do not divide.
    """
    from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig

    if world % size:
        raise ValueError(f"seq_parallel_size must divide the {world} processes, got {size}")
    handler = DeepSpeedSequenceParallelConfig()
    # The constructor knows accelerate's own names only; DeepSpeed takes any that is registered.
    handler.sp_attn_implementation = model.config._attn_implementation
    return ParallelismConfig(sp_backend="deepspeed", sp_size=size, dp_shard_size=world // size, sp_handler=handler)


def without_bounds(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that DeepSpeed can cut into parts: without the bounds of its documents, which positions tell too."""
    return {name: x for name, x in batch.items() if not name.startswith(("cu_seq_lens", "max_length"))}
