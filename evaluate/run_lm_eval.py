#!/usr/bin/env python
r"""Hand a sparse model to lm-evaluation-harness (pip install "lm_eval[hf,ruler]").

    python evaluate/run_lm_eval.py --model_name meta-llama/Llama-3.1-8B --tuned models_dict/llama_8b.pt \
        --tasks ruler_vt niah_multikey_3 --lengths 4096 --limit 20
    python evaluate/run_lm_eval.py --model_name SmolLM2.gguf --method XAttention --tasks ruler_vt --lengths 4096
    python evaluate/run_lm_eval.py --model_name meta-llama/Llama-3.1-8B --dense --tasks lambada_openai

The ruler tasks niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe and ruler_fwe are made from the
tokenizer; others download their data. The sparse kernels run at any length, so that quality is judged, not speed. One
prompt at a time. OUT.json holds the results, with the density of the prompts' prefill.

Exit code 2: an argument, a package, a model or a file is missing or cannot be used.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _long  # noqa: F401
import long_methods
from long_methods import METHODS

import autotune
from modify_model.cli import language
from modify_model.cli.arguments import DTYPES, check_output, whole
from modify_model.cli.parallel import guarded

MISSING = 'this needs the package lm_eval: pip install "lm_eval[hf,ruler]"'


def harness() -> tuple[Any, Any]:
    """``lm_eval.simple_evaluate`` and its class for transformers models; an ImportError says what is missing."""
    try:
        return importlib.import_module("lm_eval").simple_evaluate, importlib.import_module(
            "lm_eval.models.huggingface"
        ).HFLM
    except ImportError as error:
        raise ImportError(f"{MISSING} ({error})") from error


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """What the harness finds, and the density of the prompts."""
    simple_evaluate, wrap = harness()
    model, tokenizer = language.load_model(args.model_name, device=args.device, dtype=args.dtype)
    long_methods.serve(model, None if args.dense else args.method, args.tuned)
    longest = max(args.lengths) + args.max_new_tokens
    known = getattr(model.config, "max_position_embeddings", None) or longest
    # Left alone, the harness cuts long prompts at their beginning, where sink and needles are.
    lm = wrap(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max(longest, known))
    folder = args.tokenizer or (str(Path(args.model_name)) if Path(args.model_name).is_dir() else None)
    metadata = {"max_seq_lengths": args.lengths, **({"tokenizer": folder, "pretrained": folder} if folder else {})}
    with autotune.record_density(model) as densities:
        found = simple_evaluate(model=lm, tasks=args.tasks, limit=args.limit, metadata=metadata)
    density = densities.mean
    return {"results": (found or {}).get("results", {}), "density": None if density != density else density}


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    path = args.out.with_name(args.out.name + ".json")
    check_output("out", str(path))
    found = evaluate(args)
    attention = "dense" if args.dense else args.tuned or args.method
    content = {"model": args.model_name, "attention": attention, **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", "utf-8")
    for task, figures in found["results"].items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, float))
        print(f"{task}: {shown}")
    print(f"density of the prefill: {'unknown' if found['density'] is None else format(found['density'], '.1%')}")
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(language.DEMO), help="a folder, a .gguf file, a name on the hub; default: the demo")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--method", choices=list(METHODS), default="XAttention", help="as published (default: XAttention)")
    how.add_argument("--tuned", metavar="FILE", help="a calibrated file")
    how.add_argument("--dense", action="store_true", help="the model as it is")
    add("--tasks", nargs="+", default=["ruler_vt"], help="tasks of the harness (default: ruler_vt)")
    add("--lengths", nargs="+", type=whole(128), default=[4096], help="tokens of ruler's prompts (default: 4096)")
    add("--tokenizer", metavar="NAME", help="what ruler makes its prompts with; left out: the model's folder")
    add("--limit", type=whole(1), help="samples of a task")
    add("--max_new_tokens", type=whole(1), default=256, help="room for answers beyond --lengths")
    add("--device", help="cuda, cpu, … (left out: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto")
    add("--out", type=Path, default=Path("out/lm_eval"), help="OUT.json is written")
    args = parser.parse_args(given)
    return guarded("run_lm_eval.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
