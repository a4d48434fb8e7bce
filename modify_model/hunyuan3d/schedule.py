"""Dense steps of shape models, whose time is called ``t``, or ``timestep`` in ComfyUI, and runs the other way there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..schedule import DenseSteps, now


def rising_unit(t: Tensor) -> Tensor:
    """Noise level of times from 0 (pure noise) up to 1 (data)."""
    return 1 - t


def scheduled() -> bool:
    """Whether the call in progress runs dense by schedule (``dense_steps``)."""
    return now.dense


class ShapeSteps(DenseSteps):
    """Reads the time of a shape model, whatever its argument is called."""

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "timestep" and "timestep" not in self.names:
            name = "t"
        return super()._argument(name, args, kwargs)
