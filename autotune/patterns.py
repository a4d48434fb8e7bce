"""The offline search of MInference (arXiv 2407.02490): for every head, the pattern that retains most attention mass.

    with PatternSearch(model, density=0.2) as search:
        for prompt in prompts:
            model(prompt)                      # ordinary dense inference, watched
    search.save("my_model.json")               # in MInference's published format
    patch(model, selector=search.selectors())  # one MInference per layer

All patterns are judged at equal cost: each is scaled until it keeps the same number of blocks.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from spas_attn.call import Call
from spas_attn.published import PATTERN_NAMES, minference_layers
from spas_attn.selectors import MInference
from spas_attn.selectors.last_queries import last_queries, over_columns, over_diagonals
from spas_attn.selectors.minference import LAST_QUERIES

from .conditions import eagerly, float32
from .module import Mode, sparse_modules
from .partials import query_blocks
from .sampling import Sampler

# Pattern, vertical and slash size; their ratio counts, because all are scaled to one cost. The sizes are those of the
# published tables.
CANDIDATES: tuple[tuple[str, int, int], ...] = (
    ("vertical_slash", 30, 800), ("vertical_slash", 100, 800), ("vertical_slash", 500, 700),
    ("vertical_slash", 1000, 6096), ("vertical_slash", 3500, 100), ("a_shape", 128, 3968), ("block_sparse", 0, 6400),
)  # fmt: skip
Table = list[dict[str, list[Any]]]


@dataclass
class _Sums:
    """Of one layer: retained mass and scales ``[candidates, Hq]``, queries ``[Hq]``, and how many calls."""

    retained: Tensor
    scales: Tensor
    queries: Tensor
    calls: int = 0


class PatternSearch:
    """Watches a patched model run dense and finds the pattern of every head; use as a context manager.

    For each call and candidate, the sizes are scaled until ``density`` of a head's visible blocks are kept. Of the
    attention of some query blocks, drawn at random, the share that these blocks hold is summed up; the candidate of the
    largest share wins, the first of equal ones. Sizes are those of the mean scale over calls: search on prompts of the
    lengths that are to be served. Memory is that of the levels of one selector, and of a few query blocks.

    Args:
        model: a patched model, or a pipeline with patched transformers.
        density: share of the visible blocks that each candidate keeps, in (0, 1); forced ones count.
        candidates: (pattern, vertical size, slash size) to try.
        query_blocks: query blocks looked at per call; None = all.
        seed: of the sampling of query blocks.
        block_q, block_k: mask block sizes of the selectors, 64 or 128.

    Raises:
        ValueError, TypeError: when the model is not patched, or an argument is invalid.
        RuntimeError: at the end, when a layer saw no call that could be sparse.
    """

    def __init__(
        self,
        model: Any,
        *,
        density: float = 0.2,
        candidates: tuple[tuple[str, int, int], ...] = CANDIDATES,
        query_blocks: int | None = 16,
        seed: int = 0,
        block_q: int = 128,
        block_k: int = 128,
    ) -> None:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density < 1:
            raise ValueError(f"density must be a share in (0, 1), got {density!r}")
        if query_blocks is not None and (type(query_blocks) is not int or query_blocks < 1):
            raise ValueError(
                f"query_blocks must be a whole number of at least 1, or None for all, got {query_blocks!r}"
            )
        if not candidates:
            raise ValueError("candidates must hold at least one (pattern, vertical size, slash size), got none")
        for name, vertical, slash in candidates:
            MInference(name, vertical, slash)  # rejects what is invalid
            if vertical + slash <= 0:
                raise ValueError(f"candidates must have sizes above 0, got {(name, vertical, slash)}")
        self.density, self.candidates = float(density), tuple(candidates)
        self.selector = MInference(block_q=block_q, block_k=block_k)
        self._sampler, self._modules = Sampler(query_blocks, seed), sparse_modules(model)
        self._sums: dict[str, _Sums] = {}
        self._before: list[Mode] = []
        self._eager = eagerly()

    def __enter__(self) -> PatternSearch:
        for path, module in self._modules.items():
            if module.observer is not None:
                raise RuntimeError(f"layer {path!r} is being calibrated already")
        self._eager.__enter__()
        for index, (path, module) in enumerate(self._modules.items()):
            self._before.append(module.mode)
            module.mode, module.observer = "tune", self._observer(index, path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._eager.__exit__(kind, error, trace)
        for module, mode in zip(self._modules.values(), self._before, strict=True):
            module.mode, module.observer = mode, None
        if kind is None:
            self._check_seen()

    def _observer(self, index: int, path: str) -> Any:
        def observe(call: Call | str) -> None:
            if not isinstance(call, str) and call.q_len >= self.selector.block_q:
                with float32(call.q.device.type):
                    self._add(index, path, call)

        return observe

    def _check_seen(self) -> None:
        for path in self._modules:
            if path not in self._sums:
                raise RuntimeError(f"layer {path!r} saw no call to search on: give prompts of several blocks of tokens")

    def _add(self, index: int, path: str, call: Call) -> None:
        """Count one call."""
        heads, device = call.q.shape[1], call.q.device
        sums = self._sums.get(path)
        if sums is None:
            zeros = torch.zeros(len(self.candidates), heads, dtype=torch.float64, device=device)
            sums = self._sums[path] = _Sums(zeros, zeros.clone(), zeros[0].clone())
        blocks = self._sampler.blocks(call, self.selector.block_q, index, sums.calls)
        mass = _block_mass(call, self.selector, blocks)  # [blocks, B, Hq, nk], and queries that count
        for i, level in enumerate(self._levels(call)):
            scale, share = self._at_equal_cost(call, level)
            retained = torch.stack([(share[:, :, block] * mass[n][0]).sum(-1) for n, block in enumerate(blocks)])
            sums.retained[i] += retained.double().sum((0, 1))
            sums.scales[i] += scale.double().mean(0)
        sums.queries += sum(queries.double().sum(0) for _, queries in mass)
        sums.calls += 1

    def _levels(self, call: Call) -> Any:
        """For each candidate, the scale of its sizes from which on each block is kept, ``[B, Hq, nq, nk]``."""
        heads, lines, blocks = call.q.shape[1], {}, None
        for name, vertical, slash in self.candidates:
            if name == "block_sparse":
                blocks = self.selector.block_places(call) if blocks is None else blocks
                yield blocks / (vertical + slash)
                continue
            if name not in lines:
                last = last_queries(call, LAST_QUERIES) if name == "vertical_slash" else None
                columns, diagonals = self.selector.line_places(call, (name,) * heads, last)
                crossed = over_diagonals(self.selector, call, diagonals)
                lines[name] = over_columns(self.selector, columns), crossed
            columns, crossed = lines[name]
            yield torch.minimum(columns / max(vertical, 1e-6), crossed / max(slash, 1e-6))

    def _at_equal_cost(self, call: Call, level: Tensor) -> tuple[Tensor, Tensor]:
        """The scale ``[B, Hq]`` at which ``density`` of the blocks is kept, and the share of each that is kept, 0 to 1.

        Blocks of the very level that crosses the cost (those of one column, say) are kept in part, all alike, so that
        no candidate is given more than another.
        """
        visible, forced = self.selector.visible(call), self.selector.forced(call)
        level = level.masked_fill(forced, -1.0).masked_fill(~visible, torch.inf).expand(*call.q.shape[:2], -1, -1)
        wanted = visible.expand_as(level).sum((-2, -1)) * self.density  # [B, Hq]
        ranked = level.flatten(2).sort(-1).values
        place = wanted.long().clamp(max=ranked.shape[-1] - 1)
        scale = ranked.gather(-1, place[..., None])[..., None]
        below, at = level < scale, level == scale
        part = (wanted - below.sum((-2, -1))) / at.sum((-2, -1)).clamp(min=1)
        share = torch.where(at, part.clamp(0, 1)[..., None, None], below.float())
        return scale[..., 0, 0].clamp(min=0.0), torch.where(forced & visible, 1.0, share)

    @property
    def table(self) -> Table:
        """For every layer, by head: [published name of the pattern, vertical size, slash size, share of the mass]."""
        self._check_seen()
        return [self._layer(self._sums[path]) for path in self._modules]

    def _layer(self, sums: _Sums) -> dict[str, list[Any]]:
        shares = (sums.retained / sums.queries.clamp(min=1)).cpu()
        scales = (sums.scales / sums.calls).cpu()
        layer = {}
        for head, best in enumerate(shares.argmax(0).tolist()):
            name, vertical, slash = self.candidates[best]
            scale = float(scales[best, head])
            sizes = [round(vertical * scale), round(slash * scale)]
            layer[str(head)] = [PATTERN_NAMES[name], *sizes, round(float(shares[best, head]), 6)]
        return layer

    def selectors(self) -> list[MInference]:
        """One selector per layer, with a pattern and sizes for every head."""
        sizes = {"block_q": self.selector.block_q, "block_k": self.selector.block_k}
        return minference_layers(self.table, "the table", **sizes)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON: a list over layers of {head: [pattern, vertical, slash, score]}."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.table, indent=1) + "\n", encoding="utf-8")
        return target


def _block_mass(call: Call, selector: MInference, blocks: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Of each query block, the mass of its queries by key block ``[B, Hq, nk]``, and how many count ``[B, Hq]``."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in blocks}
    # Only masses are asked for: values of one channel are enough.
    for i, _, partials in query_blocks(call.replace(v=call.v[..., :1]), selector.block_q, selector.block_k, blocks):
        share = partials.mass / partials.mass.sum(2, keepdim=True).clamp(min=1e-37)
        found[i].append(((share * partials.valid[:, :, None]).sum(-1), partials.valid.sum(-1)))
    return [(torch.cat([m for m, _ in found[i]], 1), torch.cat([n for _, n in found[i]], 1)) for i in blocks]
