#!/usr/bin/env python
r"""Which KV heads may stream: learned, chosen from calibration curves, or drawn at random, judged on a real model.

    python evaluate/studies/learned_heads.py --model_name SmolLM2-135M-Instruct.Q4_1.gguf --dtype bfloat16
    python evaluate/studies/learned_heads.py --plot --page docs/learned_masks.md     # table and picture from the .json
    python evaluate/studies/learned_heads.py --model_name models_dict/demo_llama --length 1024 --steps 20 --out out/x

Gates are learned with frozen weights, for next-token loss on text (learned, lm) and for the model's own last hidden
states on generated passkeys (learned, distill). Without training: every KV head is put on sink and window alone, and
what that costs is read off the calibration's error curves (curves), or measured on the model, one head at a time
(alone). Random heads are the floor, the dense model is the ceiling. All are judged on other sources: perplexity, and
whether keys, needles and pass keys far above are found. OUT.json is written after every cell, tables of heads lie in
the folder OUT; run again with the same arguments, the program goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _demos  # noqa: F401
import curves
import learned_heads_results as shown
import long_judge
import packed
import torch
from frontier import TEXTS
from learned_heads_results import DENSE, KV_TASKS
from long_results import Results, Row, fill_page, read
from long_tasks import Material, samples
from retrieval import TASKS, prompts
from torch import Tensor

from modify_model import patch, restore
from modify_model.cli import language
from modify_model.cli.arguments import DTYPES, check_output, sparse_backend, whole
from modify_model.cli.parallel import guarded
from modify_model.mask_arguments import MaskTrainingArguments
from modify_model.mask_trainer import MaskTrainer
from spas_attn import fallback_counts
from spas_attn.published import streaming_heads, write_head_table
from spas_attn.selectors import Streaming

LEARNED = {"learned, lm": "lm", "learned, distill": "distill"}  # objectives by name
CURVES = ("curves", "curves, tail", "curves, weighted")
NAMES = (*LEARNED, *CURVES, "alone", "random")
PASSKEYS, WORDS, SHORTEST = 10, 16, 2048  # of a context to learn from; its longest one is --length


class Study:
    """A model, its texts and prompts, and the cells that are asked for."""

    def __init__(self, args: argparse.Namespace, results: Results, model: Any, tokenizer: Any) -> None:
        self.args, self.results, self.model, self.tokenizer = args, results, model, tokenizer
        self.device = model.device
        self.layers, self.heads = model.config.num_hidden_layers, model.config.num_attention_heads
        self.kv_heads = model.config.num_key_value_heads
        self.folder = args.out.with_name(args.out.name + "_tables")

    def windows(self, source: str, count: int, seed: int) -> list[Tensor]:
        """Windows ``[1, length]`` of a source."""
        text = TEXTS[source]() if source in TEXTS else source
        found = language.token_windows(self.tokenizer, text, self.args.length, count, seed)
        return [window.to(self.device) for window in found]

    @functools.cached_property
    def judged(self) -> dict[str, list[Tensor]]:
        """Windows to judge on, by source."""
        return {Path(source).name: self.windows(source, self.args.windows, 1) for source in self.args.judge_on}

    @functools.cached_property
    def prompts(self) -> dict[str, list[Any]]:
        """Prompts to judge on, in text of the first source judged on."""
        length, count = self.args.length, self.args.samples
        source = self.args.judge_on[0]
        text = TEXTS[source]() if source in TEXTS else source
        stock = language.token_windows(self.tokenizer, text, 8 * length, 1, 2)[0][0].tolist()

        def haystack(tokens: int, seed: int) -> list[int]:
            start = random.Random(seed).randrange(len(stock) - tokens)
            return stock[start : start + tokens]

        material = Material(self.encode, [], haystack)
        make = {task: prompts for task in TASKS} | {"needle": samples}
        return {task: make[task](task, material, length, count) for task in self.args.tasks}

    def encode(self, words: str) -> list[int]:
        """Tokens of a text."""
        return self.tokenizer(words, add_special_tokens=False)["input_ids"]

    @functools.cached_property
    def calibration(self) -> list[Tensor]:
        """Windows of text, of the sources to learn from in turn, and as many passkey contexts."""
        count = self.args.calibration_windows
        found = [self.windows(source, count, 0) for source in self.args.learn_on]
        keys = self.passkeys(2 * count)
        # The longest ones.
        longest = [keys[i] for i in range(len(keys)) if len(keys[i]["input_ids"]) == self.args.length]
        return [window for some in zip(*found, strict=True) for window in some], longest

    def run(self, window: Tensor) -> None:
        """Run a window for the curves."""
        self.model(input_ids=window, use_cache=False, logits_to_keep=1)
