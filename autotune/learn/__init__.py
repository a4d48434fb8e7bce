"""Learning which KV heads need everything (PruLong, arXiv 2506.17121; DuoAttention, arXiv 2410.10819)."""

from .gates import HeadGates
from .learning import Learning, learn
from .objective import Regulariser, SparsityTarget, distillation_loss, layerwise_targets
from .separation import Separation
from .sharding import shard_gates

__all__ = [
    "HeadGates",
    "Learning",
    "Regulariser",
    "Separation",
    "SparsityTarget",
    "distillation_loss",
    "layerwise_targets",
    "learn",
    "shard_gates",
]
