"""What the LLaMA scripts share: loading a model, patching it for a tuned file, its tokens, windows of text, the loss
on them, and greedy generation.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from _demo_text import BYTE_OFFSET, load_texts, windows
from _loading import check_dtype, check_source, usable_device
from torch import LongTensor, Tensor, nn

from autotune import load, load_sparse_attention_state_dict
from autotune.module import clean_path, sparse_modules
from modify_model.modify_llama import set_spas_sage_attn_llama
from modify_model.patching import find_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO = Path(__file__).resolve().parents[1] / "models_dict" / "demo_llama"
_COLUMNS = ("text", "content")  # of a hub dataset
_CHARACTERS = 8  # per token at most, when deciding how much of a hub dataset to read
_ROWS = 512  # positions whose float32 log-probabilities are formed at once


def load_model(
    name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer, in eval mode.

    Args:
        name: a folder, or a name on the hub.
        device: the GPU if there is one, else the processor, by default.
        dtype: a torch dtype or its name; "auto" is the checkpoint's own, and float32 on a processor, where half
            precision is slow.

    Raises:
        ValueError: when there is no such model, or it cannot be read; the message says why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = usable_device(device)
    if isinstance(dtype, str):
        check_dtype(dtype)
    if dtype == "auto" and device.type == "cpu":
        dtype = torch.float32
    elif isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    check_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
        model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        where = "cannot load the model in folder" if Path(name).is_dir() else "no folder and no model on the hub named"
        raise ValueError(f"{where} {str(name)!r}: {reason}") from error
    if next(model.parameters()).device != device and not getattr(model, "is_quantized", False):
        model = model.to(device)
    return model.eval(), tokenizer


def check_name(name: str | Path) -> None:
    """Refuse what is known to be no model before anything is loaded; a ValueError says why."""
    check_source(str(name), "model", "config.json", owner=False)


def layer_range(text: str) -> tuple[int, int]:
    """The type of a --layer_range argument: "16,32" is layers 16 to 31."""
    try:
        start, stop = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected start,stop such as 16,32, got {text!r}") from None
    return start, stop


def patch_and_load(model: nn.Module, path: str | Path, layers: tuple[int, int] | None = None) -> nn.Module:
    """Patch the layers that a tuned file is for (or those given) and load it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, or made for another model.
    """
    state = load(path)
    set_spas_sage_attn_llama(model, layer_range=layers or tuned_layers(model, state))
    return load_sparse_attention_state_dict(model, state)


def tuned_layers(model: nn.Module, state: dict[str, Any]) -> tuple[int, int] | None:
    """The layer_range that a tuned file was made with; None when no layer of the model is in it."""
    paths = [clean_path(path) for path, _ in find_modules(model, "LlamaAttention")]
    tuned = [index for index, path in enumerate(paths) if f"{path}.inner_attention.is_sparse" in state]
    return (tuned[0], tuned[-1] + 1) if tuned else None


def record_density(model: nn.Module) -> None:
    """Begin to record densities, for :func:`take_density`."""
    for module in sparse_modules(model).values():
        module.record_density, module.last_density = True, None


def take_density(model: nn.Module) -> float | None:
    """Mean share of kept blocks in the last forward pass over patched layers and heads, 1 for a layer that ran dense;
    None when no layer ran sparse. A later call sees later passes only.
    """
    found: list[Tensor | None] = []
    for module in sparse_modules(model).values():
        found.append(module.last_density)
        module.last_density = None
    if all(density is None for density in found):
        return None
    return sum(1.0 if density is None else float(density.mean()) for density in found) / len(found)


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
    tokenizer: Any, source: str | Path | None, length: int, count: int, seed: int, group: str | None = None
) -> list[LongTensor]:
    """`count` windows of token ids ``[1, length]``, the same for the same arguments.

    Args:
        tokenizer: of the model that will read them.
        source: None for the demo model's held-out files; a text file; a folder of *.txt and *.py files; or the name
            of a hub dataset ("name" or "name:configuration", its split "train", its column "text" or "content").
        length: tokens of a window, with a beginning-of-text token where the tokenizer puts one.
        count: number of windows.
        seed: of their places.
        group: "calibration" or "unseen": two halves that share no text; None for everything.

    Raises:
        ValueError: when there is no such source, or it is too short.
    """
    if group not in (None, "calibration", "unseen"):
        raise ValueError(f"group must be 'calibration', 'unseen' or None, got {group!r}")
    if source is None:
        texts = load_texts(DEMO / "heldout", group)
    else:
        texts = load_texts(source) if Path(source).exists() else _hub_texts(str(source), length, 4 * count)
        texts = _half(texts, group)
    if type(tokenizer).__name__ == "ByT5Tokenizer":  # a token is a byte: whole lines, as the model was trained
        found = [[byte + BYTE_OFFSET for byte in window] for window in windows(texts, length, count, seed)]
    else:
        found = _windows_of_tokens(tokenizer, texts, length, count, seed)
    return [torch.tensor([ids], dtype=torch.long) for ids in found]  # type: ignore[misc]


def _half(texts: list[tuple[str, str]], group: str | None) -> list[tuple[str, str]]:
    """Every second text, or one half of a single text."""
    if group is None:
        return texts
    if len(texts) > 1:
        return texts[int(group == "unseen") :: 2]
    name, text = texts[0]
    middle = text.rfind("\n", 0, len(text) // 2) + 1 or len(text) // 2
    return [(name, text[:middle] if group == "calibration" else text[middle:])]


def _hub_texts(name: str, length: int, count: int) -> list[tuple[str, str]]:
    """`count` texts, each of about one window or longer, from the first rows of a hub dataset."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name!r} is no file or folder, and reading a hub dataset needs a package: pip install datasets"
        ) from error
    dataset, _, configuration = name.partition(":")
    try:
        rows = load_dataset(dataset, configuration or None, split="train", streaming=True)
        return _join_rows(rows, name, _CHARACTERS * length, count)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot read dataset {name!r}: {' '.join(str(error).split())[:400]}") from error


def _join_rows(rows: Iterable[dict[str, Any]], name: str, size: int, count: int) -> list[tuple[str, str]]:
    texts: list[tuple[str, str]] = []
    text = ""
    for row in rows:
        column = next((column for column in _COLUMNS if column in row), None)
        if column is None:
            raise ValueError(f"no column {' or '.join(_COLUMNS)}, only {', '.join(row)}")
        text += row[column] + "\n"
        if len(text) >= size:
            texts.append((f"{name} {len(texts)}", text))
            text = ""
        if len(texts) == count:
            return texts
    return texts if texts and not text else [*texts, (f"{name} {len(texts)}", text)]


def _windows_of_tokens(
    tokenizer: Any, texts: list[tuple[str, str]], length: int, count: int, seed: int
) -> list[list[int]]:
    """As `_demo_text.windows`, in tokens; texts are tokenised only when they are used."""
    begin = _beginning(tokenizer)
    body = length - len(begin)
    rng = random.Random(f"token windows {seed}")
    known: dict[int, list[int]] = {}

    def tokens(index: int) -> list[int]:
        if index not in known:
            known[index] = tokenizer(texts[index][1], add_special_tokens=False, verbose=False)["input_ids"]
        return known[index]

    order: list[int] = []
    found = []
    for _ in range(count):
        order = order or rng.sample(range(len(texts)), len(texts))
        index = first = order.pop()
        ids = list(tokens(index))
        while len(ids) < body:
            index = (index + 1) % len(texts)
            if index == first:
                raise ValueError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
            ids += tokens(index)
        start = rng.randint(0, len(ids) - body)
        found.append(begin + ids[start : start + body])
    return found


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
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
    )
    return out[0, ids.shape[1] :].tolist()
