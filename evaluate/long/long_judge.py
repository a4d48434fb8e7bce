"""What a model makes of long prompts: answers found, and held-out perplexity by position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from long_tasks import Sample
from torch import Tensor, nn

import autotune

Row = dict[str, Any]
BINS = 8  # parts of a window whose loss is told apart
PREDICTED = 8192  # positions of a window that are judged at most, evenly spread
_ROWS = 512  # positions whose float32 log-probabilities are formed at once


@torch.inference_mode()
def answers(model: nn.Module, samples: Sequence[Sample], batch: int) -> Row:
    """How well a model answers.

    The answer is given to the model token by token (teacher forcing): it is found when each of its tokens is the most
    likely one. That is what greedy decoding gives, from one forward pass.

    Args:
        model: the model; what a forward pass keeps is recorded as ``density``.
        samples: all of the same length.
        batch: prompts in one forward pass.

    Returns:
        ``exact``, the share of answers found, ``tokens``, the share of their tokens, ``nats`` per token, ``density``,
        and ``exact`` by depth.
    """
    device = next(model.parameters()).device
    found: list[tuple[float, bool, float, float]] = []  # depth, exact, share of tokens, nats
    with autotune.record_density(model) as densities:
        for some in _batches(samples, batch):
            ids = torch.tensor([sample.ids for sample in some], device=device)
            longest = max(sample.answer for sample in some)
            logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=longest).logits
            for sample, row, target in zip(some, logits.float(), ids, strict=True):
                row, target = row[-sample.answer :], target[-sample.answer :]
                hits = row.argmax(-1) == target
                nats = float(F.cross_entropy(row, target))
                found.append((sample.depth, bool(hits.all()), float(hits.float().mean()), nats))
    _, exact, tokens, nats = zip(*found, strict=True)
    depths = sorted({round(depth, 1) for depth, *_ in found})
    by_depth = {f"{d:g}": _mean([hit for depth, hit, *_ in found if round(depth, 1) == d]) for d in depths}
    return {
        "exact": _mean(exact), "tokens": _mean(tokens), "nats": _mean(nats), "density": densities.mean,
        "by_depth": by_depth, "samples": len(found),
    }  # fmt: skip


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Sequence[Tensor], batch: int) -> Row:
    """Loss on windows of ids ``[1, L]``, all of one length.

    Returns:
        ``nats`` per predicted token, ``perplexity``, ``by_position``: the nats of BINS equal parts of the windows,
        and ``density``.
    """
    device = next(model.parameters()).device
    length = windows[0].shape[1]
    index = torch.linspace(0, length - 2, min(PREDICTED, length - 1)).round().long().to(device)
    losses = []
    with autotune.record_density(model) as densities:
        for some in _batches(windows, batch):
            ids = torch.cat(list(some)).to(device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=index).logits
            for row, target in zip(logits, ids[:, 1:][:, index], strict=True):
                parts = zip(row.split(_ROWS), target.split(_ROWS), strict=True)
                losses.append(torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in parts]))
    loss = torch.stack(losses).double().mean(0)
    nats = float(loss.mean())
    return {
        "nats": nats, "perplexity": math.exp(nats), "by_position": [float(part.mean()) for part in loss.chunk(BINS)],
        "density": densities.mean, "samples": len(windows),
    }  # fmt: skip


def _batches(items: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
