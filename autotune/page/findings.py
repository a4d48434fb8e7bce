"""What is worth knowing of a calibration, in plain words: warnings first."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .record import ERRORS, Record, achieved, bound, count, ms, number, percent

FEW_PROMPTS = 5
LITTLE = 0.1  # sparsity of a layer under which selection hardly pays
FAR_OFF = 1.5  # times the predicted error
ROOM = 0.5  # share of its nearer bound that the median head uses, under which there is room


@dataclass(frozen=True)
class Finding:
    """One sentence or two, and how much they matter."""

    level: Literal["warning", "note", "good"]
    text: str


def findings(record: Record) -> list[Finding]:
    """Everything worth knowing, warnings first; never empty."""
    warned = [Finding("warning", text) for text in _warnings(record)]
    noted = [Finding("note", text) for text in _notes(record)]
    if not warned:
        held = ": every sparse head held its bounds on prompts that its threshold was not chosen on."
        warned = [Finding("good", "No warnings" + (held if record.bounded else "; no bounds were set."))]
    return warned + noted


def _warnings(record: Record) -> Iterator[str]:
    if record.info.get("calibrated") is False:
        yield "Nothing was measured for these thresholds: they are the selector's own."
    if record.retargeted:
        yield (
            "The file's thresholds were chosen anew after the calibration: what is said of heads and errors here is of "
            "the calibration's own choice."
        )
    elif record.info.get("checked") is False:
        yield "These thresholds were chosen afterwards and were not checked with the real kernel."
    yield from _warnings_of_the_model(record)
    over = [
        f"{number(entry)}.{head['head']}"
        for entry, head in record.heads(sparse=True)
        if any(achieved(head, kind) > (bound(entry, kind) or float("inf")) for kind in ERRORS)
    ]
    if over:
        yield f"{count(len(over), 'head')} exceeded a bound in the check (layer.head): {_few(over)}."
    yield from _warnings_of_prompts(record)
    timed = [(entry, record.times_of(entry) or record.times_of(entry, "expected")) for entry in record.layers]
    slow = [number(entry) for entry, pair in timed if pair and pair[1] >= pair[0] and entry["mean_sparsity"] > 0]
    if slow:
        yield f"Sparse attention is not faster than dense in {_layers(slow)} on this machine."
    dense = [number(entry) for entry in record.layers if not any(head["is_sparse"] for head in entry["heads"])]
    if dense:
        yield f"No head is sparse in {_layers(dense)}."
    little = [
        number(entry) for entry in record.layers if number(entry) not in dense and entry["mean_sparsity"] < LITTLE
    ]
    if little:
        yield (
            f"Less than {percent(LITTLE, 0)} of the blocks are left out in {_layers(little)}: choosing blocks may cost "
            "more time there than it saves (dense_layers keeps layers dense)."
        )


def _warnings_of_the_model(record: Record) -> Iterator[str]:
    if (tradeoff := record.tradeoff) is None:
        return
    predicted, measured, target = tradeoff.predicted, tradeoff.measured, tradeoff.target
    if predicted and measured is not None and measured > FAR_OFF * predicted:
        yield (
            f"The model's {tradeoff.measure} was {measured / predicted:.1f} times the predicted one: a target of error "
            "chosen from this file will miss as much."
        )
    if target is not None and target.name == "sparsity" and record.sparsity < target.value - 0.01:
        yield f"The target {target} was not reached: {percent(record.sparsity)} of the blocks are left out."


def _warnings_of_prompts(record: Record) -> Iterator[str]:
    if skipped := sum(entry.get("calls_skipped_for_memory") or 0 for entry in record.layers):
        yield f"Memory did not suffice to look at {count(skipped, 'call')}; they are not counted."
    if (prompts := record.prompts) is None:
        return
    if prompts[1] == 0:
        yield (
            "There was a single prompt: thresholds were chosen and checked on the same calls, so the errors say little "
            "about other prompts. Use 8 or more."
        )
    elif sum(prompts) < FEW_PROMPTS:
        yield (
            f"Only {count(sum(prompts), 'prompt')}: how far errors differ from prompt to prompt is hardly known, and "
            "thresholds are cautious for it. 8 to 16 prompts usually leave out more blocks."
        )
    elif prompts[1] == 1:
        yield "One prompt was kept aside for the check, which cannot show how far errors differ from prompt to prompt."


def _notes(record: Record) -> Iterator[str]:
    reasons = Counter(head["runs_dense_because"] for _, head in record.heads(sparse=False))
    for reason, heads in reasons.most_common():
        yield f"{count(heads, 'head')} {'runs' if heads == 1 else 'run'} dense: {reason or 'no reason was recorded'}."
    if lengths := record.lengths:
        yield (
            f"The prompts had {_range(lengths)} keys. Nothing is known below {lengths[0] // 2:,} and above "
            f"{2 * lengths[1]:,}: layers warn there."
        )
    if phases := {number(entry)[-1]: entry["noise"] for entry in record.layers if "noise" in entry}:
        letters = ", ".join(f"{letter} from {high:g} to {low:g}" for letter, (high, low) in phases.items())
        yield f"Every layer has thresholds for each phase of denoising; the letters stand for noise levels: {letters}."
    if record.layers[0].get("tail") is None:
        yield "No bound was set on the error of single queries (tail): a few queries may go wrong unseen."
    if (used := _used(record)) is not None and used < ROOM:
        yield (
            f"Half of the sparse heads use less than {percent(used, 0)} of their nearer bound: the grid's candidates "
            "lie far apart there, or the confidence limits are wide; more prompts or a finer grid may leave out more."
        )
    lowest = _at_the_lowest(record)
    if lowest:
        yield (
            f"{count(lowest, 'head')} {'stands' if lowest == 1 else 'stand'} at the sparsest threshold that was tried: "
            "a grid that goes further may leave out more."
        )
    if missing := _missing(record):
        yield f"The file holds no {' and no '.join(missing)}; a calibration with this version records what it can."


def _used(record: Record) -> float | None:
    """Share of its nearer bound that the median sparse head uses."""
    shares = [
        max(achieved(head, kind) / limit for kind in ERRORS if (limit := bound(entry, kind)))
        for entry, head in record.heads(sparse=True)
        if any(bound(entry, kind) for kind in ERRORS)
    ]
    return statistics.median(shares) if shares else None


def _at_the_lowest(record: Record) -> int:
    return sum(
        head["cdfthreshd"] <= min(entry["curves"]["threshold"]) + 1e-6
        for entry, head in record.heads(sparse=True)
        if entry.get("curves")
    )


def _missing(record: Record) -> list[str]:
    parts = {
        "trade-off": record.tradeoff is not None,
        "error curves": any(entry.get("curves") for entry in record.layers),
        "block maps": any(entry.get("block_maps") for entry in record.layers),
        "times": any(record.times_of(entry) or record.times_of(entry, "expected") for entry in record.layers),
    }
    return [name for name, there in parts.items() if not there]


def _range(lengths: tuple[int, int]) -> str:
    return f"{lengths[0]:,}" if lengths[0] == lengths[1] else f"{lengths[0]:,} to {lengths[1]:,}"


def _layers(numbers: list[str]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {_few(numbers)}"


def _few(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def summary(record: Record) -> str:
    """The page in ten lines, for a terminal."""
    found, layers = findings(record), sorted(record.layers, key=lambda entry: entry["mean_sparsity"])
    total, sparse = sum(1 for _ in record.heads()), list(record.heads(sparse=True))
    reasons = Counter(head["runs_dense_because"] for _, head in record.heads(sparse=False)).most_common(1)
    warned = sum(item.level == "warning" for item in found)
    ordered = sorted(sparse, key=lambda pair: -pair[1]["sparsity"])
    rows = {
        "model": f"{record.model}, {record.size}, {count(total, 'head')}",
        "calibrated": calibrated_on(record),
        "sparsity": f"{percent(record.sparsity)} of the blocks left out; by layer "
        + " to ".join(
            f"{percent(entry['mean_sparsity'])} (layer {number(entry)})" for entry in (layers[0], layers[-1])
        ),
        "heads": f"{len(sparse)} of {total} sparse" + (f"; dense mostly because {reasons[0][0]}" if reasons else ""),
        "mean error": error_text(record, "mean"),
        "tail error": error_text(record, "tail"),
        "trade-off": tradeoff_text(record),
        "time": time_text(record),
        "extremes": "; ".join(
            f"{which} layer {number(entry)} head {head['head']}, {percent(head['sparsity'])}"
            for which, (entry, head) in zip(("sparsest", "densest sparse"), ordered[:1] + ordered[-1:], strict=False)
        )
        or "no head is sparse",
        "notes": f"{count(warned, 'warning')}{', first' * (warned > 1)}: {found[0].text}" if warned else found[0].text,
    }
    return "\n".join(f"{name:>10}  {value}" for name, value in rows.items())


def calibrated_on(record: Record) -> str:
    """Prompts, lengths and date, in one line."""
    parts = []
    if (prompts := record.prompts) is not None:
        parts.append(f"on {count(sum(prompts), 'prompt')} ({prompts[1]} kept aside for the check)")
    if (lengths := record.lengths) is not None:
        parts.append(f"{_range(lengths)} keys")
    parts += [str(record.info[name]) for name in ("date",) if record.info.get(name)]
    return ", ".join(parts) or "unknown"


def error_text(record: Record, kind: str) -> str:
    """The error nearest to its bound, in one line."""
    value, limit = record.worst(kind)
    what = {"mean": "of a head", "tail": "of a head's 99.5th percentile query"}[kind]
    return f"at most {value:.3g} {what}" + (f", bound {limit:.3g}" if limit else ", no bound")


def tradeoff_text(record: Record) -> str:
    """What was chosen for the whole model, and its error, in one line."""
    if (tradeoff := record.tradeoff) is None:
        return "not recorded"
    chosen = f"one budget, {tradeoff.target}" if tradeoff.target else "bounds for every head"
    if tradeoff.predicted is None:
        return chosen
    measured = "" if tradeoff.measured is None else f", measured {tradeoff.measured:.3g}"
    return f"{chosen}; {tradeoff.measure} of the model predicted {tradeoff.predicted:.3g}{measured}"


def time_text(record: Record) -> str:
    """Milliseconds of all layers, in one line."""
    for kind in ("measured", "expected"):
        if pair := record.times(kind):
            gain = f"{pair[0] / pair[1]:.2f}x ({kind}, a call of each layer)"
            return f"{ms(pair[0])} dense, {ms(pair[1])} sparse, {gain}"
    return "not measured"
