#!/usr/bin/env python
r"""Sparsity against perplexity on a real model: selectors, ways of sharing out the error, blocks; all from one pass.

    python evaluate/studies/frontier.py --model_name SmolLM2-135M-Instruct.Q4_1.gguf --out docs/benchmarks/smollm2
    python evaluate/studies/frontier.py --out docs/benchmarks/smollm2 --plot      # tables and picture from the .json
    python evaluate/studies/frontier.py --length 1024 --windows 1 --settings "exact 32" --targets .6 .8

Error curves of all settings come from one pass over the calibration's windows. From a setting's curves thresholds are
chosen for each target sparsity: by one bound of the mean error for every head (uniform), by bounds of mean and tail in
the ratio of the library's defaults (bounds), by one budget for the model on error² (budget), on the mean of the
queries' squared errors (squares), on error² times the measured sensitivity of the layer and the head's share of its
output (weighted), and on the squares so weighted (both). Every choice is judged end to end on windows of other sources:
perplexity, KL from the dense model, and at one sparsity retrieval. OUT.json is written after every cell; run again with
the same arguments, the program goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _demos  # noqa: F401
import curves
import frontier_results
import long_judge
import torch
import torch.nn.functional as F
from curves import Curves
from frontier_results import DENSE, Row
from frontier_settings import SETTINGS, Setting
from long_results import Results, fill_page, stored
from long_tasks import RETRIEVAL, Material, samples
from torch import Tensor, nn
from tqdm import tqdm

import autotune
from autotune.module import DEFAULT_L1, DEFAULT_TAIL
from modify_model import patch, restore
from modify_model.cli import language
from modify_model.cli.arguments import DTYPES, sparse_backend, whole
from modify_model.cli.parallel import guarded
from spas_attn import fallback_counts

SIZES = {"kv": 8, "multikey": 2, "needle": 0, "copy": 0}  # what SmolLM2 solves at 8,192 tokens
SENSED = 0.75  # sparsity at which a layer's sensitivity is measured
# One bound for every head: of the mean error, or of the mean and the tail in the ratio of the library's defaults.
UNIFORM = {"uniform": {}, "bounds": {"l1": DEFAULT_L1, "tail": DEFAULT_TAIL}}
_ROWS = 1024  # positions whose float32 log-probabilities are formed at once


def topics() -> list[str]:
    """Python's help topics: prose."""
    from pydoc_data.topics import topics as found

    return list(found.values())


def readmes() -> list[str]:
    """What installed packages say of themselves: prose, but for some lines of code."""
    found = {}
    for package in importlib.metadata.distributions():
        text = package.metadata.get_payload()
        if isinstance(text, str) and len(text) > 1000:
            found[package.metadata["Name"]] = text
    return [found[name] for name in sorted(found, key=str.lower)]


# Texts that every installation has, by name.
TEXTS: dict[str, Callable[[], Any]] = {
    "topics": topics,
    "readmes": readmes,
    "stdlib": lambda: sysconfig.get_path("stdlib"),
    "torch": lambda: str(Path(torch.__file__).parent),
}


class Study:
    """A model, its windows and prompts, and the cells that are asked for."""

    def __init__(self, args: argparse.Namespace, results: Results, model: Any, tokenizer: Any) -> None:
        self.args, self.results, self.model, self.tokenizer = args, results, model, tokenizer
        self.device = model.device
        self.chosen: dict[str, Setting] = {name: SETTINGS[name] for name in args.settings}

    def windows(self, source: str, count: int, seed: int) -> list[Tensor]:
        """Windows ``[1, length]`` of a source."""
        found = language.token_windows(self.tokenizer, self._text(source), self.args.length, count, seed)
        return [window.to(self.device) for window in found]

    @staticmethod
    def _text(source: str) -> Any:
        return TEXTS[source]() if source in TEXTS else source

    @functools.cached_property
    def judged(self) -> dict[str, list[Tensor]]:
        """Windows by source."""
        return {Path(source).name: self.windows(source, self.args.windows, 1) for source in self.args.judge_on}

    @functools.cached_property
    def calibration(self) -> list[Tensor]:
        """Windows of all sources in turn."""
        found = [self.windows(source, self.args.calibration_windows, 0) for source in self.args.calibrate_on]
        return [window for some in zip(*found, strict=True) for window in some]

    @functools.cached_property
    def exact(self) -> dict[str, list[Tensor]]:
        """Log-probabilities of the dense model, in half precision, by source."""
        with autotune.dense(self.model):
            return {
                source: log_probabilities(self.model, some, self.args.batch) for source, some in self.judged.items()
            }

    @functools.cached_property
    def prompts(self) -> dict[str, list[Any]]:
        """Prompts of the retrieval tasks, in text of the first source judged on."""
        length, count = self.args.length, self.args.samples
        text = self._text(self.args.judge_on[0])
        stock = language.token_windows(self.tokenizer, text, 8 * length, 1, 2)[0][0].tolist()

        def haystack(tokens: int, seed: int) -> list[int]:
            start = random.Random(seed).randrange(len(stock) - tokens)
            return stock[start : start + tokens]

        def encode(words: str) -> list[int]:
            return self.tokenizer(words, add_special_tokens=False)["input_ids"]

        material = Material(encode, [], haystack)
        return {task: samples(task, material, length, count, 0, SIZES[task]) for task in self.args.tasks}

    def run(self, window: Tensor) -> None:
        """Run a window for the curves."""
        self.model(input_ids=window, use_cache=False, logits_to_keep=1)

    @functools.cached_property
    def curves(self) -> dict[str, Curves]:
        """Curves of all settings; kept beside the results."""
        path = self.args.out.with_name(self.args.out.name + ".curves.pt")
        known: dict[str, Any] = torch.load(path, weights_only=True) if path.exists() else {}
        missing = {name: (s.selector, s.candidates) for name, s in self.chosen.items() if name not in known}
        if missing:
            began = time.perf_counter()
            restore(self.model)
            patch(self.model)
            found = curves.collect(self.model, missing, self.run, self.calibration, self.args.query_blocks)
            known |= {name: vars(curve) for name, curve in found.items()}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(known, path)
            tqdm.write(f"curves of {len(missing)} settings: {time.perf_counter() - began:.0f} s")
        return {name: Curves(**fields) for name, fields in known.items()}

    def cells(self) -> Iterator[None]:
        """Every cell, one after the other."""
        restore(self.model)
        patch(self.model)
        yield from self._judge(DENSE, "–", [*self.judged, *self.args.tasks], lambda: None)
        for name, setting in self.chosen.items():
            for plan in setting.plans:
                for target in setting.targets or self.args.targets:
                    tasks = [*self.judged]
                    if target == self.args.retrieve_at and plan == setting.plans[0]:
                        tasks += self.args.tasks
                    install = functools.partial(self._install, name, plan, target)
                    yield from self._judge(name, f"{plan} {target:g}", tasks, install)

    def _judge(self, name: str, choice: str, tasks: Sequence[str], install: Callable[[], None]) -> Iterator[None]:
        length = self.args.length
        missing = [task for task in tasks if self.results.find(name, choice, length, task) is None]
        if missing:
            install()
        for task in missing:
            if task in RETRIEVAL:
                found = long_judge.answers(self.model, self.prompts[task], self.args.batch)
            else:
                exact = self.exact[task]
                with autotune.record_density(self.model) as densities:
                    nats, kl = judge(self.model, self.judged[task], exact, self.args.batch)
                found = {"by_window": nats, "kl": kl, "density": densities.mean}
            self.results.add({"method": name, "setting": choice, "length": length, "task": task, **found})
            yield

    def _install(self, name: str, plan: str, target: float) -> None:
        curve = self.curves[name]
        if plan in UNIFORM:
            chosen = curve.uniform(target, **UNIFORM[plan])
        else:
            of_queries = plan in ("squares", "both")
            weights = self.weights(name, of_queries) if plan in ("weighted", "both") else None
            chosen = curve.budget(target, weights, of_queries=of_queries)
        restore(self.model)
        patch(self.model, selector=self.chosen[name].selector, backend=sparse_backend(self.device))
        curves.install(self.model, curve, chosen)

    @functools.cache  # noqa: B019 - one study a process
    def weights(self, name: str, of_queries: bool) -> Tensor:
        """Sensitivity of every layer times the squared shares of its heads, ``[layers, H]``.

        A layer's sensitivity is the model's KL when that layer alone is sparse, over the layer's own error².
        """
        curve = self.curves[name]
        chosen = curve.budget(SENSED, of_queries=of_queries)
        windows = self.calibration[:2]
        restore(self.model)
        patch(self.model, selector=self.chosen[name].selector, backend=sparse_backend(self.device))
        exact = log_probabilities(self.model, windows, self.args.batch)
        squared = curve.of(chosen, curve.squares(of_queries), 0.0)
        squared = (squared * curve.share.square()).sum(-1)
        found = []
        for layer in range(len(chosen)):
            curves.install(self.model, curve, chosen, [layer])
            _, kl = judge(self.model, windows, exact, self.args.batch)
            found.append(kl)
        weights = torch.tensor(found, dtype=torch.float64) / squared.clamp(min=1e-9)
        weights = weights[:, None] * curve.share.square()
        return weights / weights.mean()


@torch.inference_mode()
def log_probabilities(model: nn.Module, windows: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Log-probabilities ``[L, vocabulary]`` of every window ``[1, L]``, float16."""
    found = []
    for start in range(0, len(windows), batch):
        logits = model(input_ids=torch.cat(list(windows[start : start + batch])), use_cache=False).logits
        for row in logits:
            found.append(torch.cat([F.log_softmax(part.float(), -1).half() for part in row.split(_ROWS)]))
    return found


@torch.inference_mode()
def judge(
    model: nn.Module, windows: Sequence[Tensor], exact: Sequence[Tensor], batch: int
) -> tuple[list[float], float]:
    """Nats per token of every window, and the mean KL from the dense model's log-probabilities per token."""
    nats, total = [], 0.0
    for start in range(0, len(windows), batch):
        ids = torch.cat(list(windows[start : start + batch]))
        logits = model(input_ids=ids, use_cache=False).logits
        for row, reference, targets in zip(logits, exact[start : start + batch], ids, strict=True):
            losses, kl = [], []
            following = F.pad(targets[1:], (0, 1), value=-100)
            for part, other, target in zip(
                row.split(_ROWS), reference.split(_ROWS), following.split(_ROWS), strict=True
            ):
                logs, other = F.log_softmax(part.float(), -1), other.float()
                losses.append(F.nll_loss(logs, target, reduction="sum"))
                kl.append((other.exp() * (other - logs)).sum())
            nats.append(float(torch.stack(losses).double().sum()) / (len(targets) - 1))
            total += float(torch.stack(kl).double().sum()) / len(targets)
    return nats, total / len(windows)


def evaluate(args: argparse.Namespace, path: Path) -> None:
    """Compute every cell that is missing."""
    names = ("length", "windows", "calibration_windows", "query_blocks", "samples", "calibrate_on", "judge_on")
    facts: Row = {"model": Path(args.model_name).name} | {name: getattr(args, name) for name in names}
    facts |= {name: [Path(source).name for source in facts[name]] for name in ("calibrate_on", "judge_on")}
    results = Results(path, facts)
    model, tokenizer = language.load_model(args.model_name, device=args.device, dtype=args.dtype)
    gpu = model.device.type == "cuda"
    results.facts |= {"device": torch.cuda.get_device_name() if gpu else "CPU", "dtype": str(model.dtype)}
    results.facts |= {"torch": torch.__version__, "tokens": args.length * args.windows * len(args.judge_on)}
    study, began = Study(args, results, model, tokenizer), time.perf_counter()
    for _ in tqdm(study.cells(), unit="cell"):
        if args.seconds and time.perf_counter() - began > args.seconds:
            print(f"stopped after {args.seconds} seconds; run again to go on")
            break
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls fell back to dense attention: {reason}")


def read_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = list(SETTINGS)
    add("--model_name", default=str(language.DEMO), help="a folder, a .gguf file, a name on the hub; default: the demo")
    add("--length", type=whole(128), default=8192, help="tokens of a window")
    add("--settings", nargs="+", choices=names, metavar="NAME", default=names, help=", ".join(names))
    add("--targets", nargs="+", type=float, default=[0.62, 0.67, 0.72, 0.77, 0.82], help="sparsities")
    known = ", ".join(TEXTS)
    add("--calibrate_on", nargs="+", default=["topics", "stdlib"], metavar="TEXT", help=f"{known}, or a file or folder")
    add("--judge_on", nargs="+", default=["readmes", "torch"], metavar="TEXT", help="other sources than those")
    add("--calibration_windows", type=whole(1), default=4, help="of each source")
    add("--query_blocks", type=whole(1), default=16, help="looked at per call")
    add("--windows", type=whole(1), default=8, help="of each source, to judge on")
    add("--tasks", nargs="*", choices=RETRIEVAL, default=["needle", "kv", "copy"], help="retrieval tasks")
    add("--samples", type=whole(1), default=20, help="prompts of a retrieval task")
    add("--retrieve_at", type=float, default=0.77, help="the target at which retrieval is judged")
    add("--batch", type=whole(1), default=4, help="windows in a forward pass")
    add("--seconds", type=whole(1), help="stop after the cell in which so many seconds are over")
    add("--device", help="cuda, cpu, … (left out: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto")
    add("--out", type=Path, default=Path("out/frontier"), help="OUT.json and OUT.png are written")
    add("--plot", action="store_true", help="only print the tables and draw the picture from OUT.json")
    add("--page", type=Path, metavar="FILE", help="put the tables into this page, between its marks")
    return parser.parse_args(given)


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    data = stored(args, evaluate)
    shown = frontier_results.tables(data)
    print(frontier_results.points(data), shown, sep="\n\n")
    if args.page:
        fill_page(args.page, shown)
    frontier_results.picture(data, args.out.with_name(args.out.name + ".png"))
    return 0


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = read_arguments(given)
    return guarded("frontier.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
