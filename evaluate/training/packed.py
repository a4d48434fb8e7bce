"""Rows for learning masks: texts and chats packed without padding, and generated passkeys."""

from __future__ import annotations

import itertools
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from modify_model.cli.arguments import one_line
from modify_model.cli.language import DEMO, encode, read_texts

IGNORED = -100  # the label of a token that no loss is formed for
PASSKEY_LENGTHS = 50  # context lengths between the shortest and the longest, as DuoAttention trains
GRID = 1000  # depths at which a passkey may stand, in the middle 90% of the text
WORDS = [
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima"),
    *("mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey"),
    *("xray", "yankee", "zulu"),
]
Sample = tuple[list[int], list[int]]  # ids and labels of one document
Row = dict[str, list[int]]


def read_records(source: str | None) -> Iterator[dict[str, Any]]:
    """The documents of a source, one after the other: objects with "text", "content" or "messages" (a chat).

    Args:
        source: a .jsonl file with one such object per line; a text file, or a folder of *.txt and *.py files; a folder
            that `datasets` has saved; or a dataset of the hub ("name" or "name:configuration", its split "train").
            None stands for the demo model's held-out files in the repository, elsewhere for Python's standard library.

    Raises:
        ValueError: when there is no such source, or it cannot be read.
    """
    path = Path(source or (DEMO / "heldout" if DEMO.is_dir() else sysconfig.get_path("stdlib")))
    saved = [path / name for name in ("state.json", "dataset_dict.json")]
    if path.suffix == ".jsonl":
        return _lines(path)
    if path.exists() and not any(file.exists() for file in saved):
        group = "calibration" if source is None and DEMO.is_dir() else None
        return ({"text": text} for text in read_texts(path, group))
    return _datasets(str(source), on_disk=path.exists())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the documents in {str(path)!r}: {one_line(error)}") from error


def _datasets(name: str, on_disk: bool) -> Iterator[dict[str, Any]]:
    """The rows of a dataset that the package `datasets` reads."""
    try:
        import datasets
    except ImportError as error:
        reason = "is no file or folder of texts, and reading a dataset needs a package: pip install datasets"
        raise ValueError(f"{name!r} {reason}") from error
    try:
        if on_disk:
            found = datasets.load_from_disk(name)
            yield from found["train"] if isinstance(found, dict) else found
        else:
            dataset, _, configuration = name.partition(":")
            yield from datasets.load_dataset(dataset, configuration or None, split="train", streaming=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read dataset {name!r}: {one_line(error)}") from error


def tokens_of(tokenizer: Any, record: dict[str, Any]) -> Sample:
    """Ids and labels of a document. Of a text every token is a label, of a chat only what the assistant says.

    Raises:
        ValueError: on an object of another kind, and chats that the tokenizer's template does not build up in order.
    """
    if "messages" in record:
        return _chat(tokenizer, record["messages"])
    text = record.get("text", record.get("content"))
    if not isinstance(text, str):
        raise ValueError(f'a document must have "text", "content" or "messages", it has {sorted(record)}')
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = encode(tokenizer, text)[0].tolist() + end
    return ids, list(ids)


def _chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Sample:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the data are chats, and the model's tokenizer has no chat template: use an instruct model")

    def ids_of(count: int, *, prompt: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(list(messages[:count]), add_generation_prompt=prompt, return_dict=False)

    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        whole = ids_of(index + 1)
        said = len(whole)
        if message["role"] == "assistant":
            prompt = ids_of(index, prompt=True)
            said = len(prompt) if whole[: len(prompt)] == prompt else -1
        if said < 0 or whole[: len(ids)] != ids:
            raise ValueError(f"the tokenizer's chat template changes what stands before message {index + 1} of a chat")
        labels += [IGNORED] * (said - len(ids)) + whole[said:]
        ids = whole
    return ids, labels


def pack(samples: Iterable[Sample], length: int, rows: int | None = None) -> list[Row]:
    """Rows of exactly ``length`` tokens without padding: documents one after the other, cut where a row ends.

    Positions begin at 0 with every document and every row; what would predict a token from the document before it is no
    label. What is left at the end is dropped.

    Args:
        samples: ids and labels of documents; read only as far as needed.
        length: tokens of a row.
        rows: stop when there are so many.

    Returns:
        Rows of ``input_ids``, ``labels`` and ``position_ids``, at least one.

    Raises:
        ValueError: when all documents together are shorter than a row, or no token of any row is a label.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    made: list[Row] = []
    row: Row = {"input_ids": [], "labels": [], "position_ids": []}
    for ids, labels in samples:
        start = 0
        while start < len(ids) and len(made) != rows:
            stop = min(len(ids), start + length - len(row["input_ids"]))
            row["input_ids"] += ids[start:stop]
            row["labels"] += [IGNORED, *labels[start + 1 : stop]]
            row["position_ids"] += range(stop - start)
            start = stop
            if len(row["input_ids"]) == length:
                made.append(row)
                row = {"input_ids": [], "labels": [], "position_ids": []}
        if len(made) == rows:
            break
    if not made:
        found = len(row["input_ids"])
        raise ValueError(f"all documents together have {found} tokens, fewer than one row of {length}")
    made = [row for row in made if any(label != IGNORED for label in row["labels"])]
    if not made:
        raise ValueError("no row has a label: the chats say nothing as the assistant within a row's length")
    return made


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """A batch as one row ``[1, tokens]``, with its documents' bounds in the names that transformers passes on.

    Rows one after the other keep the batch free of padding, and the attention sees packed documents only.
    """
    batch: dict[str, Any] = {
        name: torch.tensor([list(itertools.chain.from_iterable(row[name] for row in rows))]) for name in rows[0]
    }
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    if len(starts) > 1:
        bounds = torch.cat([starts, torch.tensor([batch["input_ids"].shape[1]])]).to(torch.int32)
        longest = int(bounds.diff().max())
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return batch


class Passkeys(NamedTuple):
    """How passkey contexts are made (DuoAttention, arXiv 2410.10819: 10 of 32 words).

    Attributes:
        number: passkeys in a context.
        words: of a passkey.
        shortest, longest: tokens of a context; 50 lengths from one to the other take turns.
    """

    number: int = 10
    words: int = 32
    shortest: int = 1000
    longest: int = 32000


class PasskeyData(Dataset[Row]):
    """Contexts made up on demand: any text in which passkeys stand at random depths, then a question for each of them.

    Only the answers are labels. Sample ``index`` is the same for the same arguments.

    Args:
        tokenizer: of the model.
        documents: ids of the texts.
        size: how the contexts are made.
        count: number of samples.
        seed: of all that is random.

    Raises:
        ValueError: when passkeys do not fit into the shortest context, or the texts are shorter than the longest.
    """

    def __init__(
        self, tokenizer: Any, documents: Iterable[list[int]], size: Passkeys, count: int, seed: int = 0
    ) -> None:
        self.tokenizer, self.size, self.count, self.seed = tokenizer, size, count, seed
        if size.number < 1 or size.words < 1 or not 0 < size.shortest <= size.longest:
            raise ValueError(f"passkeys: numbers must be positive and shortest <= longest, got {tuple(size)}")
        self.text: list[int] = []
        for ids in documents:
            self.text += ids
            if len(self.text) >= 100 * size.longest:
                break
        if len(self.text) < size.longest:
            raise ValueError(f"the texts have {len(self.text)} tokens, fewer than a context of {size.longest}")
        self[0]  # the shortest one

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.count:  # also what ends an iteration
            raise IndexError(f"index must be from 0 to {self.count - 1}, got {index}")
        number, words, shortest, longest = self.size
        length = shortest + round((longest - shortest) * (index % PASSKEY_LENGTHS) / (PASSKEY_LENGTHS - 1))
        rng = random.Random(f"passkeys {self.seed} {index}")
        secrets = [" ".join(rng.choices(WORDS, k=words)) for _ in range(number)]
        needles = [self._ids(f"\nPasskey {i} is: {secret}.\n") for i, secret in enumerate(secrets, 1)]
        ids, labels = [], []
        for i, secret in enumerate(secrets, 1):
            question, answer = self._ids(f"\nQuestion: what is passkey {i}? Answer:"), self._ids(f" {secret}.")
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
        begin = encode(self.tokenizer, "")[0].tolist()
        room = length - len(begin) - len(ids) - sum(map(len, needles))
        if room < number:
            raise ValueError(
                f"passkeys: {number} of {words} words take {length - room} tokens with their questions, and the context"
                f" has {length}: use longer contexts, or fewer or shorter passkeys"
            )
        start = rng.randint(0, len(self.text) - room)
        depths = sorted(rng.sample(range(GRID), number))
        cuts = [round(room * (0.05 + 0.9 * depth / GRID)) for depth in depths]
        context, done = begin, 0
        for cut, needle in zip(cuts, needles, strict=True):
            context = context + self.text[start + done : start + cut] + needle
            done = cut
        context = context + self.text[start + done : start + room]
        return {
            "input_ids": context + ids,
            "labels": [IGNORED] * len(context) + labels,
            "position_ids": list(range(length)),
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def texts_as_ids(tokenizer: Any, source: str | None) -> Iterator[list[int]]:
    """Ids of every document of a source; see :func:`read_records`."""
    return (tokens_of(tokenizer, record)[0] for record in read_records(source))
