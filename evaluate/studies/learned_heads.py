#!/usr/bin/env python
r"""Which KV heads may stream: learned, chosen from calibration curves, or drawn at random, judged on a real model.

    python evaluate/studies/learned_heads.py --model_name SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16
    python evaluate/studies/learned_heads.py --plot --page docs/learned_masks.md     # table and picture from the .json
    python evaluate/studies/learned_heads.py --length 1024 --steps 20 --windows 1 --samples 5 --out out/learned_masks

Gates are learned with frozen weights, from the distance of the last hidden states to the dense model's on text and
generated passkeys (learned, distill), on passkeys alone (learned, passkeys), or from the next-token loss on text
(learned, lm). Without training, heads are chosen by what the calibration's error curves say of sink and window: by the
mean error, by its tail, or by the squared error weighted with the layer's sensitivity and the head's share, as a budget
has it (curves; curves, tail; curves, weighted); or each head streams alone and the same distance as in the distillation
is measured (alone). Random heads are the floor, the dense model is the ceiling. All are judged on other sources:
perplexity, and what is found far above. OUT.json is written after every cell; run again, the program goes on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _demos  # noqa: F401
import frontier
import learned_heads_results as results_of
import long_judge
import packed
import torch
from frontier_settings import Setting
from learned_heads_results import BLOCK, DENSE
from long_results import Results, Row, fill_page, stored
from long_tasks import Material, samples
from retrieval import DEPTHS, TASKS, prompts
from torch import Tensor
from tqdm import tqdm

from autotune.learn import distillation_loss
from modify_model import patch, restore, stream_heads
from modify_model.cli import language
from modify_model.cli.arguments import DTYPES, sparse_backend, whole
from modify_model.cli.parallel import guarded
from modify_model.mask_arguments import MaskTrainingArguments
from modify_model.mask_trainer import MaskTrainer
from spas_attn import fallback_counts
from spas_attn.selectors import Dense, Streaming

# Objective and data of a training.
LEARNED = {
    "learned, distill": ("distill", "both"),
    "learned, lm": ("lm", "text"),
    "learned, passkeys": ("distill", "passkeys"),
}
CURVES = ("curves", "curves, tail", "curves, weighted")
WORDS = 8  # of a passkey to learn from; a context has one for every 800 tokens, 10 at most
STREAMING = "streaming"  # name of the curve


class Study(frontier.Study):
    """A model, its texts and prompts, and the cells that are asked for."""

    def __init__(self, args: argparse.Namespace, results: Results, model: Any, tokenizer: Any) -> None:
        super().__init__(args, results, model, tokenizer)
        self.layers, self.kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        self.group = model.config.num_attention_heads // self.kv_heads
        self.chosen = {STREAMING: Setting(Streaming(args.sink_size, args.window), (0.5,))}  # levels are +-inf

    def passkeys(self, count: int, seed: int, shortest: int) -> list[packed.Row]:
        """Contexts of ``shortest`` to ``length`` tokens with passkeys, in the texts to calibrate on."""
        length = self.args.length
        texts = [window[0].tolist() for source in self.args.calibrate_on for window in self.windows(source, 8, seed)]
        size = packed.Passkeys(min(10, max(1, length // 800)), WORDS, shortest, length)
        made = packed.PasskeyData(self.tokenizer, texts, size, count, seed)
        return [made[index] for index in range(count)]

    @functools.cached_property
    def contexts(self) -> list[tuple[Tensor, Tensor]]:
        """Passkey contexts ``[1, length]`` to choose heads on, and which of their tokens predict an answer."""
        rows = self.passkeys(self.args.calibration_windows, 1, self.args.length)
        found = []
        for row in rows:
            ids, labels = (torch.tensor([row[name]], device=self.device) for name in ("input_ids", "labels"))
            found.append((ids, torch.nn.functional.pad(labels[:, 1:] != packed.IGNORED, (0, 1))))
        return found

    @functools.cached_property
    def calibration(self) -> list[Tensor]:
        """Windows of text, and passkey contexts between them."""
        some = self.args.calibration_windows
        texts = [self.windows(source, some, 0) for source in self.args.calibrate_on]
        return [window for row in zip(*texts, (ids for ids, _ in self.contexts), strict=True) for window in row]

    @functools.cached_property
    def prompts(self) -> dict[str, list[Any]]:
        """Prompts of the retrieval tasks, in text of the first source judged on."""
        length, source = self.args.length, self._text(self.args.judge_on[0])
        stock = language.token_windows(self.tokenizer, source, 8 * length, 1, 2)[0][0].tolist()

        def haystack(tokens: int, seed: int) -> list[int]:
            start = random.Random(seed).randrange(len(stock) - tokens)
            return stock[start : start + tokens]

        def encode(words: str) -> list[int]:
            return self.tokenizer(words, add_special_tokens=False)["input_ids"]

        material = Material(encode, [], haystack)
        count, found = self.args.samples, {}
        for task in self.args.tasks:
            if task in TASKS:
                found[task] = prompts(task, material, length, count)
            else:
                needles = samples(task, material, length, 2 * count)
                found[task] = [needle for needle in needles if needle.depth in DEPTHS][:count]
        return found

    def cells(self) -> Iterator[None]:
        """Every cell, one after the other."""
        restore(self.model)
        patch(self.model)
        yield from self._judge(DENSE, "–", [*self.judged, *self.args.tasks], lambda: None)
        seeds = [f"random {seed}" for seed in range(self.args.seeds)]
        names = [one for name in self.args.names for one in (seeds if name == "random" else [name])]
        for sink, window in self.args.served:
            for name in names:
                for sparsity in self.args.sparsities:
                    install = functools.partial(self.stream, name, sparsity, sink, window)
                    setting = f"{sparsity:g} {sink}+{window}"
                    yield from self._judge(name, setting, [*self.judged, *self.args.tasks], install)

    def _judge(self, name: str, choice: str, tasks: Sequence[str], install: Callable[[], None]) -> Iterator[None]:
        length = self.args.length
        missing = [task for task in tasks if self.results.find(name, choice, length, task) is None]
        if missing:
            install()
        for task in missing:
            if task in self.judged:
                nats = [language.negative_log_likelihood(self.model, [window]) for window in self.judged[task]]
                found: Row = {"by_window": nats}
            else:
                found = long_judge.answers(self.model, self.prompts[task], self.args.batch)
            self.results.add({"method": name, "setting": choice, "length": length, "task": task, **found})
        yield

    def stream(self, name: str, sparsity: float, sink: int, window: int) -> None:
        """Let the heads of the lowest scores stream, a share of ``sparsity`` of the model's KV heads."""
        scores = self.scores(name)
        ranks = scores.flatten().argsort().argsort().view_as(scores) / (scores.numel() - 1)
        self._patch()
        stream_heads(self.model, ranks, sparsity=sparsity, sink_tokens=sink, local_tokens=window)
        place = f"held {sparsity:g} {sink}+{window}"
        if place not in self.results.settings:
            self.results.settings[place] = {"share": results_of.held(self.model, next(iter(self.judged.values()))[0])}

    def _patch(self) -> None:
        restore(self.model)
        blocks = {"block_q": BLOCK, "block_k": BLOCK}  # as in training
        patch(self.model, selector=Dense(**blocks), backend=sparse_backend(self.device))

    def scores(self, name: str) -> Tensor:
        """How much every KV head needs to see everything, ``[layers, KV heads]``; kept with the results."""
        known = self.results.settings
        if name not in known:
            began = time.perf_counter()
            if name in LEARNED:
                scores, facts = self.learn(*LEARNED[name])
            elif name in CURVES:
                scores, facts = self.from_curves(name), {}
            elif name == "alone":
                scores, facts = self.alone(), {}
            else:
                generator = torch.Generator().manual_seed(int(name.split()[1]))
                scores, facts = torch.rand(self.layers, self.kv_heads, generator=generator), {}
            seconds = time.perf_counter() - began
            known[name] = {"scores": scores.tolist(), "seconds": round(seconds, 1), **facts}
            self.results.write()
            tqdm.write(f"{name}: {seconds:.0f} s {facts.get('separation', '')}")
        return torch.tensor(known[name]["scores"])

    def learn(self, objective: str, data: str) -> tuple[Tensor, Row]:
        """log α after a training of the gates alone; and what is to be known of it."""
        args = self.args
        rows = self.rows(data, args.steps * args.rows)
        options = MaskTrainingArguments(
            output_dir=str(args.out.with_name(args.out.name + "_run")), objective=objective, max_steps=args.steps,
            per_device_train_batch_size=args.rows, mask_learning_rate=args.mask_learning_rate,
            reg_learning_rate=args.reg_learning_rate, end_head_sparsity=max(args.sparsities), sink_size=args.sink_size,
            window=args.window, report_to="none", save_strategy="no", use_cpu=self.device.type == "cpu",
            logging_steps=0.1,
        )  # fmt: skip
        self._patch()
        trainer = MaskTrainer(self.model, options, train_dataset=rows, data_collator=packed.collate)
        with torch.enable_grad():
            trainer.train()
        learning = trainer.learning
        scores = torch.stack([gates.values.detach().float().cpu() for gates in learning.gates])
        facts: Row = {"log": trainer.state.log_history, "gates": learning.table().tolist(), "objective": objective}
        facts |= {name: getattr(args, name) for name in ("steps", "rows", "mask_learning_rate", "reg_learning_rate")}
        for sparsity in args.sparsities:
            separation = learning.separation(sparsity)
            facts.setdefault("separation", {})[f"{sparsity:g}"] = vars(separation)
        trainer.finish()
        self.model.eval()
        return scores, facts

    def rows(self, data: str, count: int) -> list[packed.Row]:
        """Rows to train on: windows of the texts to calibrate on ("text"), passkey contexts ("passkeys"), or "both"."""
        sources = self.args.calibrate_on
        texts = [self.windows(source, -(-count // len(sources)), 2) for source in sources]
        ids = [window[0].tolist() for row in zip(*texts, strict=True) for window in row]
        found = [{"input_ids": x, "labels": x, "position_ids": list(range(len(x)))} for x in ids]
        keys = self.passkeys(count, 2, self.args.length // 4)
        if data == "both":
            return [row for pair in zip(found[:count], keys, strict=True) for row in pair][:count]
        return keys if data == "passkeys" else found[:count]

    def from_curves(self, name: str) -> Tensor:
        """Errors of heads that stream, as the calibration measures them; of a KV head those of its query heads."""
        curve = self.curves[STREAMING]
        squares = (curve.tail if name.endswith("tail") else curve.error)[..., 0].square().cpu()
        if name.endswith("weighted"):
            squares = squares * curve.share.square().cpu()
            squares = squares / squares.sum(-1, keepdim=True) * self.distances(range(self.layers))[:, None]
        return squares.view(self.layers, self.kv_heads, self.group).mean(-1).float()

    def alone(self) -> Tensor:
        """What it costs that one KV head streams alone, ``[layers, KV heads]``."""
        places = itertools.product(range(self.layers), range(self.kv_heads))
        return self.distances(places).view(self.layers, self.kv_heads)

    def distances(self, places: Iterable[Any]) -> Tensor:
        """Distance of the last hidden states from the dense model's where answers are predicted, as a training with
        the objective "distill" has it, when the KV heads at one of the places (layer, head) stream.
        """
        self._patch()
        decoder = self.model.get_decoder()
        exact = [decoder(input_ids=ids, use_cache=False).last_hidden_state for ids, _ in self.contexts]
        found = []
        for place in places:
            table = torch.ones(self.layers, self.kv_heads)
            table[place] = 0
            stream_heads(self.model, table, sink_tokens=self.args.sink_size, local_tokens=self.args.window)
            hidden = [decoder(input_ids=ids, use_cache=False).last_hidden_state for ids, _ in self.contexts]
            pairs = zip(hidden, exact, self.contexts, strict=True)
            found.append(sum(float(distillation_loss(x, y, answers)) for x, y, (_, answers) in pairs))
        return torch.tensor(found, dtype=torch.float64)


def evaluate(args: argparse.Namespace, path: Path) -> None:
    """Compute every cell that is missing."""
    names = ("length", "windows", "calibration_windows", "samples", "calibrate_on", "judge_on", "sink_size", "window")
    facts: Row = {"model": Path(args.model_name).name} | {name: getattr(args, name) for name in names}
    facts |= {name: [Path(source).name for source in facts[name]] for name in ("calibrate_on", "judge_on")}
    results = Results(path, facts)
    model, tokenizer = language.load_model(args.model_name, device=args.device, dtype=args.dtype)
    gpu = model.device.type == "cuda"
    results.facts |= {"device": torch.cuda.get_device_name() if gpu else "CPU", "dtype": str(model.dtype)}
    results.facts |= {"torch": torch.__version__}
    study, began = Study(args, results, model, tokenizer), time.perf_counter()
    for _ in tqdm(study.cells(), unit="setting"):
        if args.seconds and time.perf_counter() - began > args.seconds:
            print(f"stopped after {args.seconds} seconds; run again to go on")
            break
    for reason, calls in fallback_counts().items():
        print(f"{calls} calls fell back to dense attention: {reason}")


def sizes(text: str) -> tuple[int, int]:
    """The type of a --served argument: sink+window, such as 128+256."""
    try:
        sink, window = map(int, text.split("+"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sink+window such as 128+256, got {text!r}") from None
    return sink, window


def read_arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [*LEARNED, *CURVES, "alone", "random"]
    known = ", ".join(frontier.TEXTS)
    add("--model_name", default=str(language.DEMO), help="a folder, a .gguf file, a name on the hub; default: the demo")
    add("--length", type=whole(128), default=8192, help="tokens of windows and prompts")
    add("--names", nargs="+", choices=names, metavar="NAME", default=names, help="; ".join(names))
    add("--sparsities", nargs="+", type=float, default=[0.5, 0.7], help="shares of the KV heads that stream")
    add("--served", nargs="+", type=sizes, default=[(128, 256), (128, 1024)], metavar="SINK+WINDOW", help="to judge at")
    add("--sink_size", type=whole(0), default=128, help="of the streaming heads while heads are learned or chosen")
    add("--window", type=whole(1), default=256, help="the same")
    add("--steps", type=whole(1), default=400, help="of a training")
    add("--rows", type=whole(1), default=1, help="windows or contexts in a step")
    add("--mask_learning_rate", type=float, default=0.1, help="highest learning rate of the gates")
    add("--reg_learning_rate", type=float, default=0.02, help="highest learning rate of the multipliers")
    add("--calibrate_on", nargs="+", default=["topics", "stdlib"], metavar="TEXT", help=f"{known}, or a file or folder")
    add("--judge_on", nargs="+", default=["readmes", "torch"], metavar="TEXT", help="other sources than those")
    add("--calibration_windows", type=whole(1), default=4, help="of each source")
    add("--query_blocks", type=whole(1), default=64, help="looked at per call")
    add("--windows", type=whole(1), default=8, help="of each source, to judge on")
    add("--tasks", nargs="*", choices=[*TASKS, "needle"], default=[*TASKS, "needle"], help="retrieval tasks")
    add("--samples", type=whole(1), default=60, help="prompts of a retrieval task")
    add("--seeds", type=whole(1), default=3, help="of random heads")
    add("--batch", type=whole(1), default=8, help="prompts in a forward pass")
    add("--seconds", type=whole(1), help="stop after the setting in which so many seconds are over")
    add("--device", help="cuda, cpu, … (left out: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="auto")
    add("--out", type=Path, default=Path("docs/benchmarks/learned_masks"), help="OUT.json and OUT.png are written")
    add("--plot", action="store_true", help="only print the tables and draw the picture from OUT.json")
    add("--page", type=Path, metavar="FILE", help="put the tables into this page, between its marks")
    args = parser.parse_args(given)
    args.settings = ()  # of the frontier's study, which this one is made from
    return args


def run(args: argparse.Namespace) -> int:
    """Everything after the arguments."""
    data = stored(args, evaluate)
    print(results_of.tables(data))
    if args.page:
        fill_page(args.page, results_of.tables(data, served=1))
    results_of.picture(data, args.out.with_name(args.out.name + ".png"))
    return 0


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = read_arguments(given)
    return guarded("learned_heads.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
