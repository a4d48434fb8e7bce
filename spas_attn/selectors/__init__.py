"""Selectors: rules that choose which key blocks each query block attends to, one file for each."""

from .base import Selector, Union
from .by_head import ByHead
from .dense import Dense
from .exact_keys import ExactKeys
from .flash_prefill import FlashPrefill
from .flex_prefill import FlexPrefill
from .mean_similarity import MeanSimilarity
from .minference import MInference
from .peak_mass import PeakMass
from .row_share import RowShare
from .streaming import Streaming
from .tokens import Tokens
from .topk import TopK
from .xattention import XAttention

__all__ = [
    "ByHead",
    "Dense",
    "ExactKeys",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "MeanSimilarity",
    "PeakMass",
    "RowShare",
    "Selector",
    "Streaming",
    "Tokens",
    "TopK",
    "Union",
    "XAttention",
]
