"""Thresholds for sparse attention: find them, keep them, load them."""

from .calibration import Calibration, calibrate
from .module import SparseAttention
from .state_dict import extract_sparse_attention_state_dict, load, load_sparse_attention_state_dict, save
from .tune_mode import enable_tune_mode

__all__ = [
    "Calibration",
    "SparseAttention",
    "calibrate",
    "enable_tune_mode",
    "extract_sparse_attention_state_dict",
    "load",
    "load_sparse_attention_state_dict",
    "save",
]
