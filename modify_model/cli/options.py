"""The options of the command and of the scripts: each is named once, with the commands that have it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from typing import Any

from spas_attn import backends
from spas_attn.call import PRECISIONS

from .arguments import DTYPES, layer_range, tail_bound, whole
from .diffusion import PIPELINES, DiffusionModel
from .driver import SELECTORS, Subject
from .language import LanguageModel
from .tiny import LLAMA, PREFIX, TINY

VERBS = {
    "tune": "find the thresholds of every attention head on a few prompts, and save them",
    "generate": "generate with tuned thresholds",
    "compare": "run the same inputs dense and sparse, and compare what comes out",
    "verify": "check in five steps that a model can be patched, computes what it did before, and can be restored",
}
_ALL, _RUNS, _WORK = "tune generate compare verify", "tune generate compare", "generate compare"
_TINY = ", ".join(PREFIX + name for name in (LLAMA, *TINY))
_MODELS = f"a folder, a name on the hub, a .gguf file, or one of {_TINY} (random weights)"
_PROMPTS = (
    "for a pipeline a text file, a prompt per line (left out: ten of our own); for a language model a text file, a "
    "folder of *.txt and *.py files, or a hub dataset (left out: Python source)"
)
_OBJECTIVE = "bounds per head, or one budget for the model, spent where it costs least, for one of the targets"
_TARGET = "a target of --objective budget, or another one than the tuned file was made for"
_USUAL_BOUND = "left out: none with a budget, else"
_USUAL = "left out: as usual for the model"
Add = Callable[..., None]


def add_options(parser: argparse.ArgumentParser, verbs: Collection[str], kind: type[Subject] | None) -> None:
    """The options of some commands, for one kind of model or for both; all others have their defaults."""
    parser.set_defaults(**{verb: [verb] == [*verbs] for verb in VERBS})
    parser.set_defaults(kind=kind, pipelines=tuple(PIPELINES), special=lambda args, device: None)
    for of, options in _options():
        wanted = of is None or kind in (None, of)
        group = parser.add_argument_group(f"only for a {of.kind}") if of and wanted and kind is None else parser
        for name, needed, text, more in options:
            if wanted and not set(verbs).isdisjoint(needed.split()):
                group.add_argument(f"--{name}", help=text, **more)
            else:
                parser.set_defaults(**{name: _default(more)})


def check_options(args: argparse.Namespace) -> None:
    """Reject options of the other kind of model; a ValueError names one."""
    for of, options in _options():
        for name, _, _, more in options:
            if of not in (None, args.kind) and getattr(args, name) != _default(more):
                raise ValueError(f"--{name} is for a {of.kind}, and {args.model_name!r} is a {args.kind.kind}")


def _default(more: dict[str, Any]) -> Any:
    return False if "action" in more else more.get("default")


def _options() -> Iterator[tuple[Any, list[tuple[str, str, str, dict[str, Any]]]]]:
    """Name, commands, help text and further arguments of all options, by the kind of model that they are for."""
    for of, part in ((None, _common), (LanguageModel, _language), (DiffusionModel, _diffusion)):
        found: list[tuple[str, str, str, dict[str, Any]]] = []
        part(lambda name, needed, text, found=found, **more: found.append((name, needed, text, more)))
        yield of, found


def _common(add: Add) -> None:
    n: dict[str, Any] = dict(type=whole(1, 10_000), metavar="N")
    flag: dict[str, Any] = dict(action="store_true")
    add("model_name", _ALL, _MODELS, metavar="NAME")
    add("model_out_path", _ALL, "the tuned file; its statistics are written beside it", metavar="FILE")
    add("objective", "tune", _OBJECTIVE, choices=("bounds", "budget"), default="bounds")
    add("sparsity", _RUNS, f"least mean sparsity, such as 0.7; {_TARGET}", type=float)
    add("speedup", _RUNS, f"least speedup of attention, by this GPU's cost model; {_TARGET}", type=float)
    add("error", _RUNS, f"largest predicted error of the model's output; {_TARGET}", type=float)
    add("l1", "tune", f"bound of the mean error of selection, per head ({_USUAL_BOUND} 0.06)", type=float)
    add("pv_l1", "tune", f"bound of the mean error of everything, per head ({_USUAL_BOUND} 0.07)", type=float)
    tail = f"bound of the 99.5th percentile of a query's error, or 'none' ({_USUAL_BOUND} 0.5)"
    add("tail", "tune", tail, type=tail_bound, default=...)
    add("prompts", _RUNS, _PROMPTS, metavar="FILE")
    add("num_tune_samples", _RUNS, "prompts or texts to tune on (left out: 5 prompts, 8 texts)", **n)
    add("num_compare", _WORK, "prompts or texts to run, others than those (left out: 1 prompt, 4 texts)", **n)
    offered = [name for name in PRECISIONS if name != "auto"]
    add("precisions", "tune", "each layer takes the fastest of these that holds its bounds", nargs="+", choices=offered)
    add("selector", "tune", "how blocks are chosen (left out: as suits the model)", choices=sorted(SELECTORS))
    add("block", "tune", "mask block size, for queries and keys (left out: as above)", type=int, choices=(64, 128))
    add("pool", "tune", "length of the sub-blocks whose means are scored (left out: as above)", **n)
    add("layer_range", _ALL, "only layers START to STOP - 1 become sparse", type=layer_range, metavar="START,STOP")
    add("dense_layers", _RUNS, "layers kept dense, from 0 on", type=whole(0), nargs="+", default=[], metavar="LAYER")
    add("backend", _RUNS, "what computes the attention", choices=("auto", *sorted(backends.names())), default="auto")
    add("parallel_tune", "tune", "tune on all visible GPUs, or in two processes on a CPU", **flag)
    add("resume", "tune", "go on with an interrupted tune from its last finished prompt", **flag)
    add("compile", _WORK, "compile the model first (takes minutes)", **flag)
    add("seed", _RUNS, "of texts; of noise: prompt i starts from the noise of seed + i", type=whole(0), default=0)
    add("device", _ALL, "cuda, cpu, … (left out: the GPU if there is one)")
    add("dtype", _ALL, "auto: as the model was made, and float32 on a CPU", choices=DTYPES, default="auto")


def _language(add: Add) -> None:
    text, new = "tokens of a text (left out: 4096, to verify 1024)", "tokens to generate (left out: 128, to verify 48)"
    add("max_length", "tune compare verify", text, type=whole(64), metavar="N")
    add("prompt", "generate verify", "the text to continue (left out: a few lines of Python)", metavar="TEXT")
    add("max_new_tokens", "generate verify", new, type=whole(1), metavar="N")


def _diffusion(add: Add) -> None:
    n: dict[str, Any] = dict(metavar="N")
    add("height", _ALL, f"in pixels; {_USUAL}", type=whole(16), **n)
    add("width", _ALL, f"in pixels; {_USUAL}", type=whole(16), **n)
    add("frames", _ALL, f"of a video; {_USUAL}", type=whole(1), **n)
    add("steps", _ALL, f"of denoising; {_USUAL}, to verify 2", type=whole(1, 10_000), **n)
    add("tune_every", "tune", "observe every N-th step (left out: about ten of them)", type=whole(1), **n)
    add("phases", "tune", "thresholds for each of so many phases of denoising", type=whole(1, 20), default=1, **n)
    add("dense_steps", _RUNS, "so many first and last steps run dense", type=whole(0), nargs=2, metavar="N")
    add("offload", _ALL, "keep only the component that is running on the GPU", action="store_true")
    add("out_path", _WORK, "folder for pictures", default="out", metavar="FOLDER")
