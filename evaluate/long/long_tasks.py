"""Tasks over long prompts, made from a tokenizer and any text: every answer stands somewhere in its own prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from texts import made_up_name

RETRIEVAL = ("needle", "multikey", "kv", "copy")
SIZED = ("multikey", "kv")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where the answer stands in the prompt, as a share of it
Parts = tuple[Sequence[int], Sequence[int], Sequence[int]]  # before the answer, the answer, after it
PASSAGE, SHOWN, ASKED = 12, 4, 6  # words of a copied passage; how many of them a prompt shows, and asks for


@dataclass(frozen=True)
class Sample:
    """One prompt with the only right answer.

    Attributes:
        ids: tokens of the prompt and, at its end, of the answer; ``length`` of them.
        answer: number of tokens of the answer.
        depth: where in the prompt the answer stands, 0 to 1.
    """

    ids: tuple[int, ...]
    answer: int
    depth: float


@dataclass(frozen=True)
class Material:
    """What tasks are made of.

    Attributes:
        encode: the tokens of a piece of text, without special ones.
        begin: tokens that every prompt begins with, a beginning-of-text token or none.
        haystack: gives prose of a number of tokens, another one for every seed.
    """

    encode: Callable[[str], Sequence[int]]
    begin: Sequence[int]
    haystack: Callable[[int, int], Sequence[int]]


def samples(task: str, material: Material, length: int, count: int, seed: int = 0, size: int = 0) -> list[Sample]:
    """``count`` prompts of exactly ``length`` tokens, answer included, with the answer at DEPTHS in turn.

    Args:
        task: "needle": one sentence with a number in prose. "multikey": ``size`` such sentences that differ in their
            key. "kv": ``size`` lines of a key and a value, one of which is asked for. "copy": a passage of made-up
            words that begins anew at the end.
        material: tokenizer and prose.
        length: tokens.
        count, seed: number of samples, and the seed of everything random.
        size: needles of "multikey" and pairs of "kv"; 0 for the other tasks.

    Raises:
        ValueError: on an unknown task, or when the length cannot hold what the task needs.
    """
    if task not in RETRIEVAL:
        raise ValueError(f"task must be one of {', '.join(RETRIEVAL)}, got {task!r}")
    if (size > 1) != (task in SIZED):
        raise ValueError(
            f"size must be above 1 for {' and '.join(SIZED)} and 0 for other tasks, got {size} for {task!r}"
        )
    make = {"needle": _needles, "multikey": _needles, "kv": _pairs, "copy": _copy}[task]
    found = []
    for index in range(count):
        rng = random.Random(f"{task} {length} {seed} {index}")
        depth = DEPTHS[index % len(DEPTHS)]
        found.append(make(material, length, depth, rng, max(1, size)))
    return found


def _needles(material: Material, length: int, depth: float, rng: random.Random, count: int) -> Sample:
    """Sentences ``The secret number of <key> is <number>.`` in prose; the end asks for the number of one of them."""
    keys = made_up_names(rng, count)
    sentences = [_sentence(material, f"\nThe secret number of {key} is", _number(rng), ".\n") for key in keys]
    depths = [depth, *(rng.uniform(0.02, 0.98) for _ in keys[1:])]
    question = material.encode(f"\nThe secret number of {keys[0]} is")
    return _assemble(material, length, list(zip(depths, sentences, strict=True)), question, rng)


def _pairs(material: Material, length: int, depth: float, rng: random.Random, count: int) -> Sample:
    """Lines ``<key>: <number>``, prose before them where they do not fill the prompt; the end asks for one of them.

    As in the key-value retrieval of InfiniteBench, with names for keys: every line looks like every other.
    """
    question_of = "\n{}:".format
    room = length - len(material.begin) - 64
    lines: list[Parts] = []
    names, used = made_up_names(rng, count), 0
    for name in names:
        line = _sentence(material, question_of(name), _number(rng), "")
        used += sum(map(len, line))
        if used > room:
            raise ValueError(f"length {length} holds {len(lines)} pairs, fewer than the {count} asked for")
        lines.append(line)
    chosen = min(int(depth * len(lines)), len(lines) - 1)
    question, answer, _ = lines[chosen]
    block = [token for line in lines for part in line for token in part]
    before = length - len(material.begin) - len(block) - len(question) - len(answer)
    prose = list(material.haystack(before, rng.randrange(2**31))) if before else []
    ids = [*material.begin, *prose, *block, *question, *answer]
    place = (before + sum(len(part) for line in lines[:chosen] for part in line)) / length
    return Sample(tuple(ids), len(answer), place)


def _copy(material: Material, length: int, depth: float, rng: random.Random, count: int) -> Sample:
    """A passage of made-up words in prose; the end shows its first words and asks for those that follow."""
    words = [list(material.encode(f" {name}")) for name in made_up_names(rng, PASSAGE)]
    opening = list(material.encode("\nThe list of words:"))
    flat = [opening, *words]
    question = [token for part in flat[: 1 + SHOWN] for token in part]
    answer = [token for part in flat[1 + SHOWN : 1 + SHOWN + ASKED] for token in part]
    rest = [token for part in flat[1 + SHOWN + ASKED :] for token in part]
    ends = list(material.encode(".\n"))
    return _assemble(material, length, [(depth, (question, answer, rest + ends))], question, rng)


def _assemble(
    material: Material,
    length: int,
    needles: Sequence[tuple[float, Parts]],
    question: Sequence[int],
    rng: random.Random,
) -> Sample:
    """Prose with needles (depth, tokens) put in, then the question and the first needle's answer."""
    depth, (_, answer, _) = needles[0]
    sizes = sum(len(part) for _, needle in needles for part in needle)
    room = length - len(material.begin) - sizes - len(question) - len(answer)
    if room < 16:
        raise ValueError(f"length {length} is too short for this task: {room} tokens are left for the text around it")
    prose = list(material.haystack(room, rng.randrange(2**31)))
    ids, done = list(material.begin), 0
    for share, needle in sorted(needles, key=lambda pair: pair[0]):
        place = int(share * room)
        ids += [*prose[done:place], *(token for part in needle for token in part)]
        done = place
    ids += [*prose[done:], *question, *answer]
    return Sample(tuple(ids), len(answer), depth)


def _sentence(material: Material, before: str, answer: str, after: str) -> Parts:
    """Tokens of the three parts, each by itself: question and answer are the same tokens wherever they stand."""
    return material.encode(before), material.encode(answer), material.encode(after)


def made_up_names(rng: random.Random, count: int) -> list[str]:
    """Different made-up names, no two with the same first five letters."""
    names: dict[str, str] = {}
    while len(names) < count:
        name = made_up_name(rng).replace("_", "").lower()
        names.setdefault(name[:5], name)
    return list(names.values())


def _number(rng: random.Random) -> str:
    return f" {rng.randrange(10**6, 10**7)}"
