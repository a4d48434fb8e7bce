"""Compare two recordings of tests/test_llama_output_accuracy.py: logits, perplexity and generated text.

    python evaluate/compare_results.py before.json after.json

Exit code 0: close enough; 1: the logits' cosine is below --threshold (0.95); 2: a file cannot be read, or the two were
not recorded on the same texts.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modify_model.cli.main import Parser
from modify_model.cli.parallel import guarded

FORMAT = 1
# What must agree, and how a message calls it.
SAME = {
    "vocabulary": "vocabulary sizes",
    "length": "text lengths (--max_length)",
    "num_samples": "numbers of texts (--num_samples)",
    "max_new_tokens": "numbers of new tokens (--max_new_tokens)",
    "stride": "recorded positions",
    "text_sha256": "texts (or tokenizers)",
}
DIFF_LINES = 12


def read(path: str) -> dict[str, Any]:
    """A recording; a ValueError with the reason when it is none."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path!r} is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path!r} is no recording of format {FORMAT}, as tests/test_llama_output_accuracy.py writes")
    missing = sorted({*SAME, "windows", "generations", "perplexity", "mean_density", "logits"} - content.keys())
    if missing:
        raise ValueError(f"{path!r} lacks {', '.join(missing)}")
    return content


def unpack(entry: dict[str, Any], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of one text: ``[R, N]`` of R positions, or ``[L]`` of all (``top1``)."""
    flat = torch.frombuffer(bytearray(base64.b64decode(entry[name], validate=True)), dtype=dtype)
    values = flat.double() if dtype == torch.float32 else flat
    return values if name == "top1" else values.reshape(entry["rows"], -1)


def similarity(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Tensor]:
    """Of two recordings of a text: products of the logits ``[3, R]``, KL ``[R]`` in nats, equal first choices ``[L]``.

    Where only the highest logits were kept, tokens in both are compared, and the rest counts as one more for the KL.
    """
    x, y = unpack(one, "logits"), unpack(other, "logits")
    both = torch.ones_like(x, dtype=torch.bool)
    if one["ids"] is not None and other["ids"] is not None:
        same = unpack(one, "ids", torch.int32)[:, :, None] == unpack(other, "ids", torch.int32)[:, None]
        both, y = same.any(-1), y.gather(1, same.byte().argmax(-1))
    log_p, log_q = x - unpack(one, "logsumexp"), y - unpack(other, "logsumexp")
    p, q = log_p.exp() * both, log_q.exp() * both
    rest_p, rest_q = ((1 - probs.sum(-1)).clamp(min=1e-9) for probs in (p, q))
    kl = (p * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()
    products = torch.stack([(a * b * both).sum(-1) for a, b in ((x, y), (x, x), (y, y))])
    top1 = unpack(one, "top1", torch.int32) == unpack(other, "top1", torch.int32)
    return {"products": products, "kl": kl, "top1": top1}


def table(before: dict[str, Any], after: dict[str, Any], alike: list[dict[str, Tensor]]) -> tuple[str, float]:
    """The numbers, one line each, and the cosine of all logits."""
    change = after["perplexity"] / before["perplexity"] - 1
    rows = [("", "before", "after", "change")]
    rows.append(("perplexity", f"{before['perplexity']:.4f}", f"{after['perplexity']:.4f}", f"{change:+.3%}"))
    for name in ("mean", "std", "min", "max"):
        x, y = before["logits"][name], after["logits"][name]
        rows.append((f"logits {name}", f"{x:.4f}", f"{y:.4f}", f"{y - x:+.4f}"))
    x, y = before["mean_density"], after["mean_density"]
    rows.append(("density", f"{x:.1%}", f"{y:.1%}", f"{y - x:+.1%}"))
    products, kl, top1 = (torch.cat([found[name] for found in alike], -1) for name in ("products", "kl", "top1"))
    xy, xx, yy = products.sum(-1)
    cosine = float(xy / (xx * yy).sqrt())
    part = "" if before["windows"][0]["ids"] is None else "  (of the highest logits; KL: a lower bound)"
    lines = [f"{name:24}{x:>12}{y:>12}{z:>12}".rstrip() for name, x, y, z in rows]
    lines += ["", f"{'logits cosine':24}{cosine:>12.6f}{part}"]
    lines.append(f"{'  lowest position':24}{float((products[0] / (products[1] * products[2]).sqrt()).min()):>12.6f}")
    lines.append(f"{'logits KL':24}{float(kl.mean()):>12.6f}  nats per token")
    lines.append(f"{'top-1 agreement':24}{float(top1.double().mean()):>12.2%}")
    return "\n".join(lines), cosine


def texts(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """How the generated texts differ: a table, and a short diff of each that does."""
    lines = [f"{'generated text':24}{'new tokens':>12}{'first diff':>12}{'similarity':>12}"]
    diffs: list[str] = []
    for number, (one, other) in enumerate(zip(before, after, strict=True), 1):
        x, y = one["tokens"], other["tokens"]
        first = next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        ratio = difflib.SequenceMatcher(None, one["text"], other["text"], autojunk=False).ratio()
        name, place = f"prompt {number} ({one['prompt_tokens']} tokens)", "none" if x == y else f"token {first}"
        lines.append(f"{name:24}{f'{len(x)}, {len(y)}':>12}{place:>12}{ratio:>12.3f}")
        if x != y:
            pair = one["text"].splitlines(), other["text"].splitlines()
            shown = list(difflib.unified_diff(*pair, "before", "after", n=1, lineterm=""))
            diffs += ["", f"prompt {number}:", *(f"    {line}" for line in shown[:DIFF_LINES])]
    return "\n".join([*lines, *diffs])


def compare(paths: tuple[str, str], threshold: float) -> int:
    """Print the comparison; returns the exit code."""
    before, after = (read(path) for path in paths)
    for key, name in SAME.items():
        if before[key] != after[key]:
            raise ValueError(f"the recordings have different {name}: {before[key]} and {after[key]}")
    try:
        if [x["prompt_end"] for x in before["generations"]] != [x["prompt_end"] for x in after["generations"]]:
            raise ValueError("the recordings have different prompts")
        alike = [similarity(one, other) for one, other in zip(before["windows"], after["windows"], strict=True)]
        numbers, cosine = table(before, after, alike)
        generated = texts(before["generations"], after["generations"])
    except (KeyError, TypeError, AttributeError, RuntimeError, binascii.Error) as error:
        raise ValueError(f"a recording is damaged: {type(error).__name__} {error}") from error
    for title, path, recording in zip(("before", "after"), paths, (before, after), strict=True):
        model, tuned = recording.get("model", recording.get("model_class")), recording.get("tuned_file")
        print(f"{title + ':':8}{path}  ({model}, {f'tuned file {tuned}' if tuned else 'unpatched'})")
    print(f"texts:  {before['num_samples']} of {before['length']} tokens\n", numbers, "", generated, "", sep="\n")
    for reason, count in after.get("fallbacks", {}).items():
        print(f"note: {count} calls ran dense: {reason}")
    close = cosine >= threshold  # False for nan
    print(f"{'PASS' if close else 'FAIL'}: logits cosine {cosine:.6f}, least allowed {threshold}")
    return int(not close)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two files; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="recording of the dense model")
    parser.add_argument("after", help="recording of the sparse model")
    parser.add_argument("--threshold", type=float, default=0.95, help="least cosine of the logits (default: 0.95)")
    args = parser.parse_args(arguments)
    return guarded("compare_results.py", lambda: compare((args.before, args.after), args.threshold))


if __name__ == "__main__":
    sys.exit(main())
