#!/usr/bin/env python
r"""Judge sparse prefill methods on long prompts: what they find, and what they cost in perplexity, by density.

    python evaluate/long_context.py                                        # the demo LLaMA, 2,048 bytes
    python evaluate/long_context.py --model_name SmolLM2.gguf --lengths 8192 --densities .15 .25 .35 .5
    python evaluate/long_context.py --model_name meta-llama/Llama-3.1-8B --lengths 32768 --methods XAttention \
        --tuned models_dict/llama_8b.pt
    python evaluate/long_context.py --out out/long_context --plot --page docs/benchmarks/long_context.md

Everything is made from the model's tokenizer and from texts that every Python has. Retrieval: a needle at five depths,
one of eight needles (multikey), one of many key-value pairs (kv: the hardest, the first to break), a passage to copy.
Perplexity: held-out prose and code, by position. Each method runs as published, and at equal density: its own threshold
is searched on other text until the measured density is the asked one. --calibrate adds this library's calibrated
thresholds. A task that the dense model does not solve says nothing, and the table says so. OUT.json is written after
every cell; run again with the same arguments, the program goes on where it was stopped.

Exit code 2: an argument, a model or a file cannot be used.
"""

from __future__ import annotations

import argparse
import functools
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _long  # noqa: F401
import long_judge
import long_methods
import long_results
import torch
from long_methods import CLOSE, METHODS, Calibrated
from long_results import SOLVED, Results, score
from long_tasks import RETRIEVAL, Material, samples
from tqdm import tqdm

import autotune
from modify_model import patch, restore
from modify_model.cli import language
from modify_model.cli.arguments import DTYPES, sparse_backend, whole
from modify_model.cli.parallel import guarded
from spas_attn import fallback_counts

# Pairs and needles, hardest first: the dense model decides which it solves.
SIZES = {"kv": (512, 256, 128, 64, 32, 16, 8, 4), "multikey": (8, 4, 2)}
TEXTS = ("prose", "code")


def bounds(text: str) -> tuple[float, float | None]:
    """The type of a --calibrate argument: "0.06,0.5" or "0.06,none"."""
    try:
        l1, tail = text.split(",")
        found = float(l1), None if tail == "none" else float(tail)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected l1,tail such as 0.06,0.5 or 0.06,none, got {text!r}") from None
    if found[0] <= 0 or (found[1] or 1) <= 0:
        raise argparse.ArgumentTypeError(f"bounds must be above 0, got {text!r}")
    return found


def share(text: str) -> float:
    """The type of a --densities argument: a number in (0, 1]."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1], got {text!r}")
    return number


def texts_of(kind: str) -> Any:
    """Where a kind of text is read: Python's help topics as prose, its standard library as code, or a path."""
    if kind == "code":
        return sysconfig.get_path("stdlib")
    if kind == "prose":
        from pydoc_data.topics import topics

        return list(topics.values())
    return kind


class Evaluation:
    """A model, its prompts, and the cells that are asked for."""

    def __init__(self, args: argparse.Namespace, results: Results, model: Any, tokenizer: Any) -> None:
        self.args, self.results, self.model, self.tokenizer = args, results, model, tokenizer
        self.device = model.device

    @functools.cached_property
    def material(self) -> Material:
        """What retrieval tasks are made of: prose of the unseen half."""

        def haystack(count: int, seed: int) -> list[int]:
            (window,) = language.token_windows(self.tokenizer, texts_of("prose"), count, 1, seed, "unseen")
            return window[0].tolist()

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        return Material(encode, [], haystack)

    @functools.cache  # noqa: B019 - one evaluation a process
    def windows(self, kind: str, length: int, group: str = "unseen") -> list[torch.Tensor]:
        """Windows to judge on, or to calibrate on."""
        count = self.args.windows if group == "unseen" else self.args.calibration_windows
        seed = self.args.seed + (group == "unseen")
        found = language.token_windows(self.tokenizer, texts_of(kind), length, count, seed, group)
        return [window.to(self.device) for window in found]

    def cell(self, task: str, length: int, size: int) -> dict[str, Any]:
        """The figures of the model as it now runs."""
        if task not in RETRIEVAL:
            return long_judge.perplexity(self.model, self.windows(task, length), self.args.batch)
        prompts = samples(task, self.material, length, self.args.samples, self.args.seed, size)
        return {**long_judge.answers(self.model, prompts, self.args.batch), "size": size}

    def dense(self, length: int) -> Iterator[None]:
        """The cells of the dense model; the sizes of tasks are the largest that it solves."""
        restore(self.model)
        patch(self.model)
        for task in self.args.tasks:
            if self.results.find("dense", "–", length, task) is None:
                self.results.add(self._keyed("dense", "–", length, task, self._solved(task, length)))
            yield

    def _solved(self, task: str, length: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        sizes = SIZES.get(task, (0,))
        for size in sizes:
            try:
                found = self.cell(task, length, size)
            except ValueError:
                if size > sizes[-1]:  # so many do not fit
                    continue
                raise
            if task not in RETRIEVAL or score({"task": task, **found}) >= SOLVED:
                break
        return found

    def run(self, method: str, setting: str, length: int, install: Any) -> Iterator[None]:
        """The cells of one setting of a method; ``install`` is called when one is missing."""
        missing = [t for t in self.args.tasks if self.results.find(method, setting, length, t) is None]
        if missing:
            install()
        for task in self.args.tasks:
            if task in missing:
                exact = self.results.find("dense", "–", length, task)
                assert exact is not None
                found = self.cell(task, length, exact.get("size", 0))
                self.results.add(self._keyed(method, setting, length, task, found))
            yield

    def at_density(self, method: str, target: float, length: int) -> float | None:
        """The setting at which a method has a density on calibration text; None when it cannot come near."""
        key = f"{method} {target:g} {length}"
        if key not in self.results.settings:
            probe = self.windows(self.args.texts[0], length, "calibration")[0]

            def density(x: float) -> float:
                long_methods.install(self.model, METHODS[method].at(x))
                return long_methods.density_of(self.model, probe)

            x, found = long_methods.search(density, target)
            self.results.settings[key] = {"setting": x, "density": found, "reached": abs(found - target) <= 3 * CLOSE}
            self.results.write()
        known = self.results.settings[key]
        return known["setting"] if known["reached"] else None

    def _keyed(self, method: str, setting: str, length: int, task: str, found: dict[str, Any]) -> dict[str, Any]:
        return {"method": method, "setting": setting, "length": length, "task": task, **found}

    def everything(self, length: int) -> Iterator[Any]:
        """All cells of a length: dense, calibrated, loaded, published, then density by density."""
        args = self.args
        yield from self.dense(length)
        if args.calibrate:
            with tempfile.TemporaryDirectory() as folder:
                windows = [w for kind in args.texts for w in self.windows(kind, length, "calibration")]
                calibrated = Calibrated(self.model, long_methods.OURS, windows, Path(folder))
                for l1, tail in args.calibrate:
                    name = f"l1 {l1:g}, tail {'off' if tail is None else f'{tail:g}'}"
                    install = functools.partial(calibrated.install, l1, tail)
                    yield from self.run("calibrated", name, length, install)
        for path in args.tuned:
            yield from self.run("tuned file", path, length, functools.partial(self.load, path))
        for method in args.methods:
            install = functools.partial(long_methods.install, self.model, METHODS[method].published)
            yield from self.run(method, "published", length, install)
        for target in args.densities:
            for method in args.methods:
                x = self.at_density(method, target, length)
                if x is None:
                    tqdm.write(f"{method} cannot come near a density of {target:.0%} at {length} tokens")
                    yield from args.tasks
                    continue
                install = functools.partial(long_methods.install, self.model, METHODS[method].at(x))
                yield from self.run(method, f"{target:.0%}", length, install)

    def load(self, path: str) -> None:
        """Run the model with a tuned file."""
        restore(self.model)
        patch(self.model, backend=sparse_backend(self.device))
        autotune.load_sparse_attention_state_dict(self.model, path)


def evaluate(args: argparse.Namespace, path: Path) -> None:
    """Compute every cell that is missing."""
    facts: dict[str, Any] = {
        "model": Path(args.model_name).name, "seed": args.seed, "samples": args.samples, "windows": args.windows,
        "calibration_windows": args.calibration_windows,
    }  # fmt: skip
    results = Results(path, facts)
    model, tokenizer = language.load_model(args.model_name, device=args.device, dtype=args.dtype)
    gpu = model.device.type == "cuda"
    results.facts |= {"device": torch.cuda.get_device_name() if gpu else "CPU", "dtype": str(model.dtype)}
    results.facts |= {"torch": torch.__version__}
    args.batch = args.batch or (4 if gpu else 1)
    evaluation = Evaluation(args, results, model, tokenizer)
    settings = 1 + len(args.calibrate) + len(args.tuned) + len(args.methods) * (1 + len(args.densities))
    began = time.perf_counter()
    with tqdm(total=len(args.lengths) * settings * len(args.tasks), unit="cell") as bar:
        for length in args.lengths:
            for _ in evaluation.everything(length):
                bar.update()
                if args.seconds and time.perf_counter() - began > args.seconds:
                    tqdm.write(f"stopped after {args.seconds} seconds; run again to go on")
                    return
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls fell back to dense attention: {reason}")


def read_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(language.DEMO), help="a folder, a .gguf file, a name on the hub; default: the demo")
    add("--lengths", nargs="+", type=whole(128), default=[2048], help="tokens of a prompt")
    add("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add(
        "--tasks",
        nargs="+",
        choices=[*RETRIEVAL, "perplexity"],
        default=[*RETRIEVAL, "perplexity"],
        help="default: all",
    )
    add("--texts", nargs="+", default=list(TEXTS), metavar="TEXT", help="prose, code, or a text file or folder")
    add("--densities", nargs="*", type=share, default=[0.25, 0.5], help="shares of blocks at which methods are equal")
    add("--calibrate", nargs="*", type=bounds, default=[], metavar="L1,TAIL", help="bounds of calibrations to add")
    add("--tuned", nargs="*", default=[], metavar="FILE", help="files of an earlier calibration to add")
    add("--samples", type=whole(1), default=10, help="prompts of a retrieval task")
    add("--windows", type=whole(1), default=4, help="windows of each text to judge on")
    add("--calibration_windows", type=whole(2), default=4, help="windows of each text to calibrate on")
    add("--batch", type=whole(1), help="prompts in a forward pass (left out: 4 on a GPU, 1 on a CPU)")
    add("--seconds", type=whole(1), help="stop after the cell in which so many seconds are over")
    add("--seed", type=whole(0), default=0)
    add("--device", help="cuda, cpu, … (left out: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto")
    add("--out", type=Path, default=Path("out/long_context"), help="OUT.json and OUT.png are written")
    add("--plot", action="store_true", help="only print the table and draw the picture from OUT.json")
    add("--page", type=Path, metavar="FILE", help="put the tables into this page, between its marks")
    args = parser.parse_args(given)
    if "perplexity" in args.tasks:
        place = args.tasks.index("perplexity")
        args.tasks[place : place + 1] = args.texts
    return args


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = read_arguments(given)
    return guarded("long_context.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    data = long_results.stored(args, evaluate)
    print(long_results.table(data["cells"]))
    long_results.picture(data, args.out.with_name(args.out.name + ".png"))
    if args.page:
        long_results.fill_page(args.page, long_results.page(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
