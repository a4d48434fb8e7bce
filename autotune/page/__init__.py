"""The report of a calibration: one HTML page that loads nothing, and ten lines for a terminal."""

from .findings import summary
from .html import render
from .record import Record, unit

__all__ = ["Record", "render", "summary", "unit"]
