#!/usr/bin/env python
"""Sweep the error bounds on the demo LLaMA: what each bound gives in sparsity and costs in quality.

    python evaluate/studies/sweep_llama.py                   # docs/benchmarks/llama_sweep.json and .png
    python evaluate/studies/sweep_llama.py --plot            # table and picture from the .json
    python evaluate/studies/sweep_llama.py --selectors "64x64, pool 8" --samples 4 --unseen 4 --copies 10

Quality is measured on windows of held-out files: perplexity, KL and top-1 agreement with the dense model, and copying a
made-up name from 3,000 bytes before. Made for a GPU (five minutes on an H200).
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import _demos  # noqa: F401
import sweep
import torch
import torch.nn.functional as F
from sweep import Row, Setting, means
from texts import BYTE_OFFSET, copy_tests
from torch import Tensor, nn

from autotune.accumulate import PromptTally, Tally, add_check
from autotune.choose import mean_error, tail_error
from autotune.module import sparse_modules
from modify_model.cli.language import DEMO, load_model, read_texts, token_windows
from spas_attn.selectors import PeakMass

MEAN_BOUNDS = tuple((l1, None) for l1 in (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.10))
TAIL_BOUNDS = tuple((0.1, tail) for tail in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8))
FEW = ((0.2, 0.45), (0.2, 0.7), (0.2, 0.9))  # the l1 does not bind
SOME = ((0.03, None), (0.06, None), *FEW)
CHECKED = 12  # unseen windows on which errors and sparsity are measured


class LlamaSweep(sweep.Sweep):
    """The demo LLaMA."""

    # The first one is the default of the LLaMA adapter.
    settings: ClassVar = {
        "64x64, pool 8": Setting(means(8, 64), (*MEAN_BOUNDS, *TAIL_BOUNDS, *FEW)),
        "64x64, pool 16": Setting(means(16, 64), (*MEAN_BOUNDS, *TAIL_BOUNDS)),
        "64x64, block means": Setting(means(64, 64), (*MEAN_BOUNDS, *TAIL_BOUNDS)),
        "128x128, pool 8": Setting(means(8, 128), (*MEAN_BOUNDS, *TAIL_BOUNDS, *FEW)),
        "128x128, pool 16": Setting(means(16, 128), (*MEAN_BOUNDS, *TAIL_BOUNDS)),
        "128x128, block means": Setting(means(128, 128), (*MEAN_BOUNDS, *TAIL_BOUNDS)),
        "64x64, pool 8, no local window": Setting(means(8, 64, local=0), SOME),
        "128x128, block means, no local window": Setting(means(128, 128, local=0), SOME),
        "64x64, pool 8, similarity filter": Setting(means(8, 64), FEW, sweep.FILTERS),
        "64x64, peak mass": Setting(PeakMass(), ((0.06, None), *FEW)),
        "128x128, peak mass": Setting(PeakMass(block_q=128, block_k=128), FEW),
    }
    out: ClassVar = "docs/benchmarks/llama_sweep"
    columns: ClassVar = {
        "selector": "", "l1": "g", "tail": "g", "sparsity": ".1%", "sparse_heads": ".0%", "mean_error": ".3f",
        "mean_unseen": ".3f", "tail_error": ".2f", "tail_unseen": ".2f", "within_unseen": ".0%",
        "perplexity_change": "+.2%", "kl": ".4f", "top1": ".2%", "copy": ".0%",
    }  # fmt: skip

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--max_length", type=int, default=4096, help="tokens of a window")
        parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
        parser.add_argument("--unseen", type=int, default=32, help="windows to judge on")
        parser.add_argument("--copies", type=int, default=150, help="names to copy")

    def variants(self) -> Iterator[Row]:
        args = self.args
        self.model, tokenizer = load_model(DEMO)
        device = self.model.device
        self.samples, self.windows = (
            [w.to(device) for w in token_windows(tokenizer, None, args.max_length, count, seed, group)]
            for count, seed, group in ((args.samples, 0, "calibration"), (args.unseen, 1, "unseen"))
        )
        distance = min(3000, args.max_length * 3 // 4)
        found = copy_tests(read_texts(DEMO / "heldout", "unseen"), args.copies, distance, args.max_length, seed=5)
        self.tests = [
            (torch.tensor([list(t.prompt + t.answer)], device=device) + BYTE_OFFSET, len(t.answer)) for t in found
        ]
        # Half precision saves memory.
        self.exact = [log_probabilities(self.model, window).half() for window in self.windows]
        self.dense = quality(self.model, self.windows, self.exact)
        copied = copy_accuracy(self.model, self.tests)
        self.facts = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "device_type": device.type,
            "torch": torch.__version__, "dtype": str(self.model.dtype), "samples": args.samples,
            "bits_per_byte": self.dense["loss"] / math.log(2), "unseen": args.unseen, "length": args.max_length,
        }  # fmt: skip
        print(f"dense: {self.facts['bits_per_byte']:.4f} bits per byte, copying {copied:.1%}", flush=True)
        yield {"copy_dense": copied}

    def items(self) -> tuple[Sequence[Any], dict[str, Any]]:
        return self.samples, {}

    def observe(self, item: Tensor) -> None:
        self.model(input_ids=item, use_cache=False, logits_to_keep=1)

    def measure(self, l1: float, tail: float | None) -> Row:
        modules = sparse_modules(self.model)
        checked = errors_on(self.model, self.windows[:CHECKED])
        mean, tails, density = (
            torch.stack([of(tally)[:, 1] for tally in checked.values()])
            for of in (mean_error, tail_error, Tally.density)
        )
        on = torch.stack([module.is_sparse.cpu() for module in modules.values()])
        within = (mean <= l1 * 1.2) & (tails <= (math.inf if tail is None else tail))
        sparsity = torch.where(on, 1 - density, 0.0)
        some = bool(on.any())
        found = quality(self.model, self.windows, self.exact)
        return {
            "sparsity": float(sparsity.mean()),
            "sparsity_by_layer": sparsity.mean(1).tolist(),
            "mean_unseen": float(mean[on].max()) if some else 0.0,
            "tail_unseen": float(tails[on].max()) if some else 0.0,
            "within_unseen": float(within[on].double().mean()) if some else 1.0,
            "perplexity_change": math.exp(found["loss"] - self.dense["loss"]) - 1,
            "kl": found["kl"],
            "top1": found["top1"],
            "copy": copy_accuracy(self.model, self.tests),
        }

    @staticmethod
    def draw(data: Row, plt: Any) -> Any:
        results, facts = data["results"], data["facts"]
        names = list(dict.fromkeys(row["selector"] for row in results))
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
        for axis, off in zip(axes, (True, False), strict=True):
            for number, name in enumerate(names):
                rows = [row for row in results if row["selector"] == name and (row["tail"] is None) == off]
                style = {"linestyle": "--" if name.startswith("128") else "-", "label": name}
                sweep.line(axis, rows, lambda row: 100 * row["perplexity_change"], number, **style)
            axis.axhline(0.3, color="grey", linewidth=0.8, linestyle="--")
            axis.set(title="mean bound alone (tail off)" if off else "tail bound", xlim=(35, 82), ylim=(-0.05, 1.2))
            axis.set_xlabel("sparsity of the attention, % of causal blocks")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("perplexity change on unseen files, %")
        axes[1].legend(fontsize=8, loc="upper left")
        text = f"Demo LLaMA, {facts['length']} tokens, {facts['samples']} samples, {facts['unseen']} unseen windows"
        figure.suptitle(text, fontsize=10)
        return figure


def log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities ``[L, vocabulary]`` of a window, float32."""
    return F.log_softmax(model(input_ids=window, use_cache=False).logits[0].float(), -1)


def quality(model: nn.Module, windows: list[Tensor], dense: list[Tensor]) -> dict[str, float]:
    """Loss per token, KL from the dense model, top-1 agreement with it."""
    loss = kl = agree = count = 0.0
    for window, reference in zip(windows, dense, strict=True):
        logs, exact = log_probabilities(model, window), reference.float()
        loss += float(F.nll_loss(logs[:-1], window[0, 1:], reduction="sum"))
        kl += float((exact.exp() * (exact - logs)).sum())
        agree += float((exact.argmax(-1) == logs.argmax(-1)).sum())
        count += window.shape[1]
    return {"loss": loss / (count - len(windows)), "kl": kl / count, "top1": agree / count}


def copy_accuracy(model: nn.Module, tests: list[tuple[Tensor, int]]) -> float:
    """Share of names, defined 3,000 bytes earlier, that the greedy continuation completes."""
    right = 0
    for ids, answer in tests:
        predicted = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[0, :-1].argmax(-1)
        right += int(bool((predicted == ids[0, -answer:]).all()))
    return right / len(tests)


def errors_on(model: nn.Module, windows: list[Tensor]) -> dict[str, Tally]:
    """Errors of the tuned thresholds on the dense activations of some windows, by layer."""
    modules = sparse_modules(model)
    tallies = {path: Tally(module.heads or 0, 2) for path, module in modules.items()}
    for number, window in enumerate(windows):
        seen = {path: PromptTally(tally.heads, 2, window.device) for path, tally in tallies.items()}
        for path, module in modules.items():
            module.mode, module.observer = "tune", functools.partial(add_check, seen[path], module)
        model(input_ids=window, use_cache=False, logits_to_keep=1)
        for path, tally in tallies.items():
            tally.merge(seen[path].close(number))
    for module in modules.values():
        module.mode, module.observer = "sparse", None
    return tallies


if __name__ == "__main__":
    sys.exit(sweep.main(LlamaSweep, __doc__))
