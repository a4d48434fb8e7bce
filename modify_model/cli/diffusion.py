"""Diffusion pipelines for the command: loaded by name, and run by prompt and seed."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotune.module import transformers_of
from modify_model import dense_steps_of
from spas_attn.metrics import psnr

from .arguments import as_dtype, check_output, check_source, one_line, unreadable, usable_device
from .compare import Comparison
from .pictures import save_frames, write
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


class _ScheduleKnown(Exception):
    """The pipeline has set its timesteps; nothing more is needed."""


class Sampler:
    """A pipeline with everything that its call needs beside prompt and seed.

    Args:
        pipe: the pipeline.
        size: what to generate.
        of_prompt: the arguments that stand for a prompt.
        show: what the pipeline returns for ``decoded``, an output_type, as frames ``[F, H, W, 3]`` in 0..1.
        arguments: other arguments of the pipeline.
    """

    prompts: Sequence[str] = PROMPTS  # that serve when the user gives none

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

    @property
    def model(self) -> Any:
        """The pipeline, under the name that all kinds of models share."""
        return self.pipe

    def watch(self, prompt: str, seed: int, steps: int | None = None) -> Tensor:
        """Run the pipeline without decoding its latents, which is all that a calibration needs; returns the latents."""
        return self._run(prompt, seed, steps or self.size.steps, "latent")

    def frames(self, prompt: str, seed: int) -> Tensor:
        """Frames of one clip (or one picture), ``[F, H, W, 3]`` in 0..1."""
        return self._show(self._run(prompt, seed, self.size.steps, self._decoded))

    def items(self, prompts: Sequence[str], seed: int) -> list[tuple[Any, ...]]:
        """What a calibration runs, prompt i from the noise of seed + i, with all that its calls depend on: so a
        checkpoint of other calls is rejected.
        """
        return [(prompt, seed + i, str(self.size), self.size.steps) for i, prompt in enumerate(prompts)]

    def observe(self, item: tuple[Any, ...]) -> None:
        """Run an item for a calibration."""
        self.watch(*item[:2])

    def output(self, item: tuple[Any, ...]) -> Tensor:
        """Frames of an item."""
        return self.frames(*item[:2])

    def warm_up(self, item: tuple[Any, ...]) -> None:
        """Run an item for two steps."""
        self.watch(*item[:2], steps=2)

    def figures(self, item: tuple[Any, ...], exact: Tensor, sparse: Tensor) -> dict[str, float]:
        """What a comparison shows of an item's frames: peak signal to noise ratio over all of them (infinite for equal
        ones), and the mean of their structural similarity (Wang et al. 2004).
        """
        from skimage.metrics import structural_similarity

        pairs = zip(exact.numpy(), sparse.numpy(), strict=True)
        alike = [float(structural_similarity(x, y, channel_axis=-1, data_range=1.0)) for x, y in pairs]
        return {"PSNR dB": float(psnr(sparse, exact)), "SSIM": sum(alike) / len(alike)}

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

    def shares_of_steps(self, first: int, last: int) -> tuple[float, float]:
        """``dense_steps`` for numbers of steps, on the schedule that the pipeline itself sets.

        Pipelines shift their schedules by the size of the picture; so one is started, and stopped when the first
        transformer is called.
        """

        def stop(*_: object) -> None:
            raise _ScheduleKnown

        handles = [part.register_forward_pre_hook(stop) for _, part in transformers_of(self.pipe)]
        try:
            self.watch(self.prompts[0], 0)
        except _ScheduleKnown:
            pass
        finally:
            for handle in handles:
                handle.remove()
            self.pipe.maybe_free_model_hooks()
        return dense_steps_of(self.pipe.scheduler, first, last)


class DiffusionModel:
    """A pipeline with its prompts, as the command runs it (see ``driver.py``)."""

    kind = "diffusion pipeline"
    usual = (("num_tune_samples", 5), ("num_compare", 1))  # options that are left out
    hint = "see --height, --width, --frames, --steps, --tune_every, --dense_steps"

    def __init__(self, args: argparse.Namespace, device: str | None = None) -> None:
        self.args, device = args, device or args.device
        options = {name: getattr(args, name) for name in ("height", "width", "frames", "steps", "dtype", "offload")}
        self.sampler = args.special(args, device) or load(
            args.model_name, device=device, pipelines=args.pipelines, **options
        )
        self.model, self.runner = self.sampler.pipe, self.sampler
        self.prompts = list(self.sampler.prompts if args.prompts is None else read_prompts(args.prompts))
        self.every = args.tune_every or max(1, self.sampler.size.steps // 10)

    def __str__(self) -> str:
        steps = f"{self.sampler.size.steps} steps" + (f", every {self.every}th observed" if self.every > 1 else "")
        return f"{self.sampler.size}, {steps}"

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """Reject, before a pipeline is loaded, what is known to be wrong; a ValueError says why."""
        check_name(args.model_name, args.height, args.width, args.frames)
        prompts = PROMPTS if args.prompts is None else read_prompts(args.prompts)
        if args.tune and args.num_tune_samples > len(prompts):
            raise ValueError(f"--num_tune_samples {args.num_tune_samples}: there are only {len(prompts)} prompts")
        if args.generate or args.compare:
            check_output("out_path", args.out_path, folder=True)

    def items(self) -> list[Any]:
        """What a calibration runs."""
        return self.sampler.items(self.prompts[: self.args.num_tune_samples], self.args.seed)

    def unseen(self) -> list[tuple[str, int, Any]]:
        """What a comparison runs, names, seeds and items: prompts that no threshold was chosen on, if there are any."""
        args, prompts = self.args, self.prompts
        start = args.num_tune_samples if len(prompts) > args.num_tune_samples else 0
        if start == 0:
            note("thresholds may have been tuned on what is generated: --num_tune_samples leaves no other prompt")
        if len(prompts) - start < args.num_compare:
            note(f"--num_compare {args.num_compare}: only {len(prompts) - start} prompts are left")
        items = self.sampler.items(prompts, args.seed)[start : start + args.num_compare]
        return [(item[0], item[1], item) for item in items]

    def report(self, comparisons: Sequence[Comparison]) -> None:
        """Write the pictures of a comparison."""
        args, size = self.args, self.sampler.size
        facts = {"model": args.model_name, "tuned_file": args.model_out_path, "size": str(size), "steps": size.steps}
        print("written:", *write(comparisons, Path(args.out_path), facts))

    def calls(self) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
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

    def sample(self) -> tuple[Tensor, str]:
        """A whole generation: its latents, and in words."""
        latents = self.sampler.watch(self.prompts[0], 0)
        return latents, f"latents {list(latents.shape)} of {self.prompts[0]!r}"

    def generate(self) -> None:
        """Write a picture or clip of each prompt."""
        folder = Path(self.args.out_path)
        for prompt, seed, _ in self.unseen():
            path = save_frames(self.sampler.frames(prompt, seed), folder / f"sparse_{seed - self.args.seed}")
            print(f"written: {path}   ({prompt})", flush=True)


def note(text: str) -> None:
    """A note beside the results."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, a line each; a ValueError when there is none."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"no file of prompts at {path!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path!r}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"nothing to run: no prompt in {path!r}")
    return prompts


def check_name(name: str, height: int | None = None, width: int | None = None, frames: int | None = None) -> None:
    """Reject what is known to be wrong before anything is loaded; a ValueError says why."""
    if not name.startswith(PREFIX):
        check_source(name, "pipeline", "model_index.json", owner=True)
    elif name.removeprefix(PREFIX) not in TINY:
        raise ValueError(f"tiny pipelines are {', '.join(PREFIX + known for known in TINY)}, got {name!r}")
    elif given := [f"--{x}" for x, y in (("height", height), ("width", width), ("frames", frames)) if y is not None]:
        raise ValueError(f"a tiny model has one size: leave out {', '.join(given)}")


def load(
    name: str,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    offload: bool = False,
    pipelines: Sequence[str] = tuple(PIPELINES),
) -> Sampler:
    """Load a pipeline, ready to run.

    Args:
        name: a name on the hub, a folder, or ``tiny:<family>``.
        height, width, frames, steps: the class's usual ones by default.
        device: the GPU if there is one, else the CPU, by default.
        dtype: of DTYPES; "auto" is bfloat16, and float32 on a CPU, where half precision is slow.
        offload: keep on the GPU only the component that is running (``enable_model_cpu_offload``).
        pipelines: names of the classes that are allowed.

    Raises:
        ValueError: when there is no such pipeline, it cannot be read, or it has other sizes; the message says why.
    """
    where = usable_device(device)
    kind: Any = as_dtype(dtype, where, usual=torch.bfloat16)
    check_name(name, height, width, frames)
    if offload and where.type == "cpu":
        raise ValueError("--offload moves components between a CPU and a GPU, and there is no GPU")
    if name.startswith(PREFIX):
        sampler = _tiny(name.removeprefix(PREFIX), steps or 4, kind)
    else:
        sampler = _real(name, Size(height, width, frames, steps), kind, pipelines)  # type: ignore[arg-type]
    return place(sampler, where, offload)


def place(sampler: Sampler, device: torch.device, offload: bool = False) -> Sampler:
    """Move a pipeline to its device; the same sampler."""
    sampler.pipe.set_progress_bar_config(disable=True)
    if offload:
        sampler.pipe.enable_model_cpu_offload(device=device)
    else:
        sampler.pipe.to(device)
    return sampler


def _tiny(family: str, steps: int, dtype: torch.dtype) -> Sampler:
    tiny = TINY[family]
    pipe = tiny.make()
    for _, part in transformers_of(pipe):
        _cast(part, dtype)
    size = Size(tiny.size["height"], tiny.size["width"], tiny.size.get("num_frames"), steps)
    return Sampler(pipe, size, lambda prompt: tiny.arguments(prompt, dtype), tiny.show, "latent")


def _cast(part: Any, dtype: torch.dtype) -> None:
    """What ``from_pretrained(dtype=...)`` does, which leaves buffers and a few parameters as they are."""
    exact = set(part._keep_in_fp32_modules or ())
    for path, parameter in part.named_parameters():
        if exact.isdisjoint(path.split(".")):
            parameter.data = parameter.data.to(dtype)


def _real(name: str, given: Size, dtype: torch.dtype, pipelines: Sequence[str]) -> Sampler:
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(name)
        kind = index["_class_name"]
        if kind not in pipelines:
            raise ValueError(f"it is a {kind}, and this command runs {', '.join(pipelines)}")
        if index.get("text_encoder", [None]) == [None, None]:
            raise ValueError(f"this {kind} has no text encoder")
        usual = PIPELINES[kind]
        if usual.frames is None and given.frames is not None:
            raise ValueError("--frames is for videos, and this model makes pictures")
        dtypes = {"default": dtype, "vae": torch.float32} if kind in _FLOAT32_VAE else dtype
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=dtypes)
    except unreadable() as error:
        if Path(name).is_dir():
            raise ValueError(f"cannot load the pipeline in folder {name!r}: {one_line(error)}") from error
        raise ValueError(
            f"cannot load {name!r} from the hub (no such model, no network, or no access: for a gated model accept its "
            f"licence and run `hf auth login`): {one_line(error)}"
        ) from error
    size = Size(*(mine if mine is not None else its for mine, its in zip(astuple(given), astuple(usual), strict=True)))
    check_size(pipe, size)
    # HunyuanDiT would take another size, of a few that it was trained at, without a word.
    binning = "use_resolution_binning" in inspect.signature(pipe.__call__).parameters
    fixed = {"use_resolution_binning": False} if binning else {}
    return Sampler(pipe, size, lambda prompt: {"prompt": prompt}, _as_frames, "np", **fixed)


def check_size(pipe: Any, size: Size) -> None:
    """Reject what the pipeline would round, or fail at: its VAE and patches come in whole numbers only."""
    patch = getattr(transformers_of(pipe)[0][1].config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else max(patch[-2:])
    spatial = (
        "vae_scale_factor_spatial",
        "vae_spatial_compression_ratio",
        "vae_scale_factor",
        "vae_spatial_scale_factor",
    )
    temporal = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
    # Pipelines that put pixels of latents together before the transformer sees them ask their processor for it.
    processor = getattr(pipe, "video_processor", None) or getattr(pipe, "image_processor", None)
    side = math.lcm(_first_of(pipe, spatial) * patch, processor.config.vae_scale_factor if processor else 1)
    multiples = [("height", side, 0), ("width", side, 0)]
    if size.frames is not None:
        multiples.append(("frames", _first_of(pipe, temporal), 1))
    for name, whole, more in multiples:
        value = getattr(size, name)
        if (value - more) % whole:
            below = (value - more) // whole * whole + more
            nearest = " and ".join(str(x) for x in (below, below + whole) if x > 0)
            what = f"a multiple of {whole}" + (f" plus {more}" if more else "")
            raise ValueError(f"--{name} must be {what} for this model, got {value}; nearest: {nearest}")


def _first_of(pipe: Any, names: Sequence[str]) -> int:
    return next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 1)


def _as_frames(output: Any) -> Tensor:
    """Arrays ``[1, F, H, W, 3]`` of videos and ``[1, H, W, 3]`` of pictures as frames."""
    array = torch.as_tensor(output)
    return array[0] if array.dim() == 5 else array
