"""What a patched transformer notes of each of its calls, and dense steps: the denoising steps that run dense.

The timestep that the transformer receives decides. And the checks of all that patch is told about steps and layers.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NoiseLevel = Callable[[Tensor], Tensor]


def thousandths(timestep: Tensor) -> Tensor:
    """Noise level of timesteps that run from 1000 (pure noise) down to 0, as most pipelines of diffusers pass them."""
    return timestep / 1000


def unchanged(timestep: Tensor) -> Tensor:
    """Noise level of timesteps that run from 1 down to 0."""
    return timestep


def rising(timestep: Tensor) -> Tensor:
    """Noise level of timesteps that run from 0 (pure noise) up to 1000."""
    return 1 - timestep / 1000


class _Now(threading.local):
    """What the layers must know of the transformer's call in progress, one for each thread."""

    # Not attributes of the class: torch.compile guards on what the instance holds, and the first call must not add to
    # it what was missing while it was traced.
    def __init__(self) -> None:
        self.dense = False  # this call runs dense by schedule
        self.text_length = 0  # tokens of encoder_hidden_states
        self.noise: float | None = None  # level of this call, where a layer needs it
        self.noise_tensor: Tensor | None = None  # the same for traced code, which must not depend on its value


now = _Now()


def noise_of_call() -> float | Tensor | None:
    """The noise level of the transformer's call in progress; for traced code a tensor on the call's device."""
    return now.noise_tensor if torch.compiler.is_compiling() else now.noise


class DenseSteps:
    """Forward pre-hook of a transformer: notes in :data:`now` what its layers must know of each call.

    A call's noise level is that of its noisiest token or sample (``timestep.max()``, read on the host once per call):
    in a batch, with or without classifier-free guidance, all samples have one level, and image-to-video models give
    the tokens of a known frame level 0.

    Args:
        first, last: shares of the noise range that run dense, see :func:`modify_model.patch`.
        noise_level: maps the transformer's ``timestep`` to [0, 1], 1 = pure noise.
        layers: the patched layers, for a family that looks at them before each call.
    """

    def __init__(self, first: float, last: float, noise_level: NoiseLevel, layers: Sequence[Any] = ()) -> None:
        self.first, self.last, self.noise_level, self.layers = first, last, noise_level, layers
        self.names: list[str] = []  # of the transformer's arguments, in order

    def is_dense(self, timestep: Tensor | float) -> bool:
        """Whether a call with this timestep runs dense."""
        level = self._level(timestep)
        return 1 - level < self.first or level < self.last

    def _level(self, timestep: Tensor | float) -> float:
        return float(self.noise_level(torch.as_tensor(timestep).detach().float()).max())

    def _needs_noise(self) -> bool:
        """Whether a layer has thresholds by phase, or is being calibrated."""
        inners = [layer[1]._modules.get("inner_attention") for layer in self.layers]
        return any(inner is not None and inner.needs_noise for inner in inners)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = self._argument("encoder_hidden_states", args, kwargs)
        now.text_length = text.shape[1] if isinstance(text, Tensor) else 0
        now.dense, now.noise, now.noise_tensor = False, None, None
        if self.first or self.last or self._needs_noise():
            self._decide(module, args, kwargs)

    # Not traced: the decision needs a number on the host. A whole compiled model has one graph break here.
    @torch.compiler.disable
    def _decide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self._argument("timestep", args, kwargs)
        if timestep is None and not (self.first or self.last):
            return
        if timestep is None:
            name = type(getattr(module, "_orig_mod", module)).__name__
            raise TypeError(f"{name} was called without timestep, which its dense steps need")
        now.dense, now.noise = self.is_dense(timestep), self._level(timestep)
        device = timestep.device if isinstance(timestep, Tensor) else torch.device("cpu")
        now.noise_tensor = torch.tensor(now.noise, device=device)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument of the transformer's call, however it was passed; None when it was not."""
        position = self.names.index(name) if name in self.names else len(args)
        return args[position] if position < len(args) else kwargs.get(name)


def note_calls(root: nn.Module, note: DenseSteps | None) -> None:
    """Run ``note`` before every forward of a transformer, in place of the one before; None for none at all."""
    for module in root.modules():  # not by handle: those get lost when a model is copied
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, DenseSteps):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    if note is not None:
        model: Any = getattr(root, "_orig_mod", root)
        note.names = list(inspect.signature(type(model).forward).parameters)[1:]
        root.register_forward_pre_hook(note, with_kwargs=True)


def check_range(layer_range: tuple[int, int] | None, count: int) -> range:
    """``layer_range`` as numbers of layers, all by default; a ValueError on what a model with ``count`` layers cannot
    have.
    """
    if layer_range is None:
        return range(count)
    try:
        start, stop = (operator.index(number) for number in layer_range)
    except (TypeError, ValueError):
        start = stop = -1
    if not 0 <= start < stop <= count:
        raise ValueError(
            f"layer_range must be (start, stop) with 0 <= start < stop <= {count}, or None for all layers, "
            f"got {layer_range!r}"
        )
    return range(start, stop)


def check_schedule(
    noise_level: NoiseLevel | None,
    count: int,
    dense_steps: tuple[float, float] | None,
    dense_layers: Sequence[int],
    scheduler: Any = None,
) -> tuple[float, float] | None:
    """``dense_steps`` as a pair of shares, of whole numbers of the scheduler's steps too; a ValueError on what a model
    with ``count`` layers cannot have.
    """
    if isinstance(dense_layers, str) or not isinstance(dense_layers, Collection):  # it is gone through several times
        raise ValueError(f"dense_layers must be a list of numbers from 0 to {count - 1}, got {dense_layers!r}")
    wrong = [index for index in dense_layers if index not in range(count)]
    if wrong:
        raise ValueError(f"dense_layers must be numbers from 0 to {count - 1}, got {wrong}")
    if dense_steps is None:
        return None
    if noise_level is None:
        raise ValueError("dense_steps are for diffusion models, and this one has no timesteps")
    counts = [number for number in dense_steps if type(number) is int] if isinstance(dense_steps, Collection) else []
    if scheduler is not None and len(counts) == 2 and any(counts):
        return dense_steps_of(scheduler, *counts)
    try:
        first, last = (float(share) for share in dense_steps)
    except (TypeError, ValueError):
        first = last = -1.0
    if not (first >= 0 and last >= 0 and first + last < 1):
        raise ValueError(
            "dense_steps must be (first, last), shares of the noise range with first, last >= 0 and first + last < 1, "
            f"or whole numbers of steps of a pipeline's scheduler, got {dense_steps!r}"
        )
    return first, last


def dense_steps_of(scheduler: Any, first: int = 0, last: int = 0) -> tuple[float, float]:
    """``dense_steps`` for the first and last few steps of a schedule.

    Args:
        scheduler: a scheduler of diffusers after ``set_timesteps`` (as a pipeline calls it: with the same number of
            steps, ``mu`` or ``sigmas``), with timesteps from 1000 down to 0, or (Mochi) from 0 up to 1000.
        first, last: numbers of steps; a step that a scheduler repeats (Heun) is one step.

    Returns:
        Shares of the noise range; borders lie halfway between two steps. A pipeline that hands its timesteps over in
        half precision (HunyuanVideo) makes neighbours equal where they are closer than 4 of 1000: bfloat16 turns the
        second and third of 50 steps into 996 both, and such steps run dense, or sparse, together.

    Raises:
        ValueError: before ``set_timesteps``, when no step would be left, or when the noise does not fall.
    """
    if hasattr(scheduler, "set_timesteps") and getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(
            "scheduler has no timesteps yet: call dense_steps_of after scheduler.set_timesteps, "
            "or after the pipeline has run once with the same number of steps"
        )
    inverted = getattr(getattr(scheduler, "config", None), "invert_sigmas", False)
    timesteps = torch.as_tensor(scheduler.timesteps).double().cpu()
    levels = (rising if inverted else thousandths)(timesteps).unique_consecutive()
    if not (first >= 0 and last >= 0 and first + last < len(levels)):
        raise ValueError(f"first and last must be 0 or more and leave one of {len(levels)} steps, got {first}, {last}")
    if bool((levels.diff() > 0).any()):
        raise ValueError("scheduler must have timesteps that fall from noise to image; this one's rise")
    begin = 1 - float(levels[first - 1 : first + 1].mean()) if first else 0.0
    end = float(levels[len(levels) - last - 1 : len(levels) - last + 1].mean()) if last else 0.0
    return begin, end
