"""One path for every kind of model: check, load, patch, then tune and save or load a tuned file, generate, compare.

What is special to a kind is in LanguageModel and DiffusionModel. Both have ``check(args)``, run before anything is
loaded; ``model``, what is patched; ``items()`` and ``observe(item)`` for a calibration; ``unseen()`` and ``runner`` for
a comparison; ``generate()``; ``calls()`` and ``sample()`` for the verification.
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import autotune
from autotune import report
from autotune.calibration import Calibration
from autotune.module import DEFAULT_L1, DEFAULT_PV_L1, DEFAULT_TAIL, sparse_modules
from autotune.paths import clean_path, transformers_of
from autotune.tradeoff import Target
from autotune.tuned import check_bounds
from modify_model import patch, verify
from modify_model.families import find_family
from spas_attn import fallback_counts
from spas_attn.selectors import (
    ExactKeys,
    FlashPrefill,
    FlexPrefill,
    MeanSimilarity,
    MInference,
    PeakMass,
    Selector,
    TopK,
    XAttention,
)

from .arguments import check_output, one_line, usable_device
from .compare import compare, density_table, table
from .diffusion import DiffusionModel
from .language import LanguageModel
from .parallel import is_child, is_first, join_ranks, run_parallel
from .tiny import PREFIX

Subject = LanguageModel | DiffusionModel
KINDS: dict[str, type[Subject]] = {kind.kind: kind for kind in (LanguageModel, DiffusionModel)}
TARGETS = ("sparsity", "speedup", "error")
SELECTORS: dict[str, type[Selector]] = {
    "exactkeys": ExactKeys,
    "flashprefill": FlashPrefill,
    "flexprefill": FlexPrefill,
    "mean": MeanSimilarity,
    "minference": MInference,
    "peak": PeakMass,
    "topk": TopK,
    "xattention": XAttention,
}


def check(args: argparse.Namespace) -> None:
    """Reject, before a model is loaded, what is known to be wrong; a ValueError says why."""
    missing = [name for name in ("tqdm", "safetensors", *args.kind.needs) if importlib.util.find_spec(name) is None]
    if missing:
        extras = "pip install 'spas-attn[cli,transformers,diffusers]'"
        raise ValueError(f"packages that this needs are not installed ({', '.join(missing)}): {extras}")
    usable_device(args.device)
    for name, value in args.kind.usual(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    settle_bounds(args)
    if args.model_out_path is None and not args.verify:
        folder = "out" if args.model_name.startswith(PREFIX) else "models_dict"
        name = Path(args.model_name).name.replace(":", "_")
        what = "_".join(f"{x:g}" for x in (args.l1, args.pv_l1)) if args.objective == "bounds" else str(target_of(args))
        args.model_out_path = f"{folder}/{name}_{what}.pt"
    if not (args.tune or args.compare or args.verify):
        args.generate = True
    args.kind.check(args)
    if args.parallel_tune and args.device is not None:
        raise ValueError("--parallel_tune gives each process a device of its own: leave out --device")
    if args.tune:
        selector_of(args, MeanSimilarity(pool=8))
        check_output("model_out_path", args.model_out_path)
        check_output("model_out_path (its statistics)", str(report.statistics_path(args.model_out_path)))
        check_output("model_out_path (its page)", str(report.page_path(args.model_out_path)))
        return
    if args.resume:
        raise ValueError("--resume goes on with an interrupted --tune: give both")
    if args.model_out_path is not None:
        try:
            autotune.load(args.model_out_path)
        except FileNotFoundError as error:
            raise ValueError(f"{error}: run with --tune first") from error


def target_of(args: argparse.Namespace) -> Target | None:
    """The target that the arguments name."""
    return Target.of(**{name: getattr(args, name) for name in TARGETS})


def settle_bounds(args: argparse.Namespace) -> None:
    """Check bounds and target; bounds that are left out become the usual ones, or with a budget none."""
    target, budget = target_of(args), args.objective == "budget"
    if args.tune and budget and target is None:
        raise ValueError("--objective budget needs a target: --sparsity, --speedup or --error")
    if args.tune and not budget and target is not None:
        raise ValueError(f"--{target.name} is a target of --objective budget: give both")
    for name, usual in (("l1", DEFAULT_L1), ("pv_l1", DEFAULT_PV_L1), ("tail", DEFAULT_TAIL)):
        if getattr(args, name) is (... if name == "tail" else None):
            setattr(args, name, None if budget else usual)
    if budget and args.l1 is not None and args.pv_l1 is None:
        args.pv_l1 = args.l1 * DEFAULT_PV_L1 / DEFAULT_L1
    check_bounds(args.l1, args.pv_l1, args.tail, guards=budget)


@torch.no_grad()
def run(args: argparse.Namespace, program: Sequence[str], given: Sequence[str]) -> int:
    """Run a checked command line, of a program that was given these arguments; returns the exit code."""
    child, before = is_child(), Counter(fallback_counts())
    if args.parallel_tune and not child:
        code = run_parallel(program, given)
        if code or not (args.generate or args.compare):
            return code
        args.tune = False
    state = None if args.tune else autotune.load(args.model_out_path)
    subject = args.kind(args, join_ranks() if child else None)
    apply(subject, args, state)
    if args.tune:
        run_tune(subject, args)
    if child:
        dist.destroy_process_group()
        return 0
    if (args.generate or args.compare) and not verify(subject.model).ok:
        raise ValueError("not every attention layer is patched")
    if args.compile and (args.generate or args.compare):
        print("compiling …", flush=True)
        for _, part in transformers_of(subject.model):
            part.compile()  # in place, so that checks of its class and model.generate still hold
    if args.generate:
        subject.generate()
    if args.compare:
        run_compare(subject, args)
    for reason, calls in (Counter(fallback_counts()) - before).items():
        print(f"{calls} calls fell back to dense attention: {reason}")
    return 0


def apply(subject: Subject, args: argparse.Namespace, state: dict[str, Any] | None) -> None:
    """Patch a model: for tuning, or for a tuned file, which is loaded."""
    steps = (state or {}).get("_metadata", {}).get("dense_steps")
    if args.dense_steps is not None:
        steps = subject.runner.shares_of_steps(*args.dense_steps)  # type: ignore[union-attr]
    layers = args.layer_range or (None if state is None else tuned_layers(subject.model, state))
    options = {} if args.objective == "budget" else dict(l1=args.l1, pv_l1=args.pv_l1, tail=args.tail)
    options |= dict(backend=args.backend)
    options |= dict(layer_range=layers, dense_steps=steps, dense_layers=args.dense_layers)
    patch(subject.model, **options)
    if args.selector or args.block or args.pool:
        usual = next(iter(sparse_modules(subject.model).values())).selector
        patch(subject.model, selector=selector_of(args, usual), **options)
    if state is not None:
        autotune.load_sparse_attention_state_dict(
            subject.model, state, sparsity=args.sparsity, speedup=args.speedup, error=args.error
        )
        tuned = next(iter(sparse_modules(subject.model).values())).tuned
        if tuned is not None and target_of(args) is not None:
            print(f"thresholds chosen for {target_of(args)}: {tuned.origin}")


def selector_of(args: argparse.Namespace, usual: Selector) -> Selector:
    """The selector that the arguments name; what they leave out is as in ``usual``."""
    rule = SELECTORS[args.selector] if args.selector else type(usual)
    fields: dict[str, Any] = {"block_q": args.block or usual.block_q, "block_k": args.block or usual.block_k}
    if hasattr(rule, "pool"):
        # Pools of queries alone are of another size than pools of both sides.
        alike = isinstance(usual, ExactKeys) is (rule is ExactKeys)
        default = ExactKeys.pool if rule is ExactKeys else 8
        fields["pool"] = args.pool or (getattr(usual, "pool", default) if alike else default)
        if rule is ExactKeys and alike:
            fields |= {name: getattr(usual, name) for name in ("cdf_threshold", "queries", "rank")}
    elif args.pool:
        raise ValueError(f"--pool belongs to the selectors that score means of sub-blocks, not to {rule.__name__}")
    if rule is MInference:
        fields["adaptive_budget"] = 0.3  # sizes in tokens have no threshold to tune
    return rule(**fields)


def tuned_layers(model: Any, state: dict[str, Any]) -> tuple[int, int] | None:
    """The layer_range that a tuned file was made with; None when no layer of the model is in it."""
    prefix, root = transformers_of(model)[0]
    paths = [prefix + clean_path(layer.path) for layer in find_family(root).layers(root)]
    tuned = [index for index, path in enumerate(paths) if f"{path}.inner_attention.is_sparse" in state]
    return (tuned[0], tuned[-1] + 1) if tuned else None


@torch.no_grad()
def tune(subject: Any, items: Sequence[Any], *, show: bool = True, hint: str = "", **options: Any) -> Calibration:
    """Calibrate a patched model.

    Args:
        subject: gives the ``model``, and ``observe(item)``, which runs it.
        items: what it is run on.
        show: a progress bar.
        hint: which arguments to change when there was nothing to see: too short an input, or too few steps.
        options: as in :func:`autotune.calibrate`.

    Raises:
        ValueError: when there was nothing to see.
    """
    from tqdm import tqdm

    bar = tqdm(unit="pass", disable=not show, total=0)
    with autotune.calibrate(subject.model, **options) as calibration, bar:
        for item in _told(calibration.prompts(items), hint):
            bar.total = calibration.expected_passes
            bar.set_description(f"tuning ({calibration.phase})")
            subject.observe(item)
            bar.update()
    return calibration


def _told(passes: Iterator[Any], hint: str) -> Iterator[Any]:
    """The same, with what the calibration cannot do as an error of the user."""
    try:
        yield from passes
    except RuntimeError as error:
        raise ValueError(f"{error} ({hint})" if hint else str(error)) from error


def run_tune(subject: Subject, args: argparse.Namespace) -> None:
    """Calibrate, print and save; a checkpoint outlives a failure."""
    items, path = subject.items(), args.model_out_path
    partial = path + ".partial"
    if is_first():
        print(f"tuning on {len(items)} prompts, {subject}", flush=True)
        if args.resume and not glob.glob(glob.escape(partial) + ".rank*"):
            print(f"no checkpoint found at {partial + '.rank*'!r}; starting from scratch", flush=True)
    options = dict(every=subject.every, seed=args.seed, checkpoint=partial, resume=args.resume)
    options |= dict(phases=args.phases, precisions=args.precisions)
    if args.objective == "budget":
        options |= dict(objective="budget", l1=args.l1, pv_l1=args.pv_l1, tail=args.tail)
        options |= {name: getattr(args, name) for name in TARGETS}
    calibration = tune(subject.runner, items, show=is_first(), hint=subject.hint, **options)
    try:
        statistics = calibration.save(path, about=about(subject, args))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise ValueError(
            f"cannot write {path!r}: {one_line(error)}; the calibration is kept in {partial + '.rank*'!r}: clear the "
            "way, and the same command with --resume goes on from there"
        ) from error
    if is_first():
        print(report.table(calibration.statistics), report.summary(path), sep="\n\n", end="\n\n")
        print(f"thresholds: {path}\nstatistics: {statistics}\npage: {report.page_path(path)}")


def about(subject: Subject, args: argparse.Namespace) -> dict[str, str]:
    """What a tuned file says of its model and prompts; of paths only the last part."""
    model, prompts = (
        Path(name).name if name and Path(name).exists() else name for name in (args.model_name, args.prompts)
    )
    return {"model": model, "prompts": f"{prompts or 'the default ones'}, {subject}"}


def run_compare(subject: Subject, args: argparse.Namespace) -> None:
    """Run inputs dense and sparse, print tables, and write the pictures of a pipeline."""
    gpu = args.offload or next(transformers_of(subject.model)[0][1].parameters()).is_cuda
    found = compare(subject.runner, subject.unseen(), warm_up=gpu or args.compile)
    print(table(found), density_table(found), sep="\n\n")
    subject.report(found)
