"""Diffusion pipelines for the command: loaded by name, and run by prompt and seed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotune.paths import transformers_of
from modify_model import dense_steps_of
from spas_attn.metrics import psnr

from .arguments import as_dtype, check_output, one_line, unreadable, usable_device
from .compare import Comparison
from .names import DIFFUSION
from .tiny import PREFIX, TINY

# Used when no file of prompts is given.
PROMPTS = (
    "A red fox trots through deep snow at the edge of a pine forest, morning light, close shot",
    "An old fisherman mends a net on a wooden pier while gulls circle above the harbour",
    "Time lapse of storm clouds gathering over a wheat field, lightning in the distance",
    "A street musician plays the cello under an umbrella, wet cobblestones reflect neon signs",
    "A glass of water tips over on a marble table, slow motion, droplets catch the sun",
    "A paper boat drifts down a narrow stream between mossy stones, seen from above",
    "A chef slices vegetables on a worn wooden board, steam rises from a pot behind her",
    "A tram climbs a steep street between colourful houses, the sea shines below",
    "A hummingbird hovers in front of an orange flower, its wings a blur",
    "An astronaut walks through a field of sunflowers at dusk, two moons in the sky",
)


@dataclass(frozen=True)
class Size:
    """What a pipeline is run at; ``frames`` is None for pictures."""

    height: int
    width: int
    frames: int | None
    steps: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}" + (f", {self.frames} frames" if self.frames else "")


# The pipelines that the command runs, with their usual sizes.
PIPELINES = {
    "CogVideoXPipeline": Size(480, 720, 49, 50),
    "FluxPipeline": Size(1024, 1024, None, 28),
    "HunyuanDiTPipeline": Size(1024, 1024, None, 50),
    "HunyuanVideoPipeline": Size(720, 1280, 129, 30),
    "LTXPipeline": Size(512, 704, 161, 50),
    "MochiPipeline": Size(480, 848, 19, 64),
    "QwenImagePipeline": Size(1328, 1328, None, 50),
    "StableDiffusion3Pipeline": Size(1024, 1024, None, 28),
    "WanPipeline": Size(480, 832, 81, 50),
}
_FLOAT32_VAE = ("WanPipeline",)  # as its makers run it, whatever dtype is asked for


class Sampler:
    """A pipeline with all that its call needs beside prompt and seed; what a calibration and a comparison run.

    ``of_prompt`` gives the arguments that stand for a prompt; ``show`` turns what the pipeline returns for ``decoded``,
    an output_type, into frames ``[F, H, W, 3]`` in 0..1; ``arguments`` are others of the pipeline.
    """

    prompts: Sequence[str] = PROMPTS  # that serve when the user gives none
    is_shown = True  # a comparison shows what it makes
    model = property(lambda self: self.pipe)

    def __init__(
        self, pipe: Any, size: Size, of_prompt: Callable[[str], Any], show: Any, decoded: str, **arguments: Any
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
        size = {"height": self.size.height, "width": self.size.width, "num_frames": self.size.frames}
        return self.pipe(
            **self._of_prompt(prompt),
            **self._arguments,
            **{name: number for name, number in size.items() if number is not None},
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),  # on the CPU: the same noise on every device
            output_type=output_type,
        )[0]

    def items(self, prompts: Sequence[str], seed: int) -> list[tuple[Any, ...]]:
        """What is run: prompt i from the noise of seed + i, and all else that tells a checkpoint of other calls."""
        return [(prompt, seed + i, str(self.size), self.size.steps) for i, prompt in enumerate(prompts)]

    def observe(self, item: tuple[Any, ...]) -> None:
        """Run an item for a calibration."""
        self.watch(*item[:2])

    def warm_up(self, item: tuple[Any, ...]) -> None:
        """Run an item for two steps."""
        self.watch(item[0], item[1], steps=2)

    def output(self, item: tuple[Any, ...]) -> Tensor:
        """Frames of an item."""
        return self.frames(*item[:2])

    def figures(self, item: tuple[Any, ...], exact: Tensor, sparse: Tensor) -> dict[str, float]:
        """Of an item's frames: peak signal to noise ratio over all of them (infinite for equal ones), and the mean of
        their structural similarity (Wang et al. 2004).
        """
        from skimage.metrics import structural_similarity

        pairs = zip(exact.numpy(), sparse.numpy(), strict=True)
        alike = [float(structural_similarity(x, y, channel_axis=-1, data_range=1.0)) for x, y in pairs]
        return {"PSNR dB": float(psnr(sparse, exact)), "SSIM": sum(alike) / len(alike)}

    def shares_of_steps(self, first: int, last: int) -> tuple[float, float]:
        """``dense_steps`` for numbers of steps, on the schedule that the pipeline itself sets.

        Pipelines shift their schedules by the size of the picture; so one is started, and stopped when the first
        transformer is called.
        """
        with contextlib.suppress(_ScheduleKnown), contextlib.ExitStack() as stack:
            stack.callback(self.pipe.maybe_free_model_hooks)
            for _, part in transformers_of(self.pipe):
                stack.callback(part.register_forward_pre_hook(_stop).remove)
            self.watch(self.prompts[0], 0)
        return dense_steps_of(self.pipe.scheduler, first, last)


class _ScheduleKnown(Exception):
    """The pipeline has set its timesteps; nothing more is needed."""


def _stop(*_: object) -> None:
    raise _ScheduleKnown


class DiffusionModel:
    """A pipeline with its prompts, as the command runs it (see ``driver.py``)."""

    kind = DIFFUSION
    needs = ("diffusers", "transformers", "PIL", "matplotlib", "skimage")
    hint = "see --height, --width, --frames, --steps, --tune_every, --dense_steps"

    def __init__(self, args: argparse.Namespace, device: str | None = None) -> None:
        self.args, device = args, device or args.device
        options = {name: getattr(args, name) for name in ("height", "width", "frames", "steps", "dtype", "offload")}
        self.runner = args.special(args, device) or load(args.model_name, args.pipelines, device=device, **options)
        self.model, self.size = self.runner.pipe, self.runner.size
        self.prompts = list(self.runner.prompts if args.prompts is None else read_prompts(args.prompts))
        self.every = args.tune_every or max(1, self.size.steps // 10)

    def __str__(self) -> str:
        return f"{self.size}, {self.size.steps} steps" + f", every {self.every}th is observed" * (self.every > 1)

    @staticmethod
    def usual(args: argparse.Namespace) -> dict[str, int]:
        """The values of options that are left out."""
        return {"num_tune_samples": 5, "num_compare": 1} | ({"steps": 2} if args.verify else {})

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """Reject, before a pipeline is loaded, what is known to be wrong; a ValueError says why."""
        if args.model_name.startswith(PREFIX) and (args.height, args.width, args.frames) != (None, None, None):
            raise ValueError("a tiny model has one size: leave out --height, --width and --frames")
        prompts = PROMPTS if args.prompts is None else read_prompts(args.prompts)
        if args.tune and args.num_tune_samples > len(prompts):
            raise ValueError(f"--num_tune_samples {args.num_tune_samples}: there are only {len(prompts)} prompts")
        if args.offload and usable_device(args.device).type == "cpu":
            raise ValueError("--offload moves components between a CPU and a GPU, and there is no GPU")
        if args.dense_steps is not None and args.steps is not None and sum(args.dense_steps) >= args.steps:
            raise ValueError(f"--dense_steps {args.dense_steps} leave none of {args.steps} steps")
        if args.generate or args.compare:
            check_output("out_path", args.out_path, folder=True)

    def items(self) -> list[Any]:
        """What a calibration runs."""
        return self.runner.items(self.prompts[: self.args.num_tune_samples], self.args.seed)

    def unseen(self) -> list[tuple[str, int, Any]]:
        """What a comparison runs, names, seeds and items: prompts that no threshold was chosen on, if there are any."""
        args, start = self.args, self.args.num_tune_samples
        if len(self.prompts) <= start:
            start = 0
            warnings.warn("what is run may have been tuned on: --num_tune_samples leaves no other", stacklevel=2)
        left = len(self.prompts) - start
        if left < args.num_compare:
            warnings.warn(f"--num_compare {args.num_compare}: only {left} prompts are left", stacklevel=2)
        items = self.runner.items(self.prompts, args.seed)[start : start + args.num_compare]
        return [(item[0], item[1], item) for item in items]

    def report(self, comparisons: Sequence[Comparison]) -> None:
        """Write the pictures of a comparison."""
        from .pictures import write

        names = {"model": self.args.model_name, "tuned_file": self.args.model_out_path}
        facts = {**names, "size": str(self.size), "steps": self.size.steps}
        print("written:", *write(comparisons, Path(self.args.out_path), facts))

    def generate(self) -> None:
        """Write a picture or clip of each prompt."""
        from .pictures import save_frames

        for prompt, seed, _ in self.unseen():
            path = Path(self.args.out_path) / f"sparse_{seed - self.args.seed}"
            print(f"written: {save_frames(self.runner.frames(prompt, seed), path)}   ({prompt})", flush=True)

    def sample(self) -> tuple[Tensor, str]:
        """A whole generation: its latents, and in words."""
        latents = self.runner.watch(self.prompts[0], 0)
        return latents, f"latents {list(latents.shape)} of {self.prompts[0]!r}"

    def calls(self) -> dict[str, Any]:
        """Arguments of the first call of each transformer, by its prefix in a tuned file, for the verification."""
        found: dict[str, Any] = {}

        def hook(prefix: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(prefix, (args, dict(kwargs)))

        with contextlib.ExitStack() as stack:
            for prefix, part in transformers_of(self.model):
                handle = part.register_forward_pre_hook(functools.partial(hook, prefix), with_kwargs=True)
                stack.callback(handle.remove)
            self.sample()
        return found


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, a line each; a ValueError when there is none."""
    try:
        prompts = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path!r}: {one_line(error)}") from error
    if not prompts:
        raise ValueError(f"nothing to run: no prompt in {path!r}")
    return prompts


def load(
    name: str,
    pipelines: Sequence[str] = tuple(PIPELINES),
    *,
    device: str | None = None,
    dtype: str = "auto",
    offload: bool = False,
    **size: int | None,
) -> Sampler:
    """Load a pipeline, ready to run.

    Args:
        name: a name on the hub, a folder, or ``tiny:<family>``.
        pipelines: names of the classes that are allowed.
        device: the GPU if there is one, else the CPU, by default.
        dtype: of DTYPES; "auto" is bfloat16, and float32 on a CPU, where half precision is slow.
        offload: keep on the GPU only the component that is running (``enable_model_cpu_offload``).
        size: height, width, frames and steps; the class's usual ones where they are None or left out.

    Raises:
        ValueError: when there is no such pipeline, it cannot be read, or it has other sizes; the message says why.
    """
    where = usable_device(device)
    kind: Any = as_dtype(dtype, where, usual=torch.bfloat16)
    if name.startswith(PREFIX):
        tiny = TINY[name.removeprefix(PREFIX)]
        usual = Size(tiny.size["height"], tiny.size["width"], tiny.size.get("num_frames"), size.get("steps") or 4)
        sampler = Sampler(tiny.make(kind), usual, lambda prompt: tiny.arguments(prompt, kind), tiny.show, "latent")
    else:
        sampler = _real(name, {name: number for name, number in size.items() if number is not None}, kind, pipelines)
    sampler.pipe.set_progress_bar_config(disable=True)
    if offload:
        sampler.pipe.enable_model_cpu_offload(device=where)
    else:
        sampler.pipe.to(where)
    return sampler


def _real(name: str, given: dict[str, int], dtype: torch.dtype, pipelines: Sequence[str]) -> Sampler:
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(name)
        kind = index["_class_name"]
        if kind not in pipelines:
            raise ValueError(f"it is a {kind}, and this command runs {', '.join(pipelines)}")
        if index.get("text_encoder", [None]) == [None, None]:
            raise ValueError(f"this {kind} has no text encoder")
        if PIPELINES[kind].frames is None and "frames" in given:
            raise ValueError("--frames is for videos, and this model makes pictures")
        dtypes = {"default": dtype, "vae": torch.float32} if kind in _FLOAT32_VAE else dtype
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=dtypes)
    except unreadable() as error:
        where = f"cannot load the pipeline in folder {name!r}"
        if not Path(name).is_dir():
            where = f"cannot load {name!r} from the hub (no network, no such model, or a licence to be accepted there)"
        raise ValueError(f"{where}: {one_line(error)}") from error
    size = replace(PIPELINES[kind], **given)
    check_size(pipe, size)
    # HunyuanDiT would take another size, of a few that it was trained at, without a word.
    fixed = {"use_resolution_binning": False} if kind == "HunyuanDiTPipeline" else {}

    def show(output: Any) -> Tensor:
        return torch.as_tensor(output).reshape(-1, *output.shape[-3:])  # from [1, F, H, W, 3] or [1, H, W, 3]

    return Sampler(pipe, size, lambda prompt: {"prompt": prompt}, show, "np", **fixed)


def check_size(pipe: Any, size: Size) -> None:
    """Reject what the pipeline would round, or fail at: its VAE and patches come in whole numbers only."""

    def factor(*names: str) -> int:
        return next((getattr(pipe, f"vae_{name}") for name in names if hasattr(pipe, f"vae_{name}")), 1)

    patch = getattr(transformers_of(pipe)[0][1].config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else max(patch[-2:])
    side = factor("scale_factor_spatial", "spatial_compression_ratio", "scale_factor", "spatial_scale_factor") * patch
    every = factor("scale_factor_temporal", "temporal_compression_ratio", "temporal_scale_factor")
    # Pipelines that put pixels of latents together before the transformer sees them ask their processor for it.
    processor = getattr(pipe, "video_processor", None) or getattr(pipe, "image_processor", None)
    side = math.lcm(side, processor.config.vae_scale_factor if processor else 1)
    for name, whole, more in (("height", side, 0), ("width", side, 0), ("frames", every, 1)):
        value = getattr(size, name)
        if value is not None and (value - more) % whole:
            below = (value - more) // whole * whole + more
            nearest = " and ".join(str(x) for x in (below, below + whole) if x > 0)
            what = f"a multiple of {whole}" + (f" plus {more}" if more else "")
            raise ValueError(f"--{name} must be {what} for this model, got {value}; nearest: {nearest}")
