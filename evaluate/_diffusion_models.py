"""Diffusion pipelines as the scripts use them: loaded by name, and run by prompt and seed."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _demo_clips import FRAMES, GUIDANCE, SIZE, generate, to_frames
from _demo_clips import load_pipeline as load_demo
from _diffusion_tiny import TINY
from _loading import check_dtype, check_source, usable_device
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from autotune.module import transformers_of

TINY_PREFIX = "tiny:"


@dataclass(frozen=True)
class Size:
    """What a pipeline is run at; ``frames`` is None for pictures."""

    height: int
    width: int
    frames: int | None
    steps: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}" + (f", {self.frames} frames" if self.frames else "")


@dataclass(frozen=True)
class Example:
    """What is special to one family's script.

    Attributes:
        patch: the family's own function.
        pipelines: the classes it serves, with their usual sizes.
        model_name: what is loaded by default.
        tiny: families that ``tiny:<family>`` may name.
        float32: components that are loaded in float32 whatever dtype is asked for.
    """

    patch: Callable[..., nn.Module]
    pipelines: dict[str, Size]
    model_name: str
    tiny: tuple[str, ...]
    float32: tuple[str, ...] = ()


class Sampler:
    """A pipeline with everything that its call needs beside prompt and seed.

    Args:
        pipe: the pipeline.
        size: what to generate.
        of_prompt: the arguments that stand for a prompt.
        show: what the pipeline returns for ``decoded``, an output_type, as frames ``[F, H, W, 3]`` in 0..1.
        arguments: other arguments of the pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        size: Size,
        of_prompt: Callable[[str], dict[str, Any]],
        show: Callable[[Any], Tensor],
        decoded: str,
        **arguments: Any,
    ) -> None:
        self.pipe, self.size, self._of_prompt, self._show, self._decoded = pipe, size, of_prompt, show, decoded
        self._arguments = arguments

    def watch(self, prompt: str, seed: int, steps: int | None = None) -> Tensor:
        """Run the pipeline without decoding its latents, which is all that a calibration needs; returns the latents."""
        return self._run(prompt, seed, steps or self.size.steps, "latent")

    def frames(self, prompt: str, seed: int) -> Tensor:
        """Frames of one clip (or one picture), ``[F, H, W, 3]`` in 0..1."""
        return self._show(self._run(prompt, seed, self.size.steps, self._decoded))

    def _run(self, prompt: str, seed: int, steps: int, output_type: str) -> Any:
        frames = {} if self.size.frames is None else {"num_frames": self.size.frames}
        return self.pipe(
            **self._of_prompt(prompt),
            **self._arguments,
            **frames,
            height=self.size.height,
            width=self.size.width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),  # on the CPU: the same noise on every device
            output_type=output_type,
        )[0]


class DemoSampler(Sampler):
    """The demo Wan: prompts of a small vocabulary, and latents that are pixels."""

    def __init__(self, pipe: Any, steps: int, guidance: float = GUIDANCE) -> None:
        self.pipe, self.size, self.guidance = pipe, Size(SIZE, SIZE, FRAMES, steps), guidance

    def watch(self, prompt: str, seed: int, steps: int | None = None) -> Tensor:
        return generate(self.pipe, [prompt], seed, steps or self.size.steps, self.guidance)

    def frames(self, prompt: str, seed: int) -> Tensor:
        return to_frames(generate(self.pipe, [prompt], seed, self.size.steps, self.guidance))[0]


def load(
    example: Example,
    name: str,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offload: bool = False,
) -> Sampler:
    """Load a pipeline, ready to run.

    Args:
        example: the family.
        name: a name on the hub, a folder, or ``tiny:<family>``.
        height, width, frames, steps: the class's usual ones by default.
        device: the GPU if there is one, else the processor, by default.
        dtype: of DTYPES; "auto" is bfloat16, and float32 on a processor, where half precision is slow.
        offload: keep on the GPU only the component that is running (``enable_model_cpu_offload``).

    Raises:
        ValueError: when there is no such pipeline, it cannot be read, or it has other sizes; the message says why.
    """
    where = usable_device(device)
    kind = as_dtype(dtype, where)
    given = {"height": height, "width": width, "frames": frames, "steps": steps}
    check_name(example, name, given)
    if name.startswith(TINY_PREFIX):
        sampler = _tiny(name.removeprefix(TINY_PREFIX), given, kind)
    elif _without_text_encoder(name):
        sampler = _demo(example, name, given, kind)
    else:
        sampler = _real(example, name, given, kind)
    pipe = sampler.pipe
    pipe.set_progress_bar_config(disable=True)
    if not offload:
        pipe.to(where)
    elif where.type == "cpu":
        raise ValueError("--offload moves components between a processor and a GPU, and there is no GPU")
    else:
        pipe.enable_model_cpu_offload(device=where)
    return sampler


def check_name(example: Example, name: str, given: Mapping[str, Any]) -> None:
    """Refuse what is known to be wrong before anything is loaded; a ValueError says why."""
    if name.startswith(TINY_PREFIX):
        if name.removeprefix(TINY_PREFIX) not in example.tiny:
            raise ValueError(f"tiny models of this script are {', '.join(TINY_PREFIX + n for n in example.tiny)}")
        _fixed("a tiny model", given)
    else:
        check_source(name, "pipeline", "model_index.json", owner=True)


def as_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16, and float32 on a processor."""
    check_dtype(dtype)
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype)


def _sized(usual: Size, given: Mapping[str, int | None]) -> Size:
    """The usual size with what the user gave."""
    if usual.frames is None and given["frames"] is not None:
        raise ValueError("--frames is for videos, and this model makes pictures")
    return Size(**{name: value if value is not None else getattr(usual, name) for name, value in given.items()})


def _check_size(pipe: Any, size: Size) -> None:
    """Refuse what the pipeline would round, or fail at: its VAE and patches come in whole numbers only."""
    patch = getattr(transformers_of(pipe)[0][1].config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else max(patch[-2:])
    factor = _first_of(pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    # Pipelines that put pixels of latents together before the transformer sees them ask their processor for it.
    processor = getattr(pipe, "video_processor", None) or getattr(pipe, "image_processor", None)
    whole = math.lcm(factor * patch, processor.config.vae_scale_factor if processor else 1)
    for name in ("height", "width"):
        if getattr(size, name) % whole:
            raise ValueError(_not_whole(name, getattr(size, name), whole, 0))
    every = _first_of(pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    if size.frames is not None and (size.frames - 1) % every:
        raise ValueError(_not_whole("frames", size.frames, every, 1))


def _first_of(pipe: Any, *names: str) -> int:
    return next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 1)


def _not_whole(name: str, value: int, whole: int, more: int) -> str:
    below = (value - more) // whole * whole + more
    nearest = [str(x) for x in (below, below + whole) if x > 0]
    what = f"a multiple of {whole}" + (f" plus {more}" if more else "")
    return f"--{name} must be {what} for this model, got {value}; nearest: {' and '.join(nearest)}"


def _fixed(what: str, given: Mapping[str, Any]) -> None:
    wrong = [f"--{name}" for name in ("height", "width", "frames") if given[name] is not None]
    if wrong:
        raise ValueError(f"{what} has one size: leave out {', '.join(wrong)}")


def _tiny(family: str, given: Mapping[str, int | None], dtype: torch.dtype) -> Sampler:
    tiny = TINY[family]
    size = Size(tiny.size["height"], tiny.size["width"], tiny.size.get("num_frames"), given["steps"] or 4)
    pipe = tiny.make()
    for _, part in transformers_of(pipe):
        _cast(part, dtype)
    return Sampler(pipe, size, lambda prompt: tiny.arguments(prompt, dtype), tiny.show, "latent")


def _cast(part: Any, dtype: torch.dtype) -> None:
    """What ``from_pretrained(dtype=...)`` does, which leaves buffers and a few parameters as they are."""
    exact = set(part._keep_in_fp32_modules or ())
    for path, parameter in part.named_parameters():
        if exact.isdisjoint(path.split(".")):
            parameter.data = parameter.data.to(dtype)


def _without_text_encoder(name: str) -> bool:
    """Whether a folder holds a pipeline like the demo's, whose prompts are embedded by the program."""
    try:
        index = json.loads((Path(name) / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False  # not a folder, or a damaged one, which from_pretrained will say
    return isinstance(index, dict) and index.get("text_encoder") == [None, None]


def _demo(example: Example, name: str, given: Mapping[str, int | None], dtype: torch.dtype) -> Sampler:
    if "WanPipeline" not in example.pipelines:
        raise ValueError(f"the pipeline in {name!r} has no text encoder: only the demo Wan can be run without one")
    _fixed("the demo", given)
    try:
        pipe = load_demo(name, "cpu", dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"cannot load the pipeline in folder {name!r}: {_short(error)}") from error
    if pipe.transformer.config.in_channels != 12:
        raise ValueError(f"the pipeline in {name!r} has no text encoder, and is not the demo Wan")
    return DemoSampler(pipe, given["steps"] or 12)


def _real(example: Example, name: str, given: Mapping[str, int | None], dtype: torch.dtype) -> Sampler:
    dtypes = {"default": dtype, **dict.fromkeys(example.float32, torch.float32)}
    try:
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtypes if example.float32 else dtype)
    # OSError: no such file, no such model, no network; the others: damaged or foreign configurations.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        if Path(name).is_dir():
            raise ValueError(f"cannot load the pipeline in folder {name!r}: {_short(error)}") from error
        raise ValueError(
            f"cannot load {name!r} from the hub (no such model, no network, or no access: for a gated model accept its "
            f"licence and run `hf auth login`): {_short(error)}"
        ) from error
    usual = example.pipelines.get(type(pipe).__name__)
    if usual is None:
        known = ", ".join(example.pipelines)
        raise ValueError(f"{name!r} is a {type(pipe).__name__}; this script runs {known}")
    size = _sized(usual, given)
    _check_size(pipe, size)
    # HunyuanDiT would take another size, of a few that it was trained at, without a word.
    binning = "use_resolution_binning" in inspect.signature(pipe.__call__).parameters
    fixed = {"use_resolution_binning": False} if binning else {}
    return Sampler(pipe, size, lambda prompt: {"prompt": prompt}, _as_frames, "np", **fixed)


def _as_frames(output: Any) -> Tensor:
    """Arrays ``[1, F, H, W, 3]`` of videos and ``[1, H, W, 3]`` of pictures as frames."""
    array = torch.as_tensor(output)
    return array[0] if array.dim() == 5 else array


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
