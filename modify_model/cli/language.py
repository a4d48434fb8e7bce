"""Language models for the command: loading, windows of text, loss, and greedy generation."""

from __future__ import annotations

import argparse
import functools
import math
import random
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from spas_attn.metrics import cosine_similarity

from ..load_llama import read
from . import tiny
from .arguments import as_dtype, one_line, unreadable, usable_device
from .compare import Comparison
from .names import LANGUAGE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO = Path(__file__).resolve().parents[2] / "models_dict" / "demo_llama"  # in the repository only
PROMPT = 'import json\n\n\ndef read_config(path):\n    """Read a JSON file and return it as a dict."""\n'
_BYTE_OFFSET = 3  # of a ByT5 tokenizer: padding, end of text, unknown, then the 256 bytes
_CHARACTERS = 8  # per token at most, when deciding how much of a hub dataset to read
_ROWS = 512  # positions whose float32 log-probabilities are formed at once


class LanguageModel:
    """A language model and its tokenizer, as the command runs it (see ``driver.py``)."""

    kind = LANGUAGE
    needs = ("transformers",)
    hint = "see --max_length"
    every, is_shown = 1, False

    def __init__(self, args: argparse.Namespace, device: str | None = None) -> None:
        self.args = args
        self.model, self.tokenizer = load_model(args.model_name, device=device or args.device, dtype=args.dtype)
        self.runner = self
        longest = getattr(self.model.config, "max_position_embeddings", None) or args.max_length
        self.length = min(args.max_length, longest)

    def __str__(self) -> str:
        return f"{self.length} tokens each"

    @staticmethod
    def usual(args: argparse.Namespace) -> dict[str, int]:
        """The values of options that are left out."""
        length, new = (1024, 48) if args.verify else (4096, 128)
        return {"num_tune_samples": 8, "num_compare": 4, "max_length": length, "max_new_tokens": new}

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """Reject, before a model is loaded, what is known to be wrong; a ValueError says why."""
        if "" in (args.prompt, args.prompts):
            raise ValueError(f"{'--prompt' if args.prompt == '' else '--prompts'} must not be empty")
        if args.prompts is not None and (Path(args.prompts).exists() or args.prompts.startswith((".", "/", "~"))):
            read_texts(args.prompts)

    def items(self) -> list[LongTensor]:
        """What a calibration runs."""
        return self._windows(self.args.num_tune_samples, self.args.seed, "calibration")

    def unseen(self) -> list[tuple[str, int, LongTensor]]:
        """What a comparison runs: names, seeds and items."""
        found = self._windows(self.args.num_compare, self.args.seed + 1, "unseen")
        return [(f"text {number}", self.args.seed + 1, window) for number, window in enumerate(found, 1)]

    def _windows(self, count: int, seed: int, group: str) -> list[LongTensor]:
        return token_windows(self.tokenizer, self.args.prompts, self.length, count, seed, group)

    def observe(self, window: Tensor) -> None:
        """Run an item for a calibration."""
        self.model(input_ids=window.to(self.model.device), use_cache=False, logits_to_keep=1)

    def output(self, window: Tensor) -> Tensor:
        """The logits of an item ``[1, L, vocabulary]``."""
        ids = window.to(self.model.device)
        # The mask shows a compiled model that nothing is packed.
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits

    warm_up = output

    def figures(self, window: Tensor, exact: Tensor, sparse: Tensor) -> dict[str, float]:
        """What a comparison shows of an item's logits."""
        losses = [float(F.cross_entropy(x[0, :-1].float(), window[0, 1:].to(x.device))) for x in (exact, sparse)]
        same = float((exact.argmax(-1) == sparse.argmax(-1)).float().mean())
        cosine = float(cosine_similarity(sparse, exact))
        return {"cosine": cosine, "top-1": same, "dense nats": losses[0], "sparse nats": losses[1]}

    def report(self, comparisons: Sequence[Comparison]) -> None:
        """Print what sums up a comparison."""
        nats = [[c.figures[name] for c in comparisons] for name in ("dense nats", "sparse nats")]
        before, after = (math.exp(sum(losses) / len(losses)) for losses in nats)
        print(f"\nperplexity: dense {before:.4f}, sparse {after:.4f} ({after / before - 1:+.2%})")

    def calls(self) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of a call of the model, for the verification."""
        window = self._windows(1, 0, "unseen")[0].to(self.model.device)
        return {"": ((), {"input_ids": window, "use_cache": False})}

    def sample(self) -> tuple[Tensor, str]:
        """A whole generation: the new tokens, and as people read it."""
        ids = self.calls()[""][1]["input_ids"]
        if self.args.prompt is not None:
            ids = encode(self.tokenizer, self.args.prompt, ids.device)
        new = greedy(self.model, self.tokenizer, ids, self.args.max_new_tokens)
        return torch.tensor(new), f"{len(new)} tokens: {self.tokenizer.decode(new)!r}"

    def generate(self) -> None:
        """Continue the prompt and print it."""
        prompt = self.args.prompt or PROMPT
        text, count, seconds = generate(self.model, self.tokenizer, prompt, self.args.max_new_tokens)
        print(f"--- prompt\n{prompt}\n--- {count} new tokens in {seconds:.1f} s\n{text}")


def load_model(name: str | Path, *, device: Any = None, dtype: Any = "auto") -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer, in eval mode.

    Args:
        name: a folder, a .gguf file, a name on the hub, or ``tiny:Llama``.
        device: a device or its name; the GPU if there is one, else the CPU, by default.
        dtype: a torch dtype or its name; "auto" is the checkpoint's own (bfloat16 of a .gguf file), float32 on a CPU.

    Raises:
        ValueError: when there is no such model, or it cannot be read; the message says why.
    """
    device = usable_device(device)
    kind = as_dtype(dtype, device, usual="auto")
    path = Path(name)
    if str(name) == tiny.PREFIX + tiny.LLAMA:
        return tiny.llama().to(device, None if kind == "auto" else kind), tiny.tokenizer()
    try:
        model, tokenizer = read(name, dtype=kind)
    except unreadable() as error:
        where = "cannot load the model in" if path.exists() else "no folder and no model on the hub named"
        raise ValueError(f"{where} {str(name)!r}: {one_line(error)}") from error
    return (model if getattr(model, "is_quantized", False) else model.to(device)).eval(), tokenizer


def encode(tokenizer: Any, text: str, device: str | torch.device = "cpu") -> LongTensor:
    """Token ids ``[1, L]`` of a text as a prompt: no end-of-text token, which the demo's tokenizer would add; a
    beginning-of-text token where the tokenizer puts one, which real LLaMA models need.
    """
    ids = _beginning(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids], dtype=torch.long, device=device)  # type: ignore[return-value]


def _beginning(tokenizer: Any) -> list[int]:
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def token_windows(
    tokenizer: Any,
    source: str | Path | Sequence[str] | None,
    length: int,
    count: int,
    seed: int,
    group: str | None = None,
) -> list[LongTensor]:
    """`count` windows of token ids ``[1, length]``, the same for the same arguments.

    Args:
        tokenizer: of the model that will read them.
        source: a text file; a folder of *.txt and *.py files; or the name of a hub dataset ("name" or
            "name:configuration", its split "train", its column "text" or "content"); or a list of texts. None stands
            for the demo model's held-out files in the repository, elsewhere for Python's standard library.
        length: tokens of a window, with a beginning-of-text token where the tokenizer puts one.
        count, seed: number of windows, and the seed of their places.
        group: "calibration" or "unseen": two halves that share no text; None for everything.

    Raises:
        ValueError: when there is no such source, or it is too short.
    """
    if group not in (None, "calibration", "unseen"):
        raise ValueError(f"group must be 'calibration', 'unseen' or None, got {group!r}")
    if source is None:
        source = DEMO / "heldout" if DEMO.is_dir() else sysconfig.get_path("stdlib")
    if not isinstance(source, (str, Path)):
        texts = _half(list(source), group)
    elif Path(source).exists():
        texts = read_texts(source, group)
    else:
        texts = _half(_hub_texts(str(source), length, 4 * count), group)
    begin = _beginning(tokenizer)
    if type(tokenizer).__name__ == "ByT5Tokenizer":  # a token is a byte: whole lines, as the demo model was trained
        data = windows(lambda index: texts[index].encode(), len(texts), length, count, seed)
        found = [[byte + _BYTE_OFFSET for byte in window] for window in data]
    else:
        ids = functools.partial(tokenizer, add_special_tokens=False, verbose=False)
        found = windows(lambda i: ids(texts[i])["input_ids"], len(texts), length - len(begin), count, seed)
        found = [begin + window for window in found]
    return [torch.tensor([window], dtype=torch.long) for window in found]  # type: ignore[misc]


def windows(text: Callable[[int], Any], texts: int, length: int, count: int, seed: int) -> list[Any]:
    """`count` random windows of `length` bytes or tokens, the same for the same arguments.

    ``text`` gives the text of a number below ``texts``: bytes (windows then begin at a line) or a list of tokens. One
    shorter than a window is followed by the next ones. Every text is used once before any is used again. A ValueError
    says when all together are shorter than a window.
    """
    if length < 1 or count < 1:
        raise ValueError(f"length and count must be positive, got {length} and {count}")
    text = functools.cache(text)
    rng = random.Random(f"windows {seed}")
    order: list[int] = []
    found = []
    for _ in range(count):
        order = order or rng.sample(range(texts), texts)
        index = first = order.pop()
        data = text(index)
        while len(data) < length:
            index = (index + 1) % texts
            if index == first:
                raise ValueError(f"all texts together have {len(data)} tokens, fewer than one window of {length}")
            data = data + text(index)
        start = rng.randint(0, len(data) - length)
        if isinstance(data, bytes):
            start = data.rfind(b"\n", 0, start) + 1
        found.append(data[start : start + length])
    return found


def read_texts(source: str | Path, group: str | None = None) -> list[str]:
    """Read a text file, or every *.txt and *.py file of a folder in the order of their names.

    ``group`` is one half of them: of a folder that has a list ``<folder>_files.txt`` beside it (lines "<group> <name>")
    those that it names, in its order; else every second text, or half of a single one. A ValueError says what is wrong.
    """
    source = Path(source)
    listing = source.with_name(source.name + "_files.txt")
    try:
        if group is not None and listing.is_file():
            lines = (line.split() for line in listing.read_text("utf-8").splitlines() if not line.startswith("#"))
            return [(source / f"{line[1]}.txt").read_text("utf-8") for line in lines if line and line[0] == group]
        files = sorted(source.iterdir()) if source.is_dir() else []
        paths = [path for path in files if path.suffix in (".txt", ".py") and path.is_file()] or [source]
        return _half([path.read_text("utf-8") for path in paths], group)
    except IsADirectoryError as error:
        raise ValueError(f"no *.txt or *.py file in folder {str(source)!r}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the texts in {str(source)!r}: {one_line(error)}") from error


def _half(texts: list[str], group: str | None) -> list[str]:
    """Every second text, or one half of a single text."""
    if group is None:
        return texts
    if len(texts) > 1:
        return texts[int(group == "unseen") :: 2]
    middle = texts[0].rfind("\n", 0, len(texts[0]) // 2) + 1 or len(texts[0]) // 2
    return [texts[0][:middle] if group == "calibration" else texts[0][middle:]]


def _hub_texts(name: str, length: int, count: int) -> list[str]:
    """`count` texts, each of about one window or longer, from the first rows of a hub dataset."""
    try:
        from datasets import load_dataset

        dataset, _, configuration = name.partition(":")
        texts = [""]
        for row in load_dataset(dataset, configuration or None, split="train", streaming=True):
            texts[-1] += str(row["text"] if "text" in row else row["content"]) + "\n"
            if len(texts[-1]) >= _CHARACTERS * length:
                if len(texts) == count:
                    break
                texts.append("")
    except ImportError as error:
        reason = "is no file or folder, and reading a hub dataset needs a package: pip install datasets"
        raise ValueError(f"{name!r} {reason}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read dataset {name!r}: {one_line(error)}") from error
    return [text for text in texts if text]


@torch.inference_mode()
def negative_log_likelihood(model: nn.Module, windows: Iterable[torch.Tensor]) -> float:
    """Mean loss in nats per predicted token of windows ``[1, length]``; perplexity is its exponential."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for window in windows:
        ids = window.to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        for rows, targets in zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True):
            total += float(F.cross_entropy(rows.float(), targets.to(rows.device), reduction="sum"))
        tokens += ids.shape[1] - 1
    if not tokens:
        raise ValueError("windows: nothing to predict")
    return total / tokens


@torch.inference_mode()
def greedy(model: PreTrainedModel, tokenizer: Any, ids: Tensor, max_new_tokens: int) -> list[int]:
    """The new tokens of greedy generation after a prompt ``[1, L]``; ends early where the model ends its text."""
    pad = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    options = dict(do_sample=False, temperature=None, top_p=None, top_k=None, pad_token_id=pad)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
    return out[0, ids.shape[1] :].tolist()


def generate(model: PreTrainedModel, tokenizer: Any, prompt: str, max_new_tokens: int) -> tuple[str, int, float]:
    """Continue a prompt greedily; returns the new text, the number of new tokens and the seconds."""
    ids = encode(tokenizer, prompt, next(model.parameters()).device)
    started = time.perf_counter()
    new = greedy(model, tokenizer, ids, max_new_tokens)
    return tokenizer.decode(new, skip_special_tokens=True), len(new), time.perf_counter() - started
