r"""Block-sparse attention for pretrained models, without training: tune thresholds, use them, judge them.

    spas-attn tune --model_name meta-llama/Llama-3.1-8B --model_out_path llama.pt --prompts my_texts/
    spas-attn generate --model_name meta-llama/Llama-3.1-8B --model_out_path llama.pt
    spas-attn compare --model_name Wan-AI/Wan2.1-T2V-1.3B-Diffusers --model_out_path wan.pt
    spas-attn verify --model_name tiny:Wan                                # no download, seconds
    spas-attn report llama.pt                                             # the page of a tuned file, again

A model is a folder, a name on the hub, a .gguf file, or tiny:<family> (random weights, for a try). Whether it is a
language model or a diffusion pipeline is found out. `spas-attn COMMAND --help` lists the options of a command.
Exit code 2: an argument, a model or a file cannot be used; 130: interrupted, `tune --resume` goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from autotune import report
from spas_attn import measure

from .arguments import USER_ERROR, Help, check_output
from .diffusion import PIPELINES, DiffusionModel
from .driver import KINDS, Subject, check, run
from .names import kind_of
from .options import VERBS, add_options, check_options
from .parallel import guarded
from .verify import verify

_MEASURE = "time this GPU, so that sparse attention runs only where it is faster"
_REPORT = "write the page that shows a calibration, and print what it says in ten lines"


class Parser(argparse.ArgumentParser):
    """Errors in one line, no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**(options | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see --help)\n")


@dataclass(frozen=True)
class Script:
    """A script under a name that users know: flags instead of commands, one kind of model, and defaults of its own.

    Attributes:
        file, text: path and description of the script.
        kind: of its models.
        defaults: of its options.
        pipelines: names of the classes that it runs.
        special: loads a pipeline that only the script knows, given arguments and device, or returns None.
        command: the only one that it runs; flags choose among the others otherwise.
    """

    file: str
    text: str | None
    kind: type[Subject] = DiffusionModel
    defaults: dict[str, Any] = field(default_factory=dict)
    pipelines: tuple[str, ...] = tuple(PIPELINES)
    special: Callable[[argparse.Namespace, str | None], Any] = lambda args, device: None
    command: str | None = None

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; returns the exit code."""
        parser = Parser(prog=Path(self.file).name, description=self.text, formatter_class=Help)
        verbs = [self.command] if self.command else [verb for verb in VERBS if verb != "verify"]
        for verb in verbs if len(verbs) > 1 else []:
            parser.add_argument(f"--{verb}", action="store_true", help=VERBS[verb])
        add_options(parser, verbs, self.kind)
        parser.set_defaults(pipelines=self.pipelines, special=self.special, **self.defaults)
        return _run(parser, list(sys.argv[1:] if arguments is None else arguments), [self.file])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the installed command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["measure"]:
        return guarded("spas-attn measure", lambda: _measure(given[1:]))
    if given[:1] == ["report"]:
        return report_main("spas-attn report", given[1:])
    parser = Parser(prog="spas-attn", description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for verb, text in VERBS.items():
        command = commands.add_parser(
            verb, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=Help
        )
        add_options(command, [verb], None)
    commands.add_parser("measure", help=_MEASURE)
    commands.add_parser("report", help=_REPORT)
    return _run(parser, given, ["--module", "modify_model.cli.main"])


def _measure(arguments: list[str]) -> int:
    if not torch.cuda.is_available() and not {"-h", "--help"} & {*arguments}:
        raise ValueError("no CUDA GPU: there is nothing to measure (on a CPU the backend `cpu` is always chosen)")
    measure.main(arguments)
    return 0


def report_main(program: str, arguments: Sequence[str], text: str | None = None) -> int:
    """Write the page of a tuned file and print its summary; returns the exit code."""
    parser = Parser(prog=program, description=text or f"{_REPORT[0].upper()}{_REPORT[1:]}.", formatter_class=Help)
    parser.add_argument("tuned", metavar="FILE", help="a tuned file (.pt); its statistics (.json) stand beside it")
    parser.add_argument("--out_path", metavar="PAGE", help="where the page goes (left out: FILE.html)")
    args = parser.parse_args(list(arguments))

    def work() -> int:
        page = str(args.out_path or report.page_path(args.tuned))
        check_output("out_path", page)
        print(report.summary(args.tuned), f"page: {report.write_page(args.tuned, page)}", sep="\n\n")
        return 0

    return guarded(program, work)


def _run(parser: Parser, given: list[str], program: list[str]) -> int:
    """Parse, check and run; returns the exit code."""
    args = parser.parse_args(given)

    def work() -> int:
        if not args.model_name:
            raise ValueError("--model_name is needed")
        args.tune = args.tune or args.parallel_tune
        args.kind = KINDS[kind_of(args.model_name, args.kind and args.kind.kind)]
        check_options(args)
        check(args)
        return verify(args) if args.verify else run(args, program, given)

    hint = "; the same command with --resume goes on from the last finished prompt"
    return guarded(parser.prog, work, lambda: hint if args.tune else "")


if __name__ == "__main__":
    sys.exit(main())
