"""What every selector is: a small dataclass with one method, ``levels``, and the rules that hold for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..block_mask import BLOCK_SIZES, BlockMask, blockwise, visible_blocks
from ..call import Call
from ..checks import PerHead, check_flag, per_head

_KINDS: dict[str, type[Selector]] = {}


@dataclass
class Selector:
    """Base of the selectors. A selector writes :meth:`levels`; everything else is here.

    Attributes:
        block_q, block_k: mask block sizes in tokens (64 or 128).
        sink: always keep the first block that has a visible key (block 0 unless the batch is padded on the left).
        local: under causality, always keep the blocks of the ``local`` keys before each query block. Without them
            the first queries of a block see little of what directly precedes them, and perplexity suffers long before
            any mean error shows it (docs/benchmarks/notes.md).
        dense_heads: bool ``[Hq]``, heads that keep every visible block; None for none.
        tuned: name of the field that a calibration tunes; "" for a rule without thresholds.
        candidates: the thresholds that a calibration tries.
        selection_ms: milliseconds of many small launches that choosing blocks takes beyond the selection that the cost
            model measures, whatever the length; ``backend="auto"`` pays it before it calls a sparse call faster.
        packs: the levels of a block depend on its own sequence alone in a call of packed sequences that stand in one
            row (``Call.document_start``), and are those of the sequence alone. A rule that speaks of positions or of
            the end of the sequence has False: packed sequences are then selected for one by one.
        separable: a query block as a call of its own (under causality with the keys up to its end) has the levels that
            it has in the whole sequence. A rule that speaks of positions or looks at the end or at all of it has False.
    """

    block_q: int = field(default=128, kw_only=True)
    block_k: int = field(default=128, kw_only=True)
    sink: bool = field(default=True, kw_only=True)
    local: int = field(default=0, kw_only=True)
    dense_heads: Tensor | None = field(default=None, kw_only=True, repr=False)
    tuned: ClassVar[str] = ""
    candidates: ClassVar[tuple[float, ...]] = (0.0,)
    selection_ms: ClassVar[float] = 0.0
    packs: ClassVar[bool] = False
    separable: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if not isinstance(size, int) or size not in BLOCK_SIZES:
                raise ValueError(f"{name} must be one of {BLOCK_SIZES}, got {size!r}")
        check_flag("sink", self.sink)
        if isinstance(self.local, bool) or not isinstance(self.local, int) or self.local < 0:
            raise ValueError(f"local must be a number of tokens, 0 or more, got {self.local!r}")
        dense = self.dense_heads
        if dense is not None and not (isinstance(dense, Tensor) and dense.dtype == torch.bool and dense.dim() == 1):
            raise TypeError(f"dense_heads must be a boolean tensor [Hq] or None, got {dense!r}")

    def levels(self, call: Call) -> Tensor:
        """The threshold from which on each block is kept: kept ⇔ level < threshold.

        Rules without a threshold give -inf (kept) and +inf. Forced blocks and visibility are not this method's matter.

        Returns:
            float32, broadcastable to ``[B, Hq, nq, nk]``.
        """
        raise NotImplementedError

    @property
    def fits_packing(self) -> bool:
        """Whether packed sequences are selected for in one call, see ``packs``."""
        return self.packs

    @property
    def threshold(self) -> PerHead:
        """What levels are compared with; 1 and more keeps every visible block."""
        value: PerHead = getattr(self, self.tuned) if self.tuned else 0.0
        return value

    @property
    def expected_density(self) -> float | None:
        """Share of blocks this selector is expected to keep, None when nothing is known before the call."""
        return None

    @property
    def fixed_heads(self) -> tuple[bool, ...] | None:
        """Heads whose rule a calibration leaves as it is, whatever their error; None for none."""
        return None

    def tuned_to(self, threshold: Tensor, sparse: Tensor) -> Selector:
        """A copy with other thresholds.

        Args:
            threshold: float32 ``[Hq]``; without meaning for a rule that has none.
            sparse: bool ``[Hq]``; the other heads keep every visible block.
        """
        if not self.tuned:
            return dataclasses.replace(self, dense_heads=~sparse)
        changes: dict[str, Any] = {self.tuned: torch.where(sparse, threshold, 1.0)}
        return dataclasses.replace(self, **changes)

    def final_levels(self, call: Call) -> Tensor:
        """:meth:`levels` after the rules of every selector, float32 ``[B, Hq, nq, nk]``.

        Forced blocks and the lowest block of a row have -inf, so that no row stays empty; invisible ones have +inf.
        """
        levels, visible = self._ruled(call), self.visible(call)
        lowest = levels.clamp(max=3e38).masked_fill(~visible, torch.inf).argmin(-1, keepdim=True)
        return levels.scatter(-1, lowest, -torch.inf).masked_fill(~visible, torch.inf)

    def kept(self, call: Call) -> Tensor:
        """Kept blocks, bool ``[B, Hq, nq, nk]``."""
        return keeps(self.final_levels(call), self._per_head(call))

    def select(
        self,
        q: Tensor,
        k: Tensor,
        *,
        is_causal: bool,
        scale: float | None = None,
        attn_mask: Tensor | None = None,
        window: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> BlockMask:
        """Choose the blocks of one call, in plain torch (``sparse_attention`` takes fused kernels on a GPU).

        Args:
            q: ``[B, Hq, Lq, D]``.
            k: ``[B, Hkv, Lk, D]``.
            others: see :class:`spas_attn.call.CallOptions`; ``attn_mask`` is a key-padding mask here.
        """
        call = Call.make(
            q, k, k, is_causal=is_causal, scale=scale, attn_mask=attn_mask, window=window, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )  # fmt: skip
        if call.attn_mask is not None and call.key_mask is None:
            raise ValueError(
                f"attn_mask must be a key-padding mask [B, Lk] or [B, 1, 1, Lk], got {tuple(call.attn_mask.shape)}"
            )
        if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
            return self.mask_of(call)
        if call.is_self_packed and self.fits_packing:
            return self.mask_of(call.aligned()[0]).packed(call.cu_seqlens_q, call.q_len)
        masks = [self.mask_of(part) for part in call.split()]
        return BlockMask.pack(masks, call.cu_seqlens_q, call.cu_seqlens_k)

    def mask_of(self, call: Call) -> BlockMask:
        """The kept blocks of a call (of one sequence) as a BlockMask."""
        return BlockMask.from_dense(self.kept(call), call.q_len, call.k_len, self.block_q, self.block_k)

    def visible(self, call: Call) -> Tensor:
        """Blocks with something to see: causality, window, padding, packed sequences; bool ``[B or 1, 1, nq, nk]``."""
        visible = visible_blocks(
            call.q_len,
            call.k_len,
            self.block_q,
            self.block_k,
            is_causal=call.is_causal,
            window=call.window,
            device=call.q.device,
        )[None, None]
        if call.document_start is not None:
            start_k = torch.arange(0, call.k_len, self.block_k, device=call.q.device)
            visible = visible & (start_k >= call.document_starts(self.block_q)[:, None])
        if call.key_mask is not None:
            visible = visible & blockwise(call.key_mask, self.block_k).any(-1)[:, None, None]
        return visible

    def forced(self, call: Call) -> Tensor:
        """Blocks kept whatever the levels say: the sink, and under causality the diagonal and the local keys."""
        visible = self.visible(call)
        forced = torch.zeros_like(visible)
        nq, nk = visible.shape[-2:]
        device = visible.device
        if call.is_causal:
            start_q = torch.arange(nq, device=device)[:, None] * self.block_q + call.offset
            start_k = torch.arange(nk, device=device) * self.block_k
            forced = forced | ((start_k < start_q + self.block_q) & (start_k + self.block_k > start_q - self.local))
        if self.sink:
            first = first_keys(call, self.block_q) // self.block_k
            forced = forced | (torch.arange(nk, device=device) == first[:, None, :, None])
        return forced & visible

    def __or__(self, other: Selector) -> Selector:
        """Keeps what either keeps."""
        return Union(self, other)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values that JSON holds; :meth:`from_dict` makes the selector again."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"class": type(self).__name__, **values}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Selector:
        """The selector that :meth:`to_dict` described; a ValueError on classes and fields that are not known here."""
        values = dict(content)
        name = values.pop("class", None)
        if not isinstance(name, str) or name not in _KINDS:
            raise ValueError(f"selector must be one of {sorted(_KINDS)} (import its module first), got {name!r}")
        kind = _KINDS[name]
        unknown = values.keys() - {f.name for f in dataclasses.fields(kind) if f.init}
        if unknown:
            raise ValueError(f"selector {name} has no fields {sorted(unknown)}")
        try:
            return kind(**{key: _rich(value) for key, value in values.items()})
        except TypeError as error:
            raise ValueError(f"selector {name}: {error}") from error

    def _ruled(self, call: Call) -> Tensor:
        """Levels with what is forced (-inf) and what is invisible (+inf), float32 ``[B, Hq, nq, nk]``."""
        visible, forced = self.visible(call), self.forced(call)
        if self.dense_heads is not None:
            heads = call.q.shape[1]
            if len(self.dense_heads) != heads:
                shape = tuple(self.dense_heads.shape)
                raise ValueError(f"dense_heads must be a boolean tensor [{heads}], got shape {shape}")
            forced = forced | self.dense_heads.to(call.q.device)[:, None, None]
        levels = self.levels(call).expand(*call.q.shape[:2], *visible.shape[-2:])
        return levels.masked_fill(forced, -torch.inf).masked_fill(~visible, torch.inf)

    def _per_head(self, call: Call) -> Tensor:
        """The threshold as float32 ``[Hq, 1, 1]``."""
        return per_head(self.threshold, call.q.shape[1], self.tuned, call.q.device)[:, None, None]


@dataclass
class Union(Selector):
    """Keeps what ``first`` or ``second`` keeps; both must use the same block sizes. Written ``a | b``.

    That no row stays empty is a rule for the whole, not for its parts. A calibration tunes the first part that has a
    threshold; what the other one keeps is kept whatever it is, and does not count toward a cdf threshold.
    """

    first: Selector
    second: Selector

    def __post_init__(self) -> None:
        for part in (self.first, self.second):
            if not isinstance(part, Selector):
                raise TypeError(f"| joins selectors, got {type(part).__name__}")
        if not self.sink or self.local or self.dense_heads is not None:
            raise ValueError("sink, local and dense_heads belong to the parts of a union, not to the union")
        for name in ("block_q", "block_k"):
            a, b = getattr(self.first, name), getattr(self.second, name)
            if a != b:
                raise ValueError(f"selectors joined by | need one {name}, got {a} and {b}")
            setattr(self, name, a)
        judged = self._judged
        self.tuned, self.candidates = judged.tuned, judged.candidates  # type: ignore[misc]
        self.selection_ms = self.first.selection_ms + self.second.selection_ms  # type: ignore[misc]
        self.separable = self.first.separable and self.second.separable  # type: ignore[misc]

    @property
    def fits_packing(self) -> bool:
        return self.first.fits_packing and self.second.fits_packing

    @property
    def _judged(self) -> Selector:
        return self.second if self.second.tuned and not self.first.tuned else self.first

    @property
    def threshold(self) -> PerHead:
        return self._judged.threshold

    @property
    def expected_density(self) -> float | None:
        first, second = self.first.expected_density, self.second.expected_density
        return None if first is None or second is None else max(first, second)

    def tuned_to(self, threshold: Tensor, sparse: Tensor) -> Selector:
        tuned = self._judged.tuned_to(threshold, sparse)
        return Union(tuned, self.second) if self._judged is self.first else Union(self.first, tuned)

    def forced(self, call: Call) -> Tensor:
        return self.first.forced(call) | self.second.forced(call)

    def levels(self, call: Call) -> Tensor:
        judged = self._judged
        other = self.second if judged is self.first else self.first
        return judged._ruled(call).masked_fill(keeps(other._ruled(call), other._per_head(call)), -torch.inf)


def keeps(levels: Tensor, threshold: Tensor) -> Tensor:
    """Blocks that a threshold keeps; 1 or more keeps every visible block, whatever rounding the levels had."""
    return (levels < threshold) | ((threshold >= 1.0) & (levels < torch.inf))


def first_key(call: Call) -> Tensor:
    """Position of the first visible key, int64 ``[B or 1]``."""
    if call.key_mask is None:
        return torch.zeros(1, dtype=torch.long, device=call.q.device)
    return call.key_mask.to(torch.int8).argmax(-1)


def first_keys(call: Call, block_q: int) -> Tensor:
    """Position of the first visible key for each query block, int64 ``[B or 1, nq or 1]``."""
    return first_key(call)[:, None] if call.document_start is None else call.document_starts(block_q)[None]


def _plain(value: Any) -> Any:
    if isinstance(value, Selector):
        return value.to_dict()
    if isinstance(value, Tensor):
        return {"tensor": value.tolist()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _rich(value: Any) -> Any:
    if isinstance(value, Mapping):
        return torch.tensor(value["tensor"]) if "tensor" in value else Selector.from_dict(value)
    return tuple(_rich(x) for x in value) if isinstance(value, (list, tuple)) else value
