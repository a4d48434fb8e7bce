"""Hunyuan3D shape models: denoisers, samplers and volume decoder, for weights that users bring."""

from .condition import Condition
from .dit import Hunyuan3DDiT
from .plain import HunYuanDiTPlain

__all__ = ["Condition", "HunYuanDiTPlain", "Hunyuan3DDiT"]
