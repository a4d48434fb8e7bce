#!/usr/bin/env python
r"""Milliseconds of attention, selection included, against the change of perplexity: this library and other methods.

    python evaluate/studies/cost_quality.py --model_name SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16 \
        --judge_on handbook.txt torch devref.txt --out docs/benchmarks/cost_quality
    python evaluate/studies/cost_quality.py --out docs/benchmarks/cost_quality --plot     # table and picture

Every method runs at several densities: this library's by thresholds per head from curves (``frontier.py``), the others
as published and by one threshold of their own, searched on other text. Each point is judged on the same windows: the
change of perplexity, and the time of the attention of all layers of one window, on the queries, keys and values that
the model gives them, as a CUDA graph where the calls can be captured. Beside it stands the time of one call in
Llama-3.1-8B's shape at 32K tokens that keeps as many blocks, on random numbers. OUT.json is written after every point;
run again, the program goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _demos
import frontier
import long_methods
import torch
import torch.nn.functional as F
from frontier_settings import SETTINGS
from long_results import MARKERS, Results, Row, stored
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import autotune
from autotune.module import sparse_modules
from modify_model import patch, restore
from modify_model.cli import language
from modify_model.cli.arguments import sparse_backend, whole
from modify_model.cli.parallel import guarded
from spas_attn import sparse_attention
from spas_attn.call import Call
from spas_attn.select import select
from spas_attn.selectors import Selector

sys.path.insert(0, str(_demos.ROOT / "evaluate/benchmarks"))
import timing

# This library's: a setting of the frontier, and how the error is shared out over the heads.
OURS = {
    "before: pooled keys, bounds": ("means 8", "bounds"),
    "after: exact keys of means, budget": ("exact 32", "budget"),
    "after: exact keys, peaks, budget": ("exact 16, real, peak", "budget"),
    "the original's way": ("128x128, original", "uniform"),
}
OTHERS = ("XAttention", "FlexPrefill", "MInference", "FlashPrefill")
KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
LLAMA = (1, 32, 8, 32768, 128)  # batch, heads, KV heads, tokens, head dim
TINY = (1, 4, 2, 512, 64)
REP = 60  # milliseconds for which a time is repeated
COLUMNS = ("method", "setting", "density", "perplexity", "KL", "ms, all layers", "of dense", "ms, 32K call", "of dense")


class Picture:
    """The points, one after the other.

    Args:
        args: the options.
        results: where they go.
        model, tokenizer: what is judged.
    """

    def __init__(self, args: argparse.Namespace, results: Results, model: Any, tokenizer: Any) -> None:
        self.args, self.results, self.model = args, results, model
        self.study = frontier.Study(args, results, model, tokenizer)
        self.device, self.backend = model.device, sparse_backend(model.device)
        self.shape = LLAMA if self.device.type == "cuda" else TINY

    @functools.cached_property
    def llama(self) -> tuple[Tensor, Tensor, Tensor]:
        """Random queries, keys and values of the long call."""
        batch, heads, k_heads, length, dim = self.shape
        generator, dtype = torch.Generator(self.device).manual_seed(0), next(self.model.parameters()).dtype
        return tuple(
            torch.randn(batch, count, length, dim, generator=generator, device=self.device, dtype=dtype)
            for count in (heads, k_heads, k_heads)
        )  # type: ignore[return-value]

    def points(self) -> Iterator[None]:
        """Every point that is missing."""
        restore(self.model)
        patch(self.model)
        yield from self._point("dense", "–", lambda: None, None)
        for method, (name, plan) in OURS.items():
            for target in SETTINGS[name].targets or self.args.targets:
                install = functools.partial(self.study._install, name, plan, target)
                yield from self._point(method, f"{plan} {target:g}", install, SETTINGS[name].selector)
        for name in OTHERS:
            method = long_methods.METHODS[name]
            yield from self._point(
                name, "published", functools.partial(long_methods.install, self.model, method.published), method
            )
            for target in self.args.targets:
                yield from self._point(
                    name, f"{1 - target:.0%}", functools.partial(self._search, method, target), method
                )

    def _search(self, method: long_methods.Method, target: float) -> None:
        def density(x: float) -> float:
            long_methods.install(self.model, method.at(x))
            return long_methods.density_of(self.model, self.study.calibration[0])

        x, _ = long_methods.search(density, 1 - target)
        long_methods.install(self.model, method.at(x))

    def _point(self, method: str, setting: str, install: Callable[[], None], rule: Any) -> Iterator[None]:
        length = self.args.length
        if self.results.find(method, setting, length, "point") is None:
            install()
            cell: Row = {"method": method, "setting": setting, "length": length, "task": "point"}
            with autotune.record_density(self.model) as densities:
                found = {
                    source: frontier.judge(self.model, some, self.study.exact[source], self.args.batch)
                    for source, some in self.study.judged.items()
                }
            cell |= {"by_window": {name: nats for name, (nats, _) in found.items()}}
            cell |= {"kl": sum(kl for _, kl in found.values()) / len(found), "density": densities.mean}
            cell |= self._model_ms(dense=rule is None)
            if rule is None:
                dense = functools.partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
                cell["ms_llama"] = self._best(functools.partial(dense, *self.llama))
            else:
                cell["ms_llama"] = self._llama_ms(rule, cell["density"])
            self.results.add(cell)
            yield

    def _model_ms(self, dense: bool) -> Row:
        """The time of the attention of all layers over one window."""
        calls: list[Callable[[], Tensor]] = []

        def keep(layer: Any, args: Any, options: Any) -> None:
            calls.append(functools.partial(layer, *args, **options))

        hooks = [
            layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in sparse_modules(self.model).values()
        ]
        try:
            self.study.run(self.study.calibration[0])
        finally:
            for hook in hooks:
                hook.remove()
        return self._best(lambda: [call() for call in calls]) if dense else self._ms(lambda: [call() for call in calls])

    def _best(self, call: Callable[[], object]) -> Row:
        """The time of dense attention by the kernel that is fastest."""
        found = []
        for kernel in KERNELS if self.device.type == "cuda" else (None,):
            context = contextlib.nullcontext() if kernel is None else sdpa_kernel([kernel])
            with context, contextlib.suppress(RuntimeError):  # a kernel that does not serve this call
                found.append(self._ms(call))
        return min(found, key=lambda row: row["ms"])

    def _ms(self, call: Callable[[], object]) -> Row:
        """Device milliseconds of a call: as a graph, or where it cannot be captured as it is (``captured`` False)."""
        call()
        graph = timing._captured(call) if self.device.type == "cuda" else None
        if graph is not None:
            from triton.testing import do_bench

            return {"ms": do_bench(graph.replay, warmup=10, rep=REP, return_mode="median"), "captured": True}
        times = []
        for _ in range(3):
            clock = timing.Clock(self.device)
            call()
            clock.stop()
            times.append(clock.ms())
        return {"ms": sorted(times)[1], "captured": False}

    def _llama_ms(self, rule: Selector | long_methods.Method, density: float) -> Row:
        """The time of the long call with a rule where it keeps so many blocks."""
        q, k, v = self.llama
        call = Call.make(q, k, v, is_causal=True)
        at = rule.at if isinstance(rule, long_methods.Method) else long_methods._tuned(rule)

        def kept(x: float) -> float:
            return float(select(at(x), call).mask.density(True).mean())

        x, found = long_methods.search(kept, density)
        run = functools.partial(sparse_attention, q, k, v, is_causal=True, selector=at(x), backend=self.backend)
        return self._ms(run) | {"density": found}


def changes(data: Row) -> dict[tuple[str, str], float]:
    """Change of the perplexity of every point, the mean over the sources."""
    dense = next(cell["by_window"] for cell in data["cells"] if cell["method"] == "dense")

    def change(cell: Row) -> float:
        found = [
            math.expm1(sum(nats) / len(nats) - sum(dense[source]) / len(nats))
            for source, nats in cell["by_window"].items()
        ]
        return sum(found) / len(found)

    return {(cell["method"], cell["setting"]): change(cell) for cell in data["cells"]}


def table(data: Row) -> str:
    """All points, in Markdown; a time with a star is that of calls that could not be captured as a graph."""
    found, dense = changes(data), next(cell for cell in data["cells"] if cell["method"] == "dense")
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for cell in data["cells"]:
        line = [cell["method"], cell["setting"], f"{cell['density']:.1%}"]
        line += [f"{found[cell['method'], cell['setting']]:+.2%}", f"{cell['kl']:.4f}"]
        for row, whole_row in ((cell, dense), (cell["ms_llama"], dense["ms_llama"])):
            line += [f"{row['ms']:.2f}" + "*" * (not row["captured"]), f"{row['ms'] / whole_row['ms']:.0%}"]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(data: Row, path: Path) -> None:
    """Change of the perplexity against milliseconds: of the model's attention, and of the long call.

    What takes longer than 1.2 times dense attention is not in it, but in the table.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, facts = changes(data), data["facts"]
    methods: dict[str, list[Row]] = {}
    for cell in data["cells"]:
        methods.setdefault(cell["method"], []).append(cell)
    dense = methods.pop("dense")[0]
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
    titles = (f"attention of all layers, {facts['length']:,} tokens", "one call in Llama-3.1-8B's shape, 32K tokens")
    for axis, title, of in zip(axes, titles, (lambda cell: cell, lambda cell: cell["ms_llama"]), strict=True):
        for number, (method, cells) in enumerate(methods.items()):
            points = sorted((of(cell)["ms"], 100 * found[method, cell["setting"]]) for cell in cells)
            style = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "label": method}
            axis.plot(*zip(*points, strict=True), lw=2.4 if method.startswith("after") else 1.2, ms=5, **style)
        axis.axvline(of(dense)["ms"], color="grey", ls="--", lw=1)
        axis.annotate("dense", (of(dense)["ms"], 4.6), rotation=90, va="top", ha="right", color="grey")
        axis.axhline(0.3, color="grey", lw=0.6, ls=":")
        axis.set(
            title=title, xlabel="milliseconds, selection included", ylim=(-0.2, 5), xlim=(0, 1.2 * of(dense)["ms"])
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity change on other sources, percent")
    axes[0].legend(fontsize=8, loc="center right")
    figure.suptitle(f"{facts['model']}, {facts['device']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluate(args: argparse.Namespace, path: Path) -> None:
    """Compute every point that is missing."""
    facts: Row = {"model": Path(args.model_name).name, "length": args.length, "windows": args.windows}
    facts |= {name: [Path(source).name for source in getattr(args, name)] for name in ("calibrate_on", "judge_on")}
    results = Results(path, facts)
    model, tokenizer = language.load_model(args.model_name, device=args.device, dtype=args.dtype)
    results.facts |= {"device": timing.device_name(model.device), "versions": timing.versions()}
    began = time.perf_counter()
    for _ in Picture(args, results, model, tokenizer).points():
        if args.seconds and time.perf_counter() - began > args.seconds:
            print(f"stopped after {args.seconds} seconds; run again to go on")
            break


def read_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options: those of ``frontier.py`` that matter here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name", default=str(language.DEMO), help="a folder, a .gguf file, a name on the hub; default: the demo")
    add("--length", type=whole(128), default=8192, help="tokens of a window")
    add("--targets", nargs="+", type=float, default=[0.55, 0.65, 0.7, 0.74, 0.78], help="sparsities")
    add("--calibrate_on", nargs="+", default=["topics", "stdlib"], metavar="TEXT", help="see frontier.py")
    add("--judge_on", nargs="+", default=["readmes", "torch"], metavar="TEXT", help="other sources than those")
    add("--calibration_windows", type=whole(1), default=4, help="of each source")
    add("--query_blocks", type=whole(1), default=16, help="looked at per call")
    add("--windows", type=whole(1), default=8, help="of each source, to judge on")
    add("--batch", type=whole(1), default=4, help="windows in a forward pass")
    add("--seconds", type=whole(1), help="stop after the point in which so many seconds are over")
    add("--device", help="cuda, cpu, … (left out: the GPU if there is one)")
    add("--dtype", default="auto")
    add("--out", type=Path, default=Path("out/cost_quality"), help="OUT.json and OUT.png are written")
    add("--plot", action="store_true", help="only print the table and draw the picture from OUT.json")
    args = parser.parse_args(given)
    return argparse.Namespace(**vars(args), settings=list(dict.fromkeys(name for name, _ in OURS.values())), tasks=[])


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    data = stored(args, evaluate)
    print(table(data))
    picture(data, args.out.with_name(args.out.name + ".png"))
    return 0


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = read_arguments(given)
    return guarded("cost_quality.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
