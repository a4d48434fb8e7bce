"""Prefill methods as functions under the names that users of SparseAttn and x-attention know, and their configuration.

All take ``[B, H, L, D]`` on any device, grouped-query attention, any batch, ragged lengths and chunks at the end of a
longer prompt, and return ``[B, Hq, Lq, D]`` in the queries' dtype. They select blocks and compute those exactly; where
exact dense attention is measured to be faster, that runs instead (``backend="auto"``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import attend, sparse_attention
from .call import Call, CallOptions
from .checks import PerHead, check_choice, check_flag, check_range
from .selectors import Dense, FlashPrefill, FlexPrefill, MInference, RowShare, Selector, XAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack

METRICS = ("xattn", "flex", "minfer", "flash", "full")
SHIPPED = Path(__file__).with_name("xattn_config.json")
DEFAULT_RATIO = 0.2  # share of the blocks of a row that FlexPrefill drops where neither a share nor gamma is given
DEFAULT_BUDGET = 0.1  # of MInference, where a configuration gives neither sizes nor a budget


class PrefillOptions(CallOptions, total=False):
    """What every function takes besides its own arguments: a call's options, and how it runs.

    backend: a name, or "auto".
    strict: raise instead of falling back to dense attention.
    """

    backend: str
    strict: bool


def Xattention_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    threshold: PerHead = 0.95,
    causal: bool = True,
    stride: int = 16,
    **options: Unpack[PrefillOptions],
) -> Tensor:
    """XAttention (arXiv 2503.16428): blocks of most antidiagonal mass until it reaches ``threshold``.

    Args:
        query_states: ``[B, Hq, Lq, D]``.
        key_states, value_states: ``[B, Hkv, Lk, D]``; heads need not be repeated.
        threshold: mass to keep, a float or a tensor with one per query head ``[Hq]``.
        causal: lower-right aligned causality.
        stride: tokens in a group that is scored at once: 16, 8 or 4 in the paper.
        options: see :class:`PrefillOptions`.

    Raises:
        ValueError, TypeError: on bad arguments, naming them; RuntimeError with ``strict``.
    """
    selector = XAttention(threshold=threshold, stride=stride)
    return _run(query_states, key_states, value_states, selector, causal, options)


def Flexprefill_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    block_size: int = 64,
    sparsity_ratio: float | None = DEFAULT_RATIO,
    gamma: PerHead | None = None,
    **options: Unpack[PrefillOptions],
) -> Tensor:
    """FlexPrefill (arXiv 2502.20766), causal: by a share of blocks, or by its own rule.

    ``sparsity_ratio`` is an argument of SparseAttn's document that its code never had. Here it is the share of the
    visible key blocks that each query block drops, the worst in FlexPrefill's ranking; at most, because the count of
    those kept is rounded up. With ``gamma`` FlexPrefill's own rule decides instead: each head keeps what holds
    ``gamma`` of its mass, and at least 1,024 tokens a row.

    Args:
        query_states: ``[B, Hq, Lq, D]``.
        key_states, value_states: ``[B, Hkv, Lk, D]``.
        block_size: of queries and keys, 64 or 128 tokens.
        sparsity_ratio: share that a row drops, in [0, 1).
        gamma: mass to keep, a float or a tensor ``[Hq]``; the default of ``sparsity_ratio`` is then not used.
        options: see :class:`PrefillOptions`.

    Raises:
        ValueError: also when ``gamma`` and another ``sparsity_ratio`` than the default are given, or neither is.
    """
    if gamma is not None and sparsity_ratio not in (None, DEFAULT_RATIO):
        raise ValueError(
            f"gamma and sparsity_ratio are two rules for one choice: give one, got {gamma} and {sparsity_ratio}"
        )
    if gamma is None and sparsity_ratio is None:
        raise ValueError("one of gamma and sparsity_ratio must be given, got None for both")
    selector = _flex(block_size, None if gamma is not None else sparsity_ratio, gamma)
    return _run(query_states, key_states, value_states, selector, True, options)


def Minference_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    vertical_size: PerHead = 1000,
    slash_size: PerHead = 6096,
    adaptive_budget: PerHead | None = None,
    **options: Unpack[PrefillOptions],
) -> Tensor:
    """MInference (arXiv 2407.02490), causal, with the vertical-slash pattern in every head.

    Args:
        query_states: ``[B, Hq, Lq, D]``.
        key_states, value_states: ``[B, Hkv, Lk, D]``.
        vertical_size, slash_size: chosen keys and diagonals, numbers or tensors ``[Hq]``; at least 30 and 50.
        adaptive_budget: a share of the prompt's length that takes the place of both sizes: 20% keys, 80% diagonals.
        options: see :class:`PrefillOptions`.

    Raises:
        ValueError, TypeError: on bad arguments, naming them; RuntimeError with ``strict``.
    """
    selector = MInference("vertical_slash", vertical_size, slash_size, adaptive_budget)
    return _run(query_states, key_states, value_states, selector, True, options)


def Full_prefill(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    causal: bool = True,
    attention_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact dense attention.

    Args:
        query_states: ``[B, Hq, Lq, D]``.
        key_states, value_states: ``[B, Hkv, Lk, D]``.
        causal: lower-right aligned causality; it holds beside a mask.
        attention_mask: bool, True = attend: ``[B, Lk]``, ``[B, 1, 1, Lk]`` or ``[B, 1 or Hq, Lq, Lk]``. SparseAttn's
            function of this name inverts a boolean mask (attends where it is False); this one does not.
        backend: "auto", or a name: ``"flashinfer"`` where that package is installed.

    Raises:
        ValueError, TypeError: on bad arguments, naming them.
        RuntimeError: when a named backend cannot serve the call.
    """
    check_flag("causal", causal)
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.bool):
        got = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise TypeError(f"attention_mask must be a boolean tensor (True = attend) or None, got {got}")
    call = Call.make(query_states, key_states, value_states, is_causal=causal, attn_mask=attention_mask)
    return attend(call, None, backend=backend, strict=backend != "auto")[0]


def _run(q: Tensor, k: Tensor, v: Tensor, selector: Selector, causal: bool, options: Any) -> Tensor:
    check_flag("causal", causal)
    if "is_causal" in options:
        raise TypeError("is_causal is the argument `causal` here, or part of the method")
    return sparse_attention(q, k, v, selector, is_causal=causal, **options)


def _flex(block_size: int, sparsity_ratio: float | None, gamma: PerHead | None, **rule: Any) -> Selector:
    """FlexPrefill by its own rule, or its ranking with a share dropped per row."""
    blocks: dict[str, Any] = {"block_q": block_size, "block_k": block_size}
    if gamma is not None:
        return FlexPrefill(gamma, **rule, **blocks)
    assert sparsity_ratio is not None
    check_range("sparsity_ratio", sparsity_ratio, 0, 1)
    if sparsity_ratio >= 1:
        raise ValueError(f"sparsity_ratio must be in [0, 1), got {sparsity_ratio}")
    # Budgets put the first blocks of a row before all others: a share per row needs none.
    return RowShare(FlexPrefill(min_budget=0, **rule, **blocks), 1.0 - sparsity_ratio)


@dataclass(frozen=True)
class SparseConfig:
    """Settings of one prefill method, as the file ``xattn_config.json`` holds them; every one is used by its method.

    The five keys of that file are ``stride`` and ``threshold`` (XAttention), ``sparsity_ratio`` (FlexPrefill),
    ``adaptive_budget`` (MInference) and ``block_size`` (all); the others are known to this library alone. A file may
    hold keys of several methods: ``metric`` says which one runs.

    Attributes:
        metric: "xattn", "flex", "minfer", "flash" or "full".
        block_size: of queries and keys, 64 or 128 tokens.
        stride, threshold: of XAttention; thresholds also as a list with one per query head.
        sparsity_ratio: of FlexPrefill: share dropped per row, see :func:`Flexprefill_prefill`; 0.2 where gamma is not
            given either.
        gamma, tau: of FlexPrefill's own rule; gamma excludes sparsity_ratio.
        adaptive_budget: of MInference, 0.1 where no sizes are given either; excludes the sizes.
        vertical_size, slash_size: of MInference; they go together.
        alpha: of FlashPrefill.

    Raises:
        ValueError, TypeError: on values that no method takes, and on contradictions.
    """

    metric: str = "xattn"
    stride: int = 16
    threshold: float | tuple[float, ...] = 0.95
    block_size: int = 64
    sparsity_ratio: float | None = None
    adaptive_budget: float | None = None
    gamma: float | None = None
    tau: float = 0.1
    vertical_size: int | None = None
    slash_size: int | None = None
    alpha: float = 0.18

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        if isinstance(self.threshold, (list, tuple)):
            object.__setattr__(self, "threshold", tuple(self.threshold))
        if self.gamma is not None and self.sparsity_ratio is not None:
            raise ValueError(
                "gamma and sparsity_ratio contradict each other (two rules of FlexPrefill): give one, got "
                f"{self.gamma} and {self.sparsity_ratio}"
            )
        sizes = [name for name in ("vertical_size", "slash_size") if getattr(self, name) is not None]
        if sizes and self.adaptive_budget is not None:
            raise ValueError(f"adaptive_budget takes the place of {' and '.join(sizes)}: give one or the other")
        if len(sizes) == 1:
            raise ValueError(f"vertical_size and slash_size go together, got only {sizes[0]}")
        for metric in METRICS:  # a file is right or wrong whichever of its methods runs
            self._selector(metric)

    @classmethod
    def from_json(cls, path: str | Path | None = None, **changes: Any) -> SparseConfig:
        """Read a file of settings.

        Args:
            path: a JSON object with any of the attributes as keys; None for the file that the package ships.
            changes: attributes that take the place of the file's.

        Raises:
            ValueError: on a file that cannot be read, unknown keys, and contradictions; it names the file.
        """
        path = SHIPPED if path is None else Path(path)
        known = [f.name for f in dataclasses.fields(cls)]
        try:
            content = json.loads(path.read_text("utf-8"), object_pairs_hook=_distinct)
            if not isinstance(content, Mapping):
                raise ValueError(f"it must hold one JSON object, got {type(content).__name__}")
            unknown = sorted((content.keys() | changes.keys()) - set(known))
            if unknown:
                raise ValueError(f"unknown keys {unknown}; known are {known}")
            return cls(**{**content, **changes})
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no configuration of a prefill method: {error}") from error

    def selector(self) -> Selector:
        """The selector of ``metric`` with these settings."""
        return self._selector(self.metric)

    def _selector(self, metric: str) -> Selector:
        blocks: dict[str, Any] = {"block_q": self.block_size, "block_k": self.block_size}
        if metric == "xattn":
            threshold = torch.tensor(self.threshold) if isinstance(self.threshold, tuple) else self.threshold
            return XAttention(threshold, self.stride, **blocks)
        if metric == "flex":
            ratio = DEFAULT_RATIO if self.sparsity_ratio is None else self.sparsity_ratio
            return _flex(self.block_size, ratio, self.gamma, tau=self.tau)
        if metric == "minfer":
            if self.vertical_size is not None and self.slash_size is not None:
                return MInference("vertical_slash", self.vertical_size, self.slash_size, **blocks)
            budget = DEFAULT_BUDGET if self.adaptive_budget is None else self.adaptive_budget
            return MInference("vertical_slash", adaptive_budget=budget, **blocks)
        return FlashPrefill(self.alpha, **blocks) if metric == "flash" else Dense(**blocks)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
        raise ValueError(f"keys {twice} stand twice")
    return content
