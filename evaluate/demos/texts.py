"""Texts for the demo LLaMA: windows of bytes, and names made up for tests of copying from afar."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from typing import NamedTuple

from modify_model.cli.language import windows

BYTE_OFFSET = 3  # ByT5's ids: 0 padding, 1 end of file, 2 unknown, then the 256 bytes
EOS = 1
GIVEN = 3  # bytes of a planted name that a copy test shows

_CONSONANTS = [*"bdfgklmnprstvz", "br", "dr", "gl", "kr", "pl", "st", "tr"]
_ENDINGS = ["", "", "", "l", "n", "r", "s", "x"]
_DEFINITIONS = {
    "def": ["def NAME(x):\n    return x + NUM\n\n", "def NAME(x, y=NUM):\n    return x * y\n\n"],
    "constant": ["NAME = NUM\n", "NAME = 'NUM'\n", "NAME = [NUM, NUM]\n"],
}
_USES = {
    "def": ["    result = NAME(NUM)\n", "    return NAME(value)\n", "    if NAME(NUM) > NUM:\n        return None\n"],
    "constant": ["    result = NAME\n", "    total = NAME + NUM\n", "    return NAME\n", "    print(NAME)\n"],
}


class CopyTest(NamedTuple):
    """A prompt that ends in the first three bytes of a name defined far above, and the rest of that name."""

    prompt: bytes
    answer: bytes


def byte_windows(texts: list[str], length: int, count: int, seed: int) -> list[bytes]:
    """`count` random windows of `length` bytes, each from the start of a line; see `windows`."""
    return windows(lambda index: texts[index].encode(), len(texts), length, count, seed)


def made_up_name(rng: random.Random) -> str:
    """A name of 8 to 16 characters made of syllables, such as `drovalkin` or `TASU_BRIMEX`."""
    size = rng.randint(8, 16)
    name = ""
    while len(name) < size:
        name += rng.choice(_CONSONANTS) + rng.choice("aeiou") + rng.choice(_ENDINGS)
        if 4 <= len(name) <= size - 4 and "_" not in name and rng.random() < 0.3:
            name += "_"
    name = name[:size]
    return name.upper() if rng.random() < 0.25 else name


def copy_tests(texts: list[str], count: int, distance: int = 3000, length: int = 4096, seed: int = 0) -> list[CopyTest]:
    """Generated tests: a made-up function or constant must be completed from its one definition far above.

    Between the definition and the use lie real code and three decoys. No other word of the prompt begins with the
    three bytes given. The two names begin `distance` bytes apart, give or take 50, and prompt and answer together
    have `length` bytes.
    """
    if not 200 <= distance <= length - 100:
        raise ValueError(f"distance must be between 200 and length - 100, not {distance} with length {length}")
    rng = random.Random(f"copy tests {seed}")
    tests: list[CopyTest] = []
    for filler in byte_windows(texts, length + 600, 4 * count, rng.randrange(2**32)):
        test = _copy_test(filler, distance, length, rng)
        if test is not None:
            tests.append(test)
        if len(tests) == count:
            return tests
    raise ValueError(f"texts: lines too long for {count} copy tests")


def _copy_test(filler: bytes, distance: int, length: int, rng: random.Random) -> CopyTest | None:
    """One test made from `filler`, or None where its lines do not allow it."""
    names = [made_up_name(rng) for _ in range(4)]
    name, *decoys = names
    kinds = [rng.choice(sorted(_DEFINITIONS)) for _ in names]
    definitions = [_fill(rng.choice(_DEFINITIONS[kind]), each, rng) for kind, each in zip(kinds, names, strict=True)]
    use = _fill(rng.choice(_USES[kinds[0]]), name, rng)
    starts = _line_starts(filler)
    end = starts[-1]
    begin = end - distance + sum(map(len, definitions))
    positions = sorted(rng.uniform(0.1, 0.9) for _ in decoys)
    for _ in range(3):  # indentation and line lengths shift the distance: correct it twice
        chosen = [begin, *(begin + share * (end - begin) for share in positions)]
        snapped = [min(starts[:-1], key=lambda start, at=at: abs(start - at)) for at in chosen]
        data = _insert(filler[:end], [*zip(snapped, definitions, strict=True), (end, use)])
        first, last = data.find(name.encode()), data.rfind(name.encode())
        error = last - first - distance
        if abs(error) <= 50:
            break
        begin += error
    prompt = data[last + len(name) - length : last + GIVEN]
    answer = data[last + GIVEN : last + len(name)]
    fitting = re.findall(rb"\b" + re.escape(name[:GIVEN].encode()) + rb"\w*", prompt)
    if abs(error) > 50 or len(prompt) + len(answer) != length or fitting != [name.encode(), name[:GIVEN].encode()]:
        return None
    return CopyTest(prompt, answer)


def plant_names(window: bytes, length: int, rng: random.Random) -> bytes:
    """Training data for copying: real code with made-up names, cut to its first `length` bytes.

    3 to 8 names are defined, each used once or twice 100 to 3,900 bytes below its definition.
    """
    starts = _line_starts(window)
    inserts = []
    for _ in range(rng.randint(3, 8)):
        name, kind, apart = made_up_name(rng), rng.choice(sorted(_DEFINITIONS)), rng.uniform(100, 3900)
        begin = rng.choice(starts[: max(1, bisect_left(starts, starts[-1] - apart))])
        inserts.append((begin, _fill(rng.choice(_DEFINITIONS[kind]), name, rng)))
        for _ in range(rng.randint(1, 2)):
            use = starts[min(bisect_left(starts, begin + apart), len(starts) - 1)]
            if use > begin:
                inserts.append((use, _fill(rng.choice(_USES[kind]), name, rng)))
            apart = rng.uniform(100, apart)
    return _insert(window, inserts)[:length]


def _fill(template: str, name: str, rng: random.Random) -> str:
    return re.sub("NUM", lambda _: str(rng.randint(2, 999)), template).replace("NAME", name)


def _line_starts(data: bytes) -> list[int]:
    return [0, *(found.end() for found in re.finditer(b"\n", data))]


def _insert(data: bytes, inserts: list[tuple[int, str]]) -> bytes:
    """Put lines at line starts of `data`, definitions (not indented) as deep as the line that follows."""
    parts, done = [], 0
    for position, lines in sorted(inserts, key=lambda pair: pair[0]):
        parts.append(data[done:position])
        done = position
        following = data[position : position + 40]
        depth = 0 if lines.startswith(" ") else len(following) - len(following.lstrip(b" "))
        parts.append("".join(" " * depth * bool(line.strip()) + line for line in lines.splitlines(True)).encode())
    return b"".join([*parts, data[done:]])
