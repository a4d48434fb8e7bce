"""Thresholds for sparse attention: find them, keep them, load them."""

from .accumulate import Grid
from .calibration import Calibration, calibrate
from .files import extract_sparse_attention_state_dict, load, load_sparse_attention_state_dict, save
from .module import SparseAttention
from .running import dense, enable_tune_mode, record_density
from .tuned import Tuned

__all__ = [
    "Calibration",
    "Grid",
    "SparseAttention",
    "Tuned",
    "calibrate",
    "dense",
    "enable_tune_mode",
    "extract_sparse_attention_state_dict",
    "load",
    "load_sparse_attention_state_dict",
    "record_density",
    "save",
]
