#!/usr/bin/env python
"""Sweep the error bounds on the demo LLaMA: what each bound gives in sparsity and costs in quality.

Two sweeps for every selector: the mean bound alone (tail off, the way of the original SpargeAttn), and the tail bound
with l1 = 0.1 (or 0.2: not binding). Every setting is a real calibration; quality is measured on windows of files that
no calibration saw. Curves are computed once per selector and taken up again from its checkpoint. Writes a JSON after
every setting; --plot draws the picture and prints the table from it. Made for a GPU (five minutes on an H200).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _command_line import sparse_backend
from _demo_text import BYTE_OFFSET, copy_tests, load_texts
from _llama import DEMO, load_model, token_windows
from torch import Tensor, nn

import autotune
from autotune import observe
from autotune.curves import PromptTally, Tally
from autotune.module import sparse_modules
from autotune.observe import Grid, Watched
from autotune.search import mean_error, tail_error
from modify_model.modify_llama import set_spas_sage_attn_llama
from modify_model.patching import patch
from spas_attn import fallback_counts
from spas_attn.selectors import MeanSimilarity, PeakMass

MEAN_BOUNDS = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.10)
TAIL_BOUNDS = ((0.1, 0.1), (0.1, 0.2), (0.1, 0.3), (0.1, 0.45), (0.1, 0.6), (0.1, 0.8))  # (l1, tail)
FEW = ((0.2, 0.45), (0.2, 0.7), (0.2, 0.9))
NO_FILTER = Grid(sim=(-1.0,))
Setting = tuple[MeanSimilarity, Grid, tuple[float, ...], tuple[tuple[float, float], ...]]


def _mean(pool: int, block: int, **options: Any) -> MeanSimilarity:
    return MeanSimilarity(pool=pool, block_q=block, block_k=block, **options)


# The first one is the default of the LLaMA adapter.
SELECTORS: dict[str, Setting] = {
    "64x64, pool 8": (_mean(8, 64), NO_FILTER, MEAN_BOUNDS, (*TAIL_BOUNDS, *FEW)),
    "64x64, pool 16": (_mean(16, 64), NO_FILTER, MEAN_BOUNDS, TAIL_BOUNDS),
    "64x64, block means": (_mean(64, 64), NO_FILTER, MEAN_BOUNDS, TAIL_BOUNDS),
    "128x128, pool 8": (_mean(8, 128), NO_FILTER, MEAN_BOUNDS, (*TAIL_BOUNDS, *FEW)),
    "128x128, pool 16": (_mean(16, 128), NO_FILTER, MEAN_BOUNDS, TAIL_BOUNDS),
    "128x128, block means": (_mean(128, 128), NO_FILTER, MEAN_BOUNDS, TAIL_BOUNDS),
    "64x64, pool 8, no local window": (_mean(8, 64, local=0), NO_FILTER, (0.03, 0.06), FEW),
    "128x128, block means, no local window": (_mean(128, 128, local=0), NO_FILTER, (0.03, 0.06), FEW),
    "64x64, pool 8, similarity filter": (_mean(8, 64), Grid(), (), FEW),
    "64x64, peak mass": (PeakMass(), NO_FILTER, (0.06,), FEW),
    "128x128, peak mass": (PeakMass(block_q=128, block_k=128), NO_FILTER, (), FEW),
}


@torch.no_grad()
def logits_of(model: nn.Module, windows: list[Tensor]) -> list[Tensor]:
    """Log-probabilities of every window, float32 on the CPU in half precision to save memory."""
    return [F.log_softmax(model(input_ids=w, use_cache=False).logits[0].float(), -1).half() for w in windows]


@torch.no_grad()
def quality(model: nn.Module, windows: list[Tensor], dense: list[Tensor]) -> dict[str, float]:
    """Loss per token, KL from the dense model, top-1 agreement with it."""
    loss = kl = agree = count = 0.0
    for window, reference in zip(windows, dense, strict=True):
        logs = F.log_softmax(model(input_ids=window, use_cache=False).logits[0].float(), -1)
        exact = reference.float()
        loss += float(F.nll_loss(logs[:-1], window[0, 1:], reduction="sum"))
        kl += float((exact.exp() * (exact - logs)).sum())
        agree += float((exact.argmax(-1) == logs.argmax(-1)).sum())
        count += window.shape[1]
    return {"loss": loss / (count - len(windows)), "kl": kl / count, "top1": agree / count}


@torch.no_grad()
def copy_accuracy(model: nn.Module, tests: list[tuple[Tensor, int]]) -> float:
    """Share of names, defined 3,000 bytes earlier, that the greedy continuation completes."""
    right = 0
    for ids, answer in tests:
        predicted = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[0, :-1].argmax(-1)
        right += int(bool((predicted == ids[0, -answer:]).all()))
    return right / len(tests)


@torch.no_grad()
def errors_on(model: nn.Module, windows: list[Tensor]) -> dict[str, Tally]:
    """Errors of the tuned thresholds on the dense activations of some windows, by layer."""
    tallies: dict[str, Tally] = {}
    modules = sparse_modules(model)
    for number, window in enumerate(windows):
        for path, module in modules.items():
            module.mode, module.observer = "tune", functools.partial(_observe, tallies, path, number)
        model(input_ids=window, use_cache=False, logits_to_keep=1)
    for module in modules.values():
        module.mode, module.observer = "sparse", None
    return tallies


def _observe(
    tallies: dict[str, Tally], path: str, number: int, module: Any, q: Tensor, k: Tensor, v: Tensor, **flags: Any
) -> None:
    tally = PromptTally(q.shape[1], 2, q.device)
    observe.add_check(tally, module, Watched(q, k, v, precision=module.precision, **flags))
    done = tally.close(number)
    if path in tallies:
        tallies[path].merge(done)
    else:
        tallies[path] = done


def setting(
    model: nn.Module,
    name: str,
    l1: float,
    tail: float | None,
    samples: list[Tensor],
    unseen: dict[str, Any],
    keep: Path,
) -> dict[str, Any]:
    """Calibrate with one pair of bounds and measure."""
    selector, grid, _, _ = SELECTORS[name]
    backend = sparse_backend(next(model.parameters()).device)
    patch(model, l1=l1, pv_l1=l1 * 1.2, tail=tail, selector=selector, backend=backend)
    work = keep.with_suffix(".work")
    saved = keep.with_name(keep.name + ".rank0")
    if saved.exists():
        shutil.copy(saved, work.with_name(work.name + ".rank0"))
    began = time.time()
    with autotune.calibrate(model, grid=grid, checkpoint=work, resume=saved.exists()) as calibration:
        for window in calibration.prompts(samples):
            model(input_ids=window, use_cache=False, logits_to_keep=1)
            current = work.with_name(work.name + ".rank0")
            if calibration.phase == "curves" and current.exists():
                shutil.copy(current, saved)
        if current.exists():
            shutil.copy(current, saved)
    seconds = time.time() - began
    heads = [head for entry in calibration.statistics for head in entry["heads"]]
    sparse = [head for head in heads if head["is_sparse"]]
    checked = errors_on(model, unseen["windows"][:12])
    modules = sparse_modules(model)
    mean = torch.stack([mean_error(checked[path])[:, 1] for path in modules]).flatten()
    tails = torch.stack([tail_error(checked[path])[:, 1] for path in modules]).flatten()
    on = torch.cat([module.thresholds().is_sparse.cpu() for module in modules.values()])
    density = torch.stack([checked[path].density()[:, 1] for path in modules]).flatten()
    within = mean <= l1 * 1.2
    if tail is not None:
        within &= tails <= tail
    result = quality(model, unseen["windows"], unseen["logits"])
    return {
        "selector": name,
        "l1": l1,
        "tail": tail,
        "seconds": round(seconds, 1),
        "sparsity": float((1 - density * on - (~on).double()).mean()),
        "sparsity_by_layer": (1 - density * on - (~on).double()).view(len(modules), -1).mean(1).tolist(),
        "sparse_heads": len(sparse) / len(heads),
        "mean_kept_aside": max((head["l1_total"] for head in sparse), default=0.0),
        "tail_kept_aside": max((head["tail_total"] for head in sparse), default=0.0),
        "mean_unseen": float(mean[on].max()) if bool(on.any()) else 0.0,
        "tail_unseen": float(tails[on].max()) if bool(on.any()) else 0.0,
        "within_unseen": float(within[on].double().mean()) if bool(on.any()) else 1.0,
        "perplexity_change": math.exp(result["loss"] - unseen["loss"]) - 1,
        "kl": result["kl"],
        "top1": result["top1"],
        "copy": copy_accuracy(model, unseen["copy"]),
        "copy_dense": unseen["copy_dense"],
        "pv_heads": sum(head["pvthreshd"] < 50 for head in sparse),
    }


def sweep(args: argparse.Namespace) -> None:
    """Run everything, writing the JSON after every setting."""
    model, tokenizer = load_model(DEMO)
    device = next(model.parameters()).device
    samples = [
        w.to(device) for w in token_windows(tokenizer, None, args.max_length, args.samples, 0, group="calibration")
    ]
    windows = [w.to(device) for w in token_windows(tokenizer, None, args.max_length, args.unseen, 1, group="unseen")]
    dense = logits_of(model, windows)
    texts = load_texts(DEMO / "heldout", "unseen")
    tests = [
        (torch.tensor([list(t.prompt + t.answer)], device=device) + BYTE_OFFSET, len(t.answer))
        for t in copy_tests(
            texts, args.copies, distance=min(3000, args.max_length * 3 // 4), length=args.max_length, seed=5
        )
    ]
    unseen: dict[str, Any] = {"windows": windows, "logits": dense, "copy": tests}
    unseen["loss"] = quality(model, windows, dense)["loss"]
    unseen["copy_dense"] = copy_accuracy(model, tests)
    print(f"dense: {unseen['loss'] / math.log(2):.4f} bits per byte, copying {unseen['copy_dense']:.1%}", flush=True)
    set_spas_sage_attn_llama(model)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "processor",
        "torch": torch.__version__,
        "dtype": str(next(model.parameters()).dtype),
        "bits_per_byte": unseen["loss"] / math.log(2),
        "samples": args.samples,
        "unseen": args.unseen,
        "length": args.max_length,
    }
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(args.selectors.split(";") if args.selectors else SELECTORS):
            _, _, means, tails = SELECTORS[name]
            bounds = [*((l1, None) for l1 in means), *tails]
            for l1, tail in bounds:
                results.append(setting(model, name, l1, tail, samples, unseen, Path(folder) / f"curves{number}"))
                Path(args.out_path).write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
                print(_row(results[-1]), flush=True)
    print("fallbacks:", fallback_counts())


HEADER = (
    "| selector | l1 | tail | sparsity | sparse heads | mean error, kept aside / unseen | "
    "tail error, kept aside / unseen | heads within bounds, unseen | perplexity | KL | top-1 | copying |\n"
    + "|---" * 12
    + "|"
)


def _row(r: dict[str, Any]) -> str:
    cells = (
        r["selector"],
        f"{r['l1']:g}",
        "–" if r["tail"] is None else f"{r['tail']:g}",
        f"{r['sparsity']:.1%}",
        f"{r['sparse_heads']:.0%}",
        f"{r['mean_kept_aside']:.3f} / {r['mean_unseen']:.3f}",
        f"{r['tail_kept_aside']:.2f} / {r['tail_unseen']:.2f}",
        f"{r['within_unseen']:.0%}",
        f"{r['perplexity_change']:+.2%}",
        f"{r['kl']:.4f}",
        f"{r['top1']:.2%}",
        f"{r['copy']:.0%}",
    )
    return "| " + " | ".join(cells) + " |"


def plot(data: dict[str, Any], path: Path) -> None:
    """The frontiers: perplexity change against sparsity, a line per selector and kind of bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = data["results"]
    names = list(dict.fromkeys(r["selector"] for r in results))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True)
    for axis, kind in zip(axes, ("mean bound alone (tail off)", "tail bound"), strict=True):
        for number, name in enumerate(names):
            rows = [r for r in results if r["selector"] == name and (r["tail"] is None) == (kind != "tail bound")]
            rows.sort(key=lambda r: r["sparsity"])
            axis.plot(
                [100 * r["sparsity"] for r in rows],
                [100 * r["perplexity_change"] for r in rows],
                marker="os^vDP*Xhd<"[number % 11],
                markersize=5,
                color=plt.get_cmap("tab20")(2 * number % 20 + number // 10),
                linestyle="--" if name.startswith("128") else "-",
                label=name,
            )
        axis.axhline(0.3, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(kind)
        axis.set_xlabel("sparsity of the attention, % of causal blocks")
        axis.set_xlim(35, 82)
        axis.set_ylim(-0.05, 1.2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity change on unseen files, %")
    axes[1].legend(fontsize=8, loc="upper left")
    facts = data["facts"]
    figure.suptitle(
        f"Demo LLaMA, {facts['length']} tokens, {facts['samples']} samples, {facts['unseen']} unseen windows",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_path", default="docs/benchmarks/llama_sweep.json")
    parser.add_argument("--picture", default="docs/benchmarks/llama_frontier.png")
    parser.add_argument("--plot", action="store_true", help="only draw the picture and print the table from --out_path")
    parser.add_argument("--selectors", help="names separated by ';' (default: all)")
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--unseen", type=int, default=32)
    parser.add_argument("--copies", type=int, default=100)
    args = parser.parse_args()
    if not args.plot:
        sweep(args)
    data = json.loads(Path(args.out_path).read_text())
    print(HEADER, *map(_row, data["results"]), sep="\n")
    plot(data, Path(args.picture))


if __name__ == "__main__":
    main()
