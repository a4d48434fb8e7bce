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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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


class Unusable(Exception):
    """A file cannot be read, or cannot be compared with the other one."""


@dataclass(frozen=True)
class Window:
    """What is recorded of one text of L tokens; R positions of it with logits."""

    logits: np.ndarray  # [R, N], float64; N is the vocabulary, or the number of the highest that were kept
    ids: np.ndarray | None  # [R, N], their token ids, None for the whole vocabulary
    logsumexp: np.ndarray  # [R], over the whole vocabulary
    top1: np.ndarray  # [L], the most probable token of every position


@dataclass(frozen=True)
class Similarity:
    """How far the logits of two recordings are from each other."""

    cosine: float
    lowest_cosine: float  # of one position
    kl: float  # mean over positions, nats
    top1: float  # share of positions
    whole: bool  # whether all of the vocabulary was compared


def read(path: str) -> dict[str, Any]:
    """A recording; Unusable with the reason when it is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Unusable(f"cannot read {path!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise Unusable(f"{path!r} is no JSON: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise Unusable(f"{path!r} was not written by tests/test_llama_output_accuracy.py")
    if content["format"] != FORMAT:
        raise Unusable(f"{path!r} has format {content['format']!r}, this version reads format {FORMAT}")
    missing = sorted({*SAME, "windows", "generations", "perplexity", "mean_density", "logits"} - content.keys())
    if missing:
        raise Unusable(f"{path!r} lacks {', '.join(missing)}")
    return content


def window(entry: dict[str, Any]) -> Window:
    """Unpack the logits of one text."""

    def unpack(name: str, kind: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(entry[name], validate=True), dtype=kind)

    rows = entry["rows"]
    ids = None if entry["ids"] is None else unpack("ids", "<i4").reshape(rows, -1)
    logits: np.ndarray = unpack("logits", "<f4").astype(np.float64).reshape(rows, -1)
    logsumexp = unpack("logsumexp", "<f4").astype(np.float64).reshape(rows)
    return Window(logits, ids, logsumexp, unpack("top1", "<i4"))


def windows(recording: dict[str, Any], path: str) -> list[Window]:
    """All texts of a recording; Unusable when its numbers are damaged."""
    try:
        return [window(entry) for entry in recording["windows"]]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise Unusable(f"{path!r} is damaged: {error}") from error


def common(before: Window, after: Window, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one position on the tokens that both recordings hold, in one order."""
    if before.ids is None or after.ids is None:
        return before.logits[row], after.logits[row]
    _, first, second = np.intersect1d(before.ids[row], after.ids[row], return_indices=True)
    return before.logits[row][first], after.logits[row][second]


def position_kl(before: np.ndarray, after: np.ndarray, normalisers: tuple[float, float] | None) -> float:
    """KL divergence in nats of one position. With logsumexps as `normalisers` the logits are not of the whole
    vocabulary, and the rest counts as one more token.
    """
    if normalisers is None:
        normalisers = float(np.logaddexp.reduce(before)), float(np.logaddexp.reduce(after))
        return float(np.exp(before - normalisers[0]) @ (before - normalisers[0] - after + normalisers[1]))
    log_p, log_q = before - normalisers[0], after - normalisers[1]
    rest_p, rest_q = (max(1.0 - float(np.exp(x).sum()), 1e-9) for x in (log_p, log_q))
    return float(np.exp(log_p) @ (log_p - log_q)) + rest_p * float(np.log(rest_p / rest_q))


def similarity(before: list[Window], after: list[Window]) -> Similarity:
    """Compare all recorded positions."""
    products = np.zeros(3)
    cosines, kls = [], []
    same, positions = 0, 0
    whole = all(each.ids is None for each in (*before, *after))
    for one, other in zip(before, after, strict=True):
        if len(one.logits) != len(other.logits) or len(one.top1) != len(other.top1):
            raise Unusable("the recordings hold different positions")
        for row in range(len(one.logits)):
            x, y = common(one, other, row)
            if len(x) != len(y) or not len(x):
                raise Unusable("the recordings hold the logits of different tokens")
            sums = np.array([x @ y, x @ x, y @ y])
            products += sums
            cosines.append(sums[0] / np.sqrt(sums[1] * sums[2]))
            kls.append(position_kl(x, y, None if whole else (float(one.logsumexp[row]), float(other.logsumexp[row]))))
        same += int((one.top1 == other.top1).sum())
        positions += len(one.top1)
    cosine = float(products[0] / np.sqrt(products[1] * products[2]))
    return Similarity(cosine, float(np.min(cosines)), float(np.mean(kls)), same / positions, whole)


def table(before: dict[str, Any], after: dict[str, Any], alike: Similarity) -> str:
    """The numbers, one line each."""
    change = after["perplexity"] / before["perplexity"] - 1
    rows = [("", "before", "after", "change")]
    rows.append(("perplexity", f"{before['perplexity']:.4f}", f"{after['perplexity']:.4f}", f"{change:+.3%}"))
    for name in ("mean", "std", "min", "max"):
        x, y = before["logits"][name], after["logits"][name]
        rows.append((f"logits {name}", f"{x:.4f}", f"{y:.4f}", f"{y - x:+.4f}"))
    densities = before["mean_density"], after["mean_density"]
    rows.append(("density", f"{densities[0]:.1%}", f"{densities[1]:.1%}", f"{densities[1] - densities[0]:+.1%}"))
    lines = [f"{name:24}{x:>12}{y:>12}{z:>12}".rstrip() for name, x, y, z in rows]
    part = "" if alike.whole else "  (of the highest logits; KL: a lower bound)"
    lines += [
        "",
        f"{'logits cosine':24}{alike.cosine:>12.6f}{part}",
        f"{'  lowest position':24}{alike.lowest_cosine:>12.6f}",
        f"{'logits KL':24}{alike.kl:>12.6f}  nats per token",
        f"{'top-1 agreement':24}{alike.top1:>12.2%}",
    ]
    last = [entry["top5_last"] for recording in (before, after) for entry in recording["windows"]]
    half = len(last) // 2
    shared = sum(len({*x} & {*y}) for x, y in zip(last[:half], last[half:], strict=True))
    lines.append(f"{'top-5 of last positions':24}{shared / max(1, sum(map(len, last[:half]))):>12.2%}  in common")
    return "\n".join(lines)


def texts(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """How the generated texts differ: a table, and a short diff of each that does."""
    lines = [f"{'generated text':24}{'new tokens':>12}{'first diff':>12}{'similarity':>12}"]
    diffs: list[str] = []
    for number, (one, other) in enumerate(zip(before, after, strict=True), 1):
        x, y = one["tokens"], other["tokens"]
        first = next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))
        ratio = difflib.SequenceMatcher(None, one["text"], other["text"], autojunk=False).ratio()
        place = "none" if x == y else f"token {first}"
        name = f"prompt {number} ({one['prompt_tokens']} tokens)"
        lines.append(f"{name:24}{f'{len(x)}, {len(y)}':>12}{place:>12}{ratio:>12.3f}")
        if x != y:
            diff = difflib.unified_diff(
                one["text"].splitlines(), other["text"].splitlines(), "before", "after", n=1, lineterm=""
            )
            shown = list(diff)
            diffs += ["", f"prompt {number}:", *(f"    {line}" for line in shown[:DIFF_LINES])]
            if len(shown) > DIFF_LINES:
                diffs.append(f"    … {len(shown) - DIFF_LINES} more lines")
    return "\n".join([*lines, *diffs])


def compare(paths: tuple[str, str], threshold: float) -> int:
    """Print the comparison; returns the exit code."""
    before, after = (read(path) for path in paths)
    for key, name in SAME.items():
        if before[key] != after[key]:
            raise Unusable(f"the recordings have different {name}: {before[key]} and {after[key]}")
    prompts = [[entry.get("prompt_end") for entry in recording["generations"]] for recording in (before, after)]
    if prompts[0] != prompts[1]:
        raise Unusable("the recordings have different prompts")
    alike = similarity(windows(before, paths[0]), windows(after, paths[1]))
    for title, path, recording in zip(("before", "after"), paths, (before, after), strict=True):
        model, tuned = recording.get("model", recording.get("model_class")), recording.get("tuned_file")
        print(f"{title + ':':8}{path}  ({model}, {f'tuned file {tuned}' if tuned else 'unpatched'})")
    print(f"texts:  {before['num_samples']} of {before['length']} tokens\n")
    print(table(before, after, alike))
    print()
    print(texts(before["generations"], after["generations"]))
    print()
    for reason, count in after.get("fallbacks", {}).items():
        print(f"note: {count} calls ran dense: {reason}")
    close = alike.cosine >= threshold  # False for nan
    print(f"{'PASS' if close else 'FAIL'}: logits cosine {alike.cosine:.6f}, least allowed {threshold}")
    return int(not close)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="recording of the dense model")
    parser.add_argument("after", help="recording of the sparse model")
    parser.add_argument("--threshold", type=float, default=0.95, help="least cosine of the logits (default: 0.95)")
    args = parser.parse_args(argv)
    try:
        return compare((args.before, args.after), args.threshold)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError, AttributeError) as error:
        print(f"error: a recording is damaged: {type(error).__name__} {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
