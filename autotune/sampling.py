"""What a calibration looks at: which query blocks of a call, which steps of a prompt, which calls without a loop."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spas_attn.block_mask import cdiv
from spas_attn.call import Call
from spas_attn.selectors import Selector

from .accumulate import real_blocks


@dataclass(frozen=True)
class Sampler:
    """Chooses which query blocks of a call are looked at: at most ``limit``, at random, the same on every machine."""

    limit: int | None
    seed: int

    def blocks(self, call: Call, block_q: int, *key: int) -> list[int]:
        """Ascending indices of query blocks that are no padding, for the call named by ``key``."""
        real = real_blocks(call, block_q)
        found = list(range(cdiv(call.q_len, block_q))) if real is None else real.any(0).nonzero()[:, 0].tolist()
        if self.limit is None or len(found) <= self.limit:
            return found
        seed = self.seed
        for part in key:
            seed = (seed * 1_000_003 + part + 1) % (1 << 62)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        return sorted(found[i] for i in order[: self.limit].tolist())


class Steps:
    """Chooses which calls of a prompt are looked at: those of every n-th step, from the middle of the first n on.

    A step is one timestep where the model is told one (guidance calls it several times at each), else one call of a
    layer. Neighbouring steps resemble each other, so that some tell about all.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.restart()

    def restart(self) -> None:
        """The next call is the first of a prompt."""
        self.levels: list[float] = []
        self.level: float | None = None

    def begin(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a transformer: reads the timestep, where there is one."""
        names = inspect.signature(getattr(part, "_orig_mod", part).forward).parameters
        timestep = (dict(zip(names, args, strict=False)) | kwargs).get("timestep")
        self.level = None if timestep is None else float(torch.as_tensor(timestep).max())
        if self.level is not None and self.level not in self.levels:
            self.levels.append(self.level)

    def wanted(self, calls: int) -> bool:
        """Whether a layer's call, before which it had ``calls`` others in this prompt, is looked at."""
        step = calls if self.level is None else self.levels.index(self.level)
        return step % self.every == self.every // 2


@dataclass
class Reservoir:
    """A bounded random sample of one layer's calls in host memory: sampled query blocks with their full K and V.

    Attributes:
        budget: bytes; at least one call is always held.
        calls: (number of the call, its parts: calls of their own and which query blocks to look at in each).
        used: bytes of each.
        seen: calls offered so far.
    """

    budget: int
    seed: int
    calls: list[tuple[int, list[tuple[Call, list[int]]]]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    seen: int = 0

    def offer(self, number: int, call: Call, selector: Selector, blocks: list[int]) -> None:
        """Keep the call with the probability that makes the sample uniform."""
        self.seen += 1
        rows = min(len(blocks) * selector.block_q, call.q_len) if _separable(call, selector) else call.q_len
        size = (call.k.numel() + call.v.numel() + rows * call.q[:, :, 0].numel()) * call.q.itemsize
        if self.calls and sum(self.used) + size > self.budget:
            seed = (self.seed * 1_000_003 + number) % (1 << 62)
            slot = int(torch.randint(self.seen, (1,), generator=torch.Generator().manual_seed(seed)))
            if slot >= len(self.calls):
                return
            self._drop(slot)
            while self.calls and sum(self.used) + size > self.budget:  # a long call may take the place of several
                self._drop(0)
        self.calls.append((number, parts(_to_host(call), selector, blocks)))
        self.used.append(size)

    def _drop(self, slot: int) -> None:
        del self.calls[slot], self.used[slot]


def _to_host(call: Call) -> Call:
    move = {name: getattr(call, name).detach().cpu().clone() for name in ("q", "k", "v")}
    mask = None if call.attn_mask is None else call.attn_mask.cpu().clone()
    return call.replace(**move, attn_mask=mask, sinks=None if call.sinks is None else call.sinks.detach().cpu().clone())


def _separable(call: Call, selector: Selector) -> bool:
    """Whether a query block alone, with its keys, is treated exactly as inside the whole call.

    Under causality a query block at the end of its keys is a lower-right aligned call, but only whole key blocks keep
    their means. Without it, the padding among the queries would be forgotten, and so would its place in the text.
    """
    if call.text or not selector.separable:
        return False
    if not call.is_causal:
        return call.query_mask() is None
    return call.offset % selector.block_k == 0 and selector.block_q % selector.block_k == 0


def parts(call: Call, selector: Selector, blocks: list[int]) -> list[tuple[Call, list[int]]]:
    """Query blocks of a call as calls of their own where that changes nothing, else the whole call.

    Returns:
        Calls, and which query blocks to look at in each.
    """
    if not _separable(call, selector):
        return [(call, blocks)]
    found = []
    for i in blocks:
        stop = min((i + 1) * selector.block_q, call.q_len)
        end = stop + call.offset if call.is_causal else call.k_len
        mask = None if call.attn_mask is None else call.attn_mask[:, :end]
        q = call.q[:, :, i * selector.block_q : stop].clone()
        found.append((call.replace(q=q, k=call.k[:, :, :end], v=call.v[:, :, :end], attn_mask=mask), [0]))
    return found
