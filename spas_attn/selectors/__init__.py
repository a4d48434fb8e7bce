"""Selectors: rules that choose which key blocks each query block attends to, one file for each."""

from .base import Inputs, Selector
from .dense import Dense
from .mean_similarity import MeanSimilarity
from .peak_mass import PeakMass
from .streaming import Streaming
from .tokens import Tokens
from .topk import TopK
from .union import Union

__all__ = ["Dense", "Inputs", "MeanSimilarity", "PeakMass", "Selector", "Streaming", "Tokens", "TopK", "Union"]
