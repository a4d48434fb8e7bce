r"""Block-sparse attention for pretrained models, without training: tune thresholds, use them, judge them.

    spas-attn tune --model_name meta-llama/Llama-3.1-8B --model_out_path llama.pt --prompts my_texts/
    spas-attn generate --model_name meta-llama/Llama-3.1-8B --model_out_path llama.pt
    spas-attn compare --model_name Wan-AI/Wan2.1-T2V-1.3B-Diffusers --model_out_path wan.pt
    spas-attn verify --model_name tiny:Wan                                # no download, seconds

A model is a folder, a name on the hub, a .gguf file, or tiny:<family> (random weights, for a try). Whether it is a
language model or a diffusion pipeline is found out. Exit code 2: an argument, a model or a file cannot be used; 130:
interrupted, `tune --resume` goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from spas_attn import backends, measure

from .arguments import DTYPES, USER_ERROR, Help, layer_range, tail_bound, whole
from .diffusion import PIPELINES, DiffusionModel
from .driver import KINDS, SELECTORS, Subject, check, kind_of, run
from .language import LanguageModel
from .parallel import guarded
from .tiny import LLAMA, PREFIX, TINY
from .verify import verify

VERBS = {
    "tune": "find the thresholds of every attention head on a few prompts, and save them",
    "generate": "generate with tuned thresholds",
    "compare": "run the same inputs dense and sparse, and compare what comes out",
    "verify": "check in five steps that a model can be patched, computes what it did before, and can be restored",
    "measure": "time this GPU, so that sparse attention runs only where it is faster",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see --help)\n")


@dataclass(frozen=True)
class Script:
    """A script under a name that users know: flags instead of verbs, one kind of model, and defaults of its own.

    Attributes:
        file, text: path and description of the script.
        kind: of its models.
        defaults: of its options.
        pipelines: names of the classes that it runs.
        special: loads a pipeline that only the script knows, given arguments and device, or returns None.
    """

    file: str
    text: str | None
    kind: type[Subject] = DiffusionModel
    defaults: dict[str, Any] = field(default_factory=dict)
    pipelines: tuple[str, ...] = tuple(PIPELINES)
    special: Callable[[argparse.Namespace, str | None], Any] = lambda args, device: None

    def main(
        self, arguments: Sequence[str] | None = None, verbs: tuple[str, ...] = ("tune", "generate", "compare")
    ) -> int:
        """Run the command line; returns the exit code."""
        parser = Parser(prog=Path(self.file).name, description=self.text, formatter_class=Help)
        if len(verbs) > 1:
            for verb in verbs:
                parser.add_argument(f"--{verb}", action="store_true", help=VERBS[verb])
        else:
            parser.set_defaults(**dict.fromkeys(verbs, True))
        add_options(parser, set(verbs), {self.kind})
        parser.set_defaults(**self.defaults)
        return self.run(parser, list(sys.argv[1:] if arguments is None else arguments), [self.file])

    def run(self, parser: argparse.ArgumentParser, given: list[str], program: list[str]) -> int:
        """Parse, check and run; returns the exit code."""


def add_options(parser: argparse.ArgumentParser, verbs: set[str], kinds: set[type[Subject]]) -> None:
    """The options of some verbs for some kinds of models; those that the verbs do not need get their defaults."""
    groups: dict[str, Any] = {"": parser}
    for kind in (LanguageModel, DiffusionModel):
        groups[kind.kind] = parser.add_argument_group(f"{kind.kind}s only") if len(kinds) > 1 else parser
    for option in OPTIONS:
        ...
