"""Prompts of the demo Wan: their grammar, and the embeddings that take the place of a text encoder."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PALETTE = {
    "red": (0.88, 0.15, 0.15),
    "green": (0.15, 0.70, 0.25),
    "blue": (0.15, 0.30, 0.90),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.70, 0.20, 0.80),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
MOVES = ("moves left", "moves right", "moves up", "moves down", "bounces")
NEGATIVE = ""  # the empty prompt of classifier-free guidance; training drops prompts to it

# Thresholds may be tuned on the first group; comparisons use the second.
PROMPTS = {
    "calibration": (
        "a red circle moves left and a blue square bounces",
        "a yellow triangle moves up",
        "a green square moves right and a purple circle moves down",
        "a blue triangle bounces and a yellow circle moves left",
    ),
    "unseen": (
        "a green circle bounces",
        "a purple triangle moves right",
        "a blue circle moves down",
        "a red square moves left",
        "a yellow square bounces and a red triangle moves right",
        "a purple circle moves up and a green triangle moves left",
        "a blue square moves right and a red square moves left",
        "a red triangle moves down and a yellow circle bounces",
        "a green square moves up and a blue circle moves up",
        "a yellow circle moves right and a purple square moves down",
    ),
}

TEXT_DIM = 64
_PER_OBJECT = 5  # tokens: a, colour, shape, verb, direction
TOKENS = 2 * _PER_OBJECT + 1
_DIRECTIONS = ("left", "right", "up", "down")
WORDS = ("", "a", "and", *COLOURS, *SHAPES, "moves", "bounces", *_DIRECTIONS)  # "" pads, as zeros


class Thing(NamedTuple):
    """One object of a prompt, in the prompt's words."""

    colour: str
    shape: str
    move: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} {self.move}"


def parse(prompt: str) -> list[Thing]:
    """The one or two objects of a prompt, none for an empty one.

    Raises:
        ValueError: the prompt is not `a <colour> <shape> <move> [and a <colour> <shape> <move>]`.
    """
    things = []
    for part in prompt.split(" and ") if prompt else []:
        words = part.split(" ", 3)
        if len(words) != 4 or words[0] != "a" or not _known(Thing(*words[1:])):
            raise ValueError(
                f"prompt: {part!r} of {prompt!r} is not 'a <colour> <shape> <move>' with a colour of {COLOURS}, "
                f"a shape of {SHAPES} and a move of {MOVES}"
            )
        things.append(Thing(*words[1:]))
    if len(things) > 2:
        raise ValueError(f"prompt: at most two objects, {prompt!r} has {len(things)}")
    if len(things) == 2 and things[0].colour == things[1].colour:
        raise ValueError(f"prompt: two objects need two colours, {prompt!r} has one")
    return things


def _known(thing: Thing) -> bool:
    return thing.colour in COLOURS and thing.shape in SHAPES and thing.move in MOVES


def random_prompts(count: int, objects: int, seed: int) -> list[str]:
    """`count` different prompts with one or two `objects`."""
    things = [Thing(*words) for words in itertools.product(COLOURS, SHAPES, MOVES)]
    pairs = [pair for pair in itertools.permutations(things, 2) if pair[0].colour != pair[1].colour]
    every = [(thing,) for thing in things] if objects == 1 else pairs
    return [" and ".join(map(str, some)) for some in random.Random(seed).sample(every, count)]


def encode(prompts: Sequence[str]) -> Tensor:
    """Prompts as indices `[n, 2, 3]` into COLOURS, SHAPES and MOVES; -1 where there is no object."""
    found = torch.full((len(prompts), 2, 3), -1, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        for place, thing in enumerate(parse(prompt)):
            indices = COLOURS.index(thing.colour), SHAPES.index(thing.shape), MOVES.index(thing.move)
            found[row, place] = torch.tensor(indices)
    return found


def embed(things: Tensor) -> Tensor:
    """Fixed embeddings `[n, TOKENS, TEXT_DIM]` of encoded prompts `[n, 2, 3]`, on their device.

    A token is the sum of a word's vector and a vector of that word as said of the first or of the second object, all
    of them rows of a Hadamard matrix and so orthogonal. Cross-attention has no positions of its own: without the
    second vector "red circle, blue square" and "blue circle, red square" would be the same set.
    """
    verb, bounces = WORDS.index("moves"), things[..., 2] == MOVES.index("bounces")
    words = torch.stack(
        [
            torch.full_like(things[..., 0], WORDS.index("a")),
            things[..., 0] + WORDS.index(COLOURS[0]),
            things[..., 1] + WORDS.index(SHAPES[0]),
            torch.where(bounces, WORDS.index("bounces"), verb),
            torch.where(bounces, 0, things[..., 2] + WORDS.index(_DIRECTIONS[0])),
        ],
        dim=-1,
    )
    there = things[..., :1] >= 0
    words = torch.where(there, words, 0)
    joint = torch.where(there[:, 1], WORDS.index("and"), 0)
    ids = torch.cat([words[:, 0], joint, words[:, 1]], dim=1)
    place = torch.tensor([1] * _PER_OBJECT + [0] + [2] * _PER_OBJECT, device=things.device)
    rows = _hadamard(things.device)
    vectors = (rows[ids] + rows[ids + place * (len(WORDS) - 1)]) / 2**0.5
    return torch.where(ids[..., None] > 0, vectors, 0.0)


def _hadamard(device: torch.device) -> Tensor:
    index = torch.arange(TEXT_DIM, device=device)
    common = index[:, None] & index
    bits = torch.arange(TEXT_DIM.bit_length(), device=device)
    ones = ((common[..., None] >> bits) & 1).sum(-1)
    return (1 - 2 * (ones % 2)).float()


def prompt_embeds(prompt: str) -> Tensor:
    """The embedding `[TOKENS, TEXT_DIM]` of one prompt, float32; zeros for the empty prompt."""
    return embed(encode([prompt]))[0]


def random_things(count: int, generator: torch.Generator, two: float = 0.65) -> Tensor:
    """Encoded random prompts `[count, 2, 3]`, a share of `two` of them with two objects of different colours."""
    device = generator.device

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    colour = integers(len(COLOURS), count, 1)
    other = (colour + 1 + integers(len(COLOURS) - 1, count, 1)) % len(COLOURS)
    things = torch.stack(
        [torch.cat([colour, other], 1), integers(len(SHAPES), count, 2), integers(len(MOVES), count, 2)], dim=-1
    )
    alone = torch.rand(count, generator=generator, device=device) >= two
    things[:, 1] = torch.where(alone[:, None], -1, things[:, 1])
    return things
