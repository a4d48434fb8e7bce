"""Selectors: rules that choose which key blocks each query block attends to, one file for each."""

from .base import Selector, Union
from .dense import Dense
from .max_share import MaxShare
from .mean_similarity import MeanSimilarity
from .peak_mass import PeakMass
from .streaming import Streaming
from .tokens import Tokens
from .topk import TopK

__all__ = ["Dense", "MaxShare", "MeanSimilarity", "PeakMass", "Selector", "Streaming", "Tokens", "TopK", "Union"]
