"""The driver of the diffusion examples: load a pipeline, tune it, save, load, generate, and compare with dense.

An example script describes its family (:class:`_diffusion_models.Example`) and calls :func:`main`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _command_line import (
    Help,
    check_output,
    check_tuned_output,
    checkpoint_of,
    join_ranks,
    run_script,
    save,
    tail_bound,
)
from _demo_clips import PROMPTS as DEMO_PROMPTS
from _diffusion_compare import compare, density_table, show_alone, table, write
from _diffusion_models import TINY_PREFIX, DemoSampler, Example, Sampler, check_name, load
from _loading import DTYPES
from torch import nn
from tqdm import tqdm

import autotune
from autotune import report
from autotune.calibration import Calibration
from autotune.module import check_bounds, sparse_modules, transformers_of
from modify_model import dense_steps_of, patch, verify
from modify_model.schedule import argument
from spas_attn import fallback_counts

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
SMALLEST = {
    "num_tune_samples": 1,
    "tune_every": 1,
    "num_compare": 1,
    "steps": 1,
    "height": 16,
    "width": 16,
    "frames": 1,
}


def parse_arguments(example: Example, text: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with code 2 and a message on what cannot be meant."""
    parser = argparse.ArgumentParser(description=text, formatter_class=Help)
    add = parser.add_argument
    add("--tune", action="store_true", help="calibrate and save; otherwise thresholds are loaded")
    add("--parallel_tune", action="store_true", help="--tune on all visible GPUs, or in several processes on a CPU")
    add("--compare", action="store_true", help="generate the same seeds dense and sparse, and compare them")
    add("--model_name", default=example.model_name, metavar="NAME", help="a name on the hub, a folder, or one of "
        + ", ".join(TINY_PREFIX + name for name in example.tiny) + " (random weights, no download)")  # fmt: skip
    add("--model_out_path", metavar="PATH", help="the tuned file (default: models_dict/<model>_<l1>_<pv_l1>.pt)")
    add("--l1", type=float, default=0.06, help="bound of the mean error of selection, per head")
    add("--pv_l1", type=float, default=0.07, help="bound of the mean error of everything, per head")
    add("--tail", type=tail_bound, default=0.5, help="bound of the 99.5 percentile of a query's error, or 'none'")
    add("--prompts", metavar="FILE", help="a text file, a prompt per line; left out: ten of our own")
    add("--num_tune_samples", type=int, default=5, metavar="N", help="prompts to calibrate on, from the first")
    add("--tune_every", type=int, metavar="N", help="calibrate on every N-th step; left out: on about ten of them")
    add("--num_compare", type=int, default=1, metavar="N", help="prompts to generate, from the first not tuned on")
    for name in ("height", "width", "frames", "steps"):
        add(f"--{name}", type=int, metavar="N", help="left out: as usual for the model")
    add("--dense_steps", type=int, nargs=2, metavar=("FIRST", "LAST"), help="so many first and last steps run dense")
    add("--dense_layers", type=int, nargs="+", default=[], metavar="LAYER", help="layers that run dense, from 0 on")
    add("--compile", action="store_true", help="compile the transformer before generating (takes minutes)")
    add("--offload", action="store_true", help="keep only the component that is running on the GPU")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16, and float32 on a processor")
    add("--device", help="cuda, cpu, …; left out: the GPU if there is one")
    add("--out_path", default="out", metavar="FOLDER", help="where pictures go")
    add("--resume", action="store_true", help="go on with an interrupted --tune from its last finished sample")
    add("--seed", type=int, default=0, help="of the noise: prompt i starts from the noise of seed + i")
    args = parser.parse_args(arguments)
    args.tune = args.tune or args.parallel_tune
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse, before a model is loaded, what cannot be meant; fills in the path of the tuned file."""
    check_bounds(args.l1, args.pv_l1, args.tail)
    for name, least in SMALLEST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if args.dense_steps is not None and min(args.dense_steps) < 0:
        raise ValueError(f"--dense_steps must be two numbers, 0 or more, got {args.dense_steps}")
    if args.resume and not args.tune:
        raise ValueError("--resume goes on with an interrupted --tune: give both")
    if args.parallel_tune and args.device is not None:
        raise ValueError("--parallel_tune gives each process a device of its own: leave out --device")
    if args.model_out_path is None:
        name = Path(args.model_name).name.replace(":", "_")
        folder = "out" if args.model_name.startswith(TINY_PREFIX) else "models_dict"
        args.model_out_path = f"{folder}/{name}_{args.l1:g}_{args.pv_l1:g}.pt"
    if args.tune:
        check_tuned_output(args.model_out_path)
    if args.compare or not args.tune:
        check_output("out_path", args.out_path, folder=True)


def read_prompts(path: str | None, sampler: Sampler | None = None) -> list[str]:
    """The prompts of a file, a line each; our own (the demo's for the demo) without one.

    Raises:
        FileNotFoundError, ValueError: when there is no such file, or no prompt in it.
    """
    if path is None:
        demo = isinstance(sampler, DemoSampler)
        return [*DEMO_PROMPTS["calibration"], *DEMO_PROMPTS["unseen"]] if demo else list(PROMPTS)
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"no file of prompts at {path!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts in {path!r}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"nothing to run: no prompt in {path!r}")
    return prompts


class _ScheduleKnown(Exception):
    """The pipeline has set its timesteps; nothing more is needed."""


def shares_of_steps(sampler: Sampler, prompt: str, first: int, last: int) -> tuple[float, float]:
    """``dense_steps`` for numbers of steps, on the schedule that the pipeline itself sets.

    Pipelines shift their schedules by the size of the picture; so one is started, and stopped when the first
    transformer is called.
    """

    def stop(*_: object) -> None:
        raise _ScheduleKnown

    handles = [part.register_forward_pre_hook(stop) for _, part in transformers_of(sampler.pipe)]
    try:
        sampler.watch(prompt, 0)
    except _ScheduleKnown:
        pass
    finally:
        for handle in handles:
            handle.remove()
        sampler.pipe.maybe_free_model_hooks()
    return dense_steps_of(sampler.pipe.scheduler, first, last)


class EveryNth:
    """Lets a calibration watch every n-th denoising step only, from the middle of the first n on; a context manager.

    Neighbouring steps resemble each other, so that some tell about all. The others run dense, which is not watched.
    """

    def __init__(self, pipe: Any, every: int) -> None:
        self.parts, self.every = [part for _, part in transformers_of(pipe)], every
        self.layers = list(sparse_modules(pipe).values())
        self.seen: list[float] = []
        self.longest = 0  # queries that a layer was called with, at most

    def restart(self) -> None:
        """The next step is the first of a generation."""
        self.seen = []

    def __enter__(self) -> EveryNth:
        self.handles = [part.register_forward_pre_hook(self._begin, with_kwargs=True) for part in self.parts]
        self.handles += [layer.register_forward_pre_hook(self._measure) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            layer.dense_now = False

    def _measure(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.longest = max(self.longest, args[0].shape[2])

    def _begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        level = float(torch.as_tensor(argument(part, "timestep", args, kwargs)).max())
        if level not in self.seen:  # guidance calls a transformer twice at each step
            self.seen.append(level)
        skipped = self.seen.index(level) % self.every != self.every // 2
        for layer in self.layers:
            # With dense_steps the schedule's own hook has set it for this call already.
            layer.dense_now = skipped or (layer.dense_steps is not None and layer.dense_now)


def tune(
    sampler: Sampler,
    prompts: Sequence[str],
    seed: int = 0,
    every: int = 1,
    *,
    show: bool = True,
    before_each: Callable[[Calibration], object] = lambda calibration: None,
    **options: Any,
) -> Calibration:
    """Calibrate a patched pipeline.

    Args:
        sampler: with the pipeline.
        prompts: prompt i starts from the noise of seed + i.
        seed: of the noise, and of the sampling of query blocks.
        every: watch every n-th denoising step only.
        show: a progress bar.
        before_each: called before each run of a prompt.
        options: as in :func:`autotune.calibrate`.

    Raises:
        ValueError: when there is nothing to watch: too small a picture, or too few steps.
    """
    # All that a prompt's calls depend on, so that a checkpoint of other calls is refused.
    items = [(p, seed + i, str(sampler.size), sampler.size.steps, every) for i, p in enumerate(prompts)]
    with autotune.calibrate(sampler.pipe, seed=seed, **options) as calibration, EveryNth(sampler.pipe, every) as steps:
        bar = tqdm(unit="pass", disable=not show, desc="tuning", total=0)
        for prompt, noise, *_ in calibration.prompts(items):
            bar.total = calibration.expected_passes
            bar.set_description(f"tuning ({calibration.phase})")
            bar.refresh()
            before_each(calibration)
            steps.restart()
            sampler.watch(prompt, noise)
            check_watched(calibration, steps, sampler)
            bar.update()
        bar.total = bar.n
        bar.close()
    return calibration


def check_watched(calibration: Calibration, steps: EveryNth, sampler: Sampler) -> None:
    """Refuse a run of the pipeline in which some layer saw nothing; a ValueError names the arguments to change."""
    blind = [layer for layer in calibration.layers if layer.open is None]
    block = max((layer.module.selector.block_q for layer in blind), default=0)
    if blind and 0 < steps.longest < block:
        raise ValueError(
            f"too small for sparse attention (see --height, --width, --frames): at {sampler.size} a layer has "
            f"{steps.longest} tokens, and one block has {block}"
        )
    if blind:
        raise ValueError(
            "too few steps are watched (see --steps, --tune_every, --dense_steps): nothing was seen of layer "
            f"{blind[0].path!r} in {sampler.size.steps} steps, of which every {steps.every}. is watched"
        )


def apply(
    example: Example, args: argparse.Namespace, sampler: Sampler, prompt: str, state: dict[str, Any] | None
) -> None:
    """Patch the pipeline: for tuning, or for a tuned file, which is loaded. Any prompt will do."""
    for _, part in transformers_of(sampler.pipe):
        example.patch(part, l1=args.l1, pv_l1=args.pv_l1)
    steps = None if state is None else state.get("_metadata", {}).get("dense_steps")
    if args.dense_steps is not None:
        steps = shares_of_steps(sampler, prompt, *args.dense_steps)
    patch(sampler.pipe, tail=args.tail, dense_steps=steps, dense_layers=args.dense_layers)
    if state is not None:
        autotune.load_sparse_attention_state_dict(sampler.pipe, state)


def run_tune(args: argparse.Namespace, sampler: Sampler, prompts: Sequence[str]) -> None:
    """--tune: calibrate, print and save."""
    chosen = prompts[: args.num_tune_samples]
    if len(chosen) < args.num_tune_samples:
        raise ValueError(f"--num_tune_samples {args.num_tune_samples}: there are only {len(prompts)} prompts")
    every = args.tune_every or max(1, sampler.size.steps // 10)
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        steps = f"{sampler.size.steps} steps" + (f", every {every}. of them" if every > 1 else "")
        print(f"tuning on {len(chosen)} prompts: {sampler.size}, {steps}", flush=True)
    partial = checkpoint_of(args.model_out_path, args.resume, say=first)
    calibration = tune(sampler, chosen, args.seed, every, show=first, checkpoint=partial, resume=args.resume)
    statistics = save(calibration, args.model_out_path)
    if first:
        print(report.table(calibration.statistics))
        print(f"thresholds: {args.model_out_path}\nstatistics: {statistics}")


def run_generate(args: argparse.Namespace, sampler: Sampler, prompts: Sequence[str]) -> None:
    """Generate with the tuned pipeline; with --compare also dense."""
    if not verify(sampler.pipe).ok:
        raise ValueError("not every attention layer is patched")
    # Prompts that no threshold was chosen on, as far as there are any.
    start = args.num_tune_samples if len(prompts) > args.num_tune_samples else 0
    chosen = list(enumerate(prompts))[start : start + args.num_compare]
    if start == 0:
        say("thresholds may have been tuned on what is generated: --num_tune_samples leaves no other prompt")
    if len(chosen) < args.num_compare:
        say(f"--num_compare {args.num_compare}: only {len(chosen)} prompts are left after --num_tune_samples")
    if args.compile:
        compile_transformers(sampler.pipe)
    gpu = any(parameter.is_cuda for parameter in transformers_of(sampler.pipe)[0][1].parameters()) or args.offload
    folder = Path(args.out_path)
    if args.compare:
        pairs = [prompt for _, prompt in chosen], [args.seed + index for index, _ in chosen]
        found = compare(sampler, *pairs, warm_up=gpu or args.compile)
        facts = {"model": args.model_name, "tuned_file": args.model_out_path, "size": str(sampler.size)}
        paths = write(found, folder, {**facts, "steps": sampler.size.steps})
        print(table(found), density_table(found), sep="\n\n")
    else:
        paths = []
        for index, prompt in tqdm(chosen, desc="generating", unit="clip"):
            paths.append(show_alone(sampler.frames(prompt, args.seed + index), folder / f"sparse_{index}"))
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls ran dense: {reason}")
    print("written:", *paths)


def say(text: str) -> None:
    """A note beside the results."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def compile_transformers(pipe: Any) -> None:
    """Compile in place, so that the pipeline's checks of its transformer's class still hold."""
    print("compiling …", flush=True)
    for _, part in transformers_of(pipe):
        assert isinstance(part, nn.Module)
        part.compile()


@torch.no_grad()
def work(example: Example, args: argparse.Namespace, distributed: bool) -> None:
    """Everything after the arguments, in one process."""
    state = None if args.tune else autotune.load(args.model_out_path)
    if args.prompts is not None:
        read_prompts(args.prompts)  # a wrong path is known before minutes of loading
    device = join_ranks() if distributed else args.device
    names = ("height", "width", "frames", "steps", "dtype", "offload")
    sampler = load(example, args.model_name, device=device, **{name: getattr(args, name) for name in names})
    prompts = read_prompts(args.prompts, sampler)
    apply(example, args, sampler, prompts[0], state)
    if args.tune:
        run_tune(args, sampler, prompts)
    if distributed:
        dist.destroy_process_group()
    elif args.compare or not args.tune:
        run_generate(args, sampler, prompts)


def main(example: Example, script: str, text: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run an example's command line; returns the exit code.

    Args:
        example: the family.
        script: path of the script, text: its description.
        arguments: of the command line; ``sys.argv`` by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse_arguments(example, text, given)

    def check() -> None:
        check_name(example, args.model_name, vars(args))
        read_prompts(args.prompts)

    errors = (ValueError, OSError, torch.OutOfMemoryError)
    run = functools.partial(work, example, args)
    return run_script(script, args, given, check, run, goes_on=args.compare, errors=errors)
