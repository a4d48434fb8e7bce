"""What the two denoisers share: a condition prepared once for all steps, and forward in groups of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Checked, Engine


@dataclass(frozen=True)
class Group:
    """Samples of a batch whose condition is alike in kind.

    Attributes:
        rows: their places in the batch, int64 ``[b]``, or None for the whole batch.
        repeats: how many equal tokens each token of the condition stands for; above 1 it is one token.
        prepared: what the model computed of the condition.
    """

    rows: Tensor | None
    repeats: int
    prepared: Any


@dataclass(frozen=True)
class Condition:
    """A condition as a model has prepared it; valid for that model as long as its weights stay as they are."""

    batch: int
    groups: tuple[Group, ...]


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
        groups = []
        for kind in sorted({*constant}):
            rows = [index for index, value in enumerate(constant) if value is kind]
            where = None if len(rows) == batch else torch.tensor(rows, device=tokens.device)
            part = tokens if where is None else tokens[where]
            part, repeats = (part[:, :1], length) if kind else (part, 1)
            groups.append(Group(where, repeats, self.prepare_tokens(part, repeats)))
        return Condition(batch, tuple(groups))

    def prepare_tokens(self, tokens: Tensor, repeats: int) -> Any:
        """What depends on the condition alone; ``tokens`` are ``[b, Lc, context_dim]``, each ``repeats`` times."""
        raise NotImplementedError

    def denoise(self, x: Tensor, t: Tensor, group: Group, guidance: Tensor | None, engine: Engine) -> Tensor:
        """Velocity of the samples of one group; ``x`` and the result are ``[b, L, in_channels]``."""
        raise NotImplementedError

    def grouped(
        self, x: Tensor, t: Tensor, contexts: Mapping[str, Tensor] | Condition, guidance: Tensor | None, channels: int
    ) -> Tensor:
        """Velocity of a batch, each group of samples on its own."""
        if x.dim() != 3 or x.shape[-1] != channels:
            raise ValueError(f"x must be [B, L, {channels}], got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be [{x.shape[0]}], one time for each sample of x, got {list(t.shape)}")
        if guidance is not None and guidance.shape != x.shape[:1]:
            raise ValueError(f"guidance must be [{x.shape[0]}], one for each sample of x, got {list(guidance.shape)}")
        condition = contexts if isinstance(contexts, Condition) else self.prepare(contexts)
        if condition.batch != x.shape[0]:
            raise ValueError(f"contexts must be for the {x.shape[0]} samples of x, got {condition.batch}")

        def run(engine: Engine) -> Tensor:
            first = condition.groups[0]
            if first.rows is None:
                return self.denoise(x, t, first, guidance, engine)
            out = torch.empty_like(x)
            for group in condition.groups:
                rows = group.rows
                assert rows is not None
                some = None if guidance is None else guidance[rows]
                out[rows] = self.denoise(x[rows], t[rows], group, some, engine).to(out.dtype)
            return out

        return self.checked(run)


def _kind(contexts: object) -> str:
    if isinstance(contexts, Mapping):
        return f"a dict with {', '.join(map(repr, contexts)) or 'nothing'}"
    return type(contexts).__name__
