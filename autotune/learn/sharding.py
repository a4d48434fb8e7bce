"""Gates under FSDP2: units of their own, so that they stay float32 where the model computes in half precision."""

from __future__ import annotations

from typing import Any

from ..module import sparse_modules


def shard_gates(model: Any, **options: Any) -> None:
    """Make the gates of each layer a unit of FSDP2, before the layers and the model become units themselves.

    A unit has one mixed precision: inside the layer's, gates would be cast to bfloat16 for the forward, which has
    steps of 1/64 around 4, where they begin.

    Args:
        model: that has gates.
        options: of ``torch.distributed.fsdp.fully_shard``, such as ``mesh``.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(), "reshard_after_forward": False, **options}
    for module in sparse_modules(model).values():
        if module.gates is not None:
            fully_shard(module.gates, **settings)
