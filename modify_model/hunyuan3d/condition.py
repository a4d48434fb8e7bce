"""What the two denoisers share: a condition prepared once for all steps, and forward in groups of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Checked, Engine


@dataclass(frozen=True)
class Group:
    """Samples of a batch whose condition is alike in kind.

    Attributes:
        count: how many there are.
        repeats: how many equal tokens each token of the condition stands for; above 1 it is one token.
        prepared: what the model computed of the condition.
    """

    count: int
    repeats: int
    prepared: Any


@dataclass(frozen=True)
class Condition:
    """A condition as a model has prepared it; valid for that model as long as its weights stay as they are.

    Attributes:
        batch: number of samples.
        groups: their groups, one after the other.
        order: places in the batch of the groups' samples, int64 ``[batch]``, or None where they stand in order.
    """

    batch: int
    groups: tuple[Group, ...]
    order: Tensor | None


class Denoiser(Checked):
    """Base of the denoisers.

    Attributes:
        merge_constant: compute samples whose condition tokens are all the same (the zeros of the unconditional pass)
            with one token in their place. Exact: equal tokens stay equal in every layer, and one key whose
            exponential counts n times is n equal keys.
    """

    merge_constant: bool
    context_dim: int

    def prepare(self, contexts: Mapping[str, Tensor]) -> Condition:
        """Do once what depends on the condition alone; pass the result to :meth:`forward` as ``contexts``.

        Args:
            contexts: ``main`` is the condition, ``[B, Lc, context_dim]``; other entries are for other models.

        Raises:
            TypeError, ValueError: on contexts without ``main`` and on other shapes.
        """
        tokens = contexts.get("main") if isinstance(contexts, Mapping) else None
        if not isinstance(tokens, Tensor):
            raise TypeError(f"contexts must be a dict with a tensor 'main' or a Condition, got {_kind(contexts)}")
        if tokens.dim() != 3 or tokens.shape[-1] != self.context_dim or 0 in tokens.shape:
            raise ValueError(f"contexts['main'] must be [B, Lc, {self.context_dim}], got {list(tokens.shape)}")
        batch, length = tokens.shape[:2]
        constant = [False] * batch
        if self.merge_constant and length > 1:
            constant = (tokens == tokens[:, :1]).flatten(1).all(-1).tolist()
        places: list[int] = []
        groups = []
        for kind in sorted({*constant}):
            rows = [index for index, value in enumerate(constant) if value is kind]
            part = tokens if len(rows) == batch else tokens[rows]
            part, repeats = (part[:, :1], length) if kind else (part, 1)
            groups.append(Group(len(rows), repeats, self.prepare_tokens(part, repeats)))
            places += rows
        order = None if places == sorted(places) else torch.tensor(places, device=tokens.device)
        return Condition(batch, tuple(groups), order)

    def prepare_tokens(self, tokens: Tensor, repeats: int) -> Any:
        """What depends on the condition alone; ``tokens`` are ``[b, Lc, context_dim]``, each ``repeats`` times."""
        raise NotImplementedError

    def denoise(self, x: Tensor, t: Tensor, groups: Sequence[Group], guidance: Tensor | None, engine: Engine) -> Tensor:
        """Velocity of samples that stand in the order of their groups.

        ``x`` and the result are ``[B, L, in_channels]``; ``t`` and ``guidance`` are ``[B]``, or ``[1]`` for all.
        """
        raise NotImplementedError

    def grouped(
        self, x: Tensor, t: Tensor, contexts: Mapping[str, Tensor] | Condition, guidance: Tensor | None, channels: int
    ) -> Tensor:
        """Velocity of a batch, its samples put in the order of their groups meanwhile."""
        if x.dim() != 3 or x.shape[-1] != channels:
            raise ValueError(f"x must be [B, L, {channels}], got {list(x.shape)}")
        for name, value in (("t", t), ("guidance", guidance)):
            if value is not None and value.shape not in (x.shape[:1], (1,)):
                raise ValueError(f"{name} must be [{x.shape[0]}], as x has samples, or [1], got {list(value.shape)}")
        condition = contexts if isinstance(contexts, Condition) else self.prepare(contexts)
        if condition.batch != x.shape[0]:
            raise ValueError(f"contexts must be for the {x.shape[0]} samples of x, got {condition.batch}")
        order = condition.order
        if order is None:
            return self.checked(lambda engine: self.denoise(x, t, condition.groups, guidance, engine))

        def run(engine: Engine) -> Tensor:
            times, scales = (value if value is None or len(value) == 1 else value[order] for value in (t, guidance))
            assert times is not None
            found = self.denoise(x[order], times, condition.groups, scales, engine)
            return torch.empty_like(found).index_copy_(0, order, found)

        return self.checked(run)


def _kind(contexts: object) -> str:
    if isinstance(contexts, Mapping):
        return f"a dict with {', '.join(map(repr, contexts)) or 'nothing'}"
    return type(contexts).__name__
