"""Prompts that ask for something far above, for judging heads: a JSON object of keys and values, and a pass key."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from long_tasks import Material, Sample, made_up_names

PAIRS = {"json 2": 2, "json 4": 4}  # tasks with a JSON object of so many pairs
TASKS = (*PAIRS, "passkey")
DEPTHS = (0.3, 0.5, 0.7, 0.9)  # at 0.1 SmolLM2 finds nothing: that is as far away as its whole context
DIGITS = 5  # of a value
Part = Sequence[int]


def prompts(task: str, material: Material, length: int, count: int, seed: int = 0) -> list[Sample]:
    """``count`` prompts of ``length`` tokens, answer included; what is asked for stands at DEPTHS in turn.

    Args:
        task: "json 2" and so on: one object ``{"key": "value", ...}`` in prose, whose beginning with one of the keys
            stands again at the end. "passkey": a sentence with a number, and a question for it.
        material: tokenizer and prose.
        length, count, seed: of the prompts.

    Raises:
        ValueError: on an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    found = []
    for index in range(count):
        rng = random.Random(f"{task} {length} {seed} {index}")
        make: Callable[..., tuple[Part, Part, Part, Part]] = _pass_key if task == "passkey" else _object
        before, answer, after, question = make(material.encode, PAIRS.get(task, 0), rng)
        depth = DEPTHS[index % len(DEPTHS)]
        room = length - sum(map(len, (material.begin, before, answer, after, question, answer)))
        prose = list(material.haystack(room, rng.randrange(2**31)))
        cut = round(depth * room)
        ids = [*material.begin, *prose[:cut], *before, *answer, *after, *prose[cut:], *question, *answer]
        found.append(Sample(tuple(ids), len(answer), depth))
    return found


def _object(encode: Callable[[str], Part], pairs: int, rng: random.Random) -> tuple[Part, Part, Part, Part]:
    """Tokens before the answer, the answer, those after it, and the question: each part is encoded by itself."""
    keys = made_up_names(rng, pairs)
    items = [(encode(f'"{key}": "'), encode(_number(rng)), encode('", ')) for key in keys]
    chosen = rng.randrange(pairs)
    opening = encode("\n{")
    before = [*opening, *(t for item in items[:chosen] for part in item for t in part), *items[chosen][0]]
    after = [*items[chosen][2], *(t for item in items[chosen + 1 :] for part in item for t in part), *encode("}\n")]
    return before, items[chosen][1], after, [*opening, *items[chosen][0]]


def _pass_key(encode: Callable[[str], Part], pairs: int, rng: random.Random) -> tuple[Part, Part, Part, Part]:
    number = _number(rng)
    after = encode(f". Remember it. {number} is the pass key.\n")
    return encode("\nThe pass key is "), encode(number), after, encode("\nWhat is the pass key? The pass key is ")


def _number(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=DIGITS))
