"""MInference: one sparse pattern per head, chosen offline and filled in on each prompt (arXiv 2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..call import Call
from ..checks import PerHead, check_range, per_head
from .base import Selector, first_key
from .last_queries import LastQueries, first_distance, last_queries, over_columns, over_diagonals
from .pooled import mean_row, pooled_rows, probabilities
from .ranking import places

PATTERNS = ("vertical_slash", "a_shape", "block_sparse")
LAST_QUERIES = 64  # their attention finds the columns and diagonals
FORCED_COLUMNS, FORCED_DIAGONALS = 30, 100  # come first in the rankings
LEAST_COLUMNS, LEAST_DIAGONALS = 30, 50  # are chosen whatever the sizes are
VERTICAL_SHARE, SLASH_SHARE = 0.2, 0.8  # of an adaptive budget


@dataclass
class MInference(Selector):
    """Keeps what the pattern of each head says.

    - ``"vertical_slash"``: the ``vertical_size`` keys and the ``slash_size`` diagonals of most attention of the last 64
      queries; the first 30 keys and the 100 shortest distances come first. Blocks that hold such a key or are crossed
      by such a diagonal are kept.
    - ``"a_shape"``: the same with the first ``vertical_size`` keys and the ``slash_size`` shortest distances.
    - ``"block_sparse"``: for each query block the key blocks of best pooled score, ``vertical_size + slash_size``
      tokens of them.

    At least 30 keys and 50 diagonals are chosen. The first pattern looks at the end of the prompt by design: under
    causality, too, a later token may change what earlier queries attend to.

    Attributes:
        pattern: of all heads, or a tuple with one per query head.
        vertical_size, slash_size: sizes in tokens, numbers or tensors ``[Hq]``.
        adaptive_budget: a share of the prompt's length, a float or a tensor ``[Hq]``, that takes the place of the
            sizes: 20% of it are keys, 80% diagonals; 1 keeps everything. None: the sizes count, and a calibration finds
            no threshold to tune, only which heads stay dense.
    """

    pattern: str | tuple[str, ...] = "vertical_slash"
    vertical_size: PerHead = 1000
    slash_size: PerHead = 6096
    adaptive_budget: PerHead | None = None
    tuned: ClassVar[str] = "adaptive_budget"
    selection_ms: ClassVar[float] = (
        3.0  # One H100, 8K to 32K tokens: 3.6 and 3.4 ms in all, where XAttention takes 0.5 and 0.9.
    )
    candidates: ClassVar[tuple[float, ...]] = (
        0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7,
        0.8, 0.9,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pattern, list):
            self.pattern = tuple(self.pattern)
        named = self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)
        if not named or any(name not in PATTERNS for name in named):
            raise ValueError(f"pattern must be one of {PATTERNS}, or a tuple of them, got {self.pattern!r}")
        check_range("vertical_size", self.vertical_size, 0, float("inf"))
        check_range("slash_size", self.slash_size, 0, float("inf"))
        if self.adaptive_budget is None:
            self.tuned, self.candidates = Selector.tuned, Selector.candidates  # type: ignore[misc]
        else:
            check_range("adaptive_budget", self.adaptive_budget, 0, 1)

    def levels(self, call: Call) -> Tensor:
        heads, device = call.q.shape[1], call.q.device
        patterns = self.patterns(heads)
        if set(patterns) == {"block_sparse"}:
            return self._block_sparse(call)
        last = None if set(patterns) == {"a_shape"} else last_queries(call, LAST_QUERIES)
        by_column, by_distance = self.lines(call, patterns, last)
        levels = torch.minimum(by_column[:, :, None], over_diagonals(self, call, by_distance))
        if "block_sparse" not in patterns:
            return levels
        return torch.where(_heads_with("block_sparse", patterns, device), self._block_sparse(call), levels)

    def patterns(self, heads: int) -> tuple[str, ...]:
        """The pattern of every query head."""
        patterns = (self.pattern,) * heads if isinstance(self.pattern, str) else self.pattern
        if len(patterns) != heads:
            raise ValueError(f"pattern must be one name or a tuple of {heads}, got {len(patterns)} names")
        return patterns

    def lines(self, call: Call, patterns: tuple[str, ...], last: LastQueries | None) -> tuple[Tensor, Tensor]:
        """Levels of heads whose pattern is made of keys and diagonals.

        Args:
            call, patterns: the call, and the pattern of every query head.
            last: what the last ``LAST_QUERIES`` queries attend to; None if no head asks for it.

        Returns:
            float32 ``[B, Hq, nk]``, the lowest of the keys of each block, and ``[B, Hq, distances]``.
        """
        columns, diagonals = self.line_places(call, patterns, last)
        by_column = self._by_place(call, columns, self.vertical_size, "vertical_size", LEAST_COLUMNS, VERTICAL_SHARE)
        by_distance = self._by_place(call, diagonals, self.slash_size, "slash_size", LEAST_DIAGONALS, SLASH_SHARE)
        return over_columns(self, by_column)[:, :, 0], by_distance

    @staticmethod
    def line_places(call: Call, patterns: tuple[str, ...], last: LastQueries | None) -> tuple[Tensor, Tensor]:
        """Places of the keys ``[B, Hq, Lk]`` and of the diagonals ``[B, Hq, distances]`` in the rankings of the heads,
        float32, from 0; arguments as of :meth:`lines`.
        """
        device = call.q.device
        key = torch.arange(call.k_len, device=device) - first_key(call)[:, None]  # [B or 1, Lk]
        distance = torch.arange(first_distance(call), call.q_len + call.offset, device=device).abs()
        columns = key.float().masked_fill(key < 0, call.k_len)[:, None].expand(*call.q.shape[:2], -1)
        diagonals = distance.float().expand(*call.q.shape[:2], -1)
        if last is None:
            return columns, diagonals
        given = _heads_with("a_shape", patterns, device)[..., 0]
        held = torch.ones_like(key, dtype=torch.bool) if call.key_mask is None else call.key_mask
        begins = ((key >= 0) & (key < FORCED_COLUMNS))[:, None]
        near = distance < FORCED_DIAGONALS
        # Among the forced diagonals the nearest come first, whatever their masses are.
        nearness = torch.where(near, 1.0 - distance / FORCED_DIAGONALS, last.diagonals)
        columns = torch.where(given, columns, places(last.columns, begins, held[:, None]))
        return columns, torch.where(given, diagonals, places(nearness, near, torch.ones_like(near)))

    def _by_place(self, call: Call, place: Tensor, size: PerHead, name: str, least: int, share: float) -> Tensor:
        """Levels of the keys or diagonals ``[B, Hq, n]`` at these places of a ranking."""
        if self.adaptive_budget is None:
            sizes = per_head(size, call.q.shape[1], name, call.q.device).clamp(min=least)[:, None]
            return torch.where(place < sizes, -torch.inf, torch.inf)
        return (place / (share * self._length(call))).masked_fill(place < least, -torch.inf)

    def block_places(self, call: Call) -> Tensor:
        """Tokens of the blocks before each block in its row's ranking by pooled score, ``[B, Hq, nq, nk]``."""
        probs = mean_row(probabilities(pooled_rows(self, call, min(self.block_q, self.block_k))))
        return places(probs, self.forced(call), self.visible(call)) * self.block_k

    def _block_sparse(self, call: Call) -> Tensor:
        place = self.block_places(call)
        if self.adaptive_budget is not None:
            return place / self._length(call)[..., None]
        heads, device = call.q.shape[1], call.q.device
        sizes = per_head(self.vertical_size, heads, "vertical_size", device)
        sizes = sizes + per_head(self.slash_size, heads, "slash_size", device)
        return torch.where(place < sizes[:, None, None], -torch.inf, torch.inf)

    @staticmethod
    def _length(call: Call) -> Tensor:
        """Keys of each sequence that are no padding, float32 ``[B or 1, 1, 1]``."""
        if call.key_mask is None:
            return torch.full((1, 1, 1), float(call.k_len), device=call.q.device)
        return call.key_mask.sum(-1).clamp(min=1).float()[:, None, None]


def _heads_with(pattern: str, patterns: tuple[str, ...], device: torch.device) -> Tensor:
    """Heads of a pattern, bool ``[Hq, 1, 1]``; the copy to the device waits for nothing there."""
    chosen = torch.tensor([name == pattern for name in patterns])
    return chosen.to(device, non_blocking=True)[:, None, None]
