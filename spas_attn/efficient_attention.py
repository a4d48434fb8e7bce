"""EfficientAttention: a multi-head attention module that computes exactly, in the memory there is, and says how.

attention = EfficientAttention(d_model=1024, num_heads=16, d_head=64)
out = attention(tokens, mask=padding)      # bool [B, Lk], True = attend
print(attention.explain())                 # which backend ran, and why the others did not
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_flag
from .efficient.choice import Chooser, Report, is_name
from .efficient.problem import Problem, make_problem, mask_from_multihead_attention
from .efficient.ways import WAYS
from .selectors import Selector

__all__ = ["EfficientAttention", "Report", "mask_from_multihead_attention"]


class EfficientAttention(nn.Module):
    """Multi-head attention, ``[B, Lq, d_model]`` to ``[B, Lq, d_model]``; every backend gives the same numbers.

    Backends: "sdpa" (PyTorch's fused kernels), "flash" (flash-attn, or this library's kernels), "chunked_queries"
    (some queries against all keys), "chunked_keys" (all queries against some keys, online softmax), "standard" (the
    whole score matrix), "block_sparse" (the blocks that a selector keeps; the only one that approximates). "auto"
    takes the first that serves the call and fits in free memory: block_sparse if a selector is given, flash if
    ``use_flash_attention``, sdpa, chunks of queries, chunks of keys; never "standard". Where memory runs out all the
    same, "auto" goes on in chunks, each half of the last, and remembers that for the shape. A backend that is asked
    for by name is never replaced: it raises ValueError for what it cannot compute (a chunked one still halves its
    chunk when memory runs out).

    Parameters are ``to_q.weight``, ``to_k.weight``, ``to_v.weight``, ``to_out.0.weight`` and ``to_out.0.bias``.

    Args:
        d_model: width of query, key, value and output.
        num_heads: H.
        d_head: width of a head.
        dropout: of the output, in training only.
        chunk_size: the largest number of queries or keys that a chunk may have; fewer where memory demands it.
        use_flash_attention: "auto" tries flash before sdpa.
        attention_dropout: of the attention weights, in training only. Every backend draws it in its own way: the same
            seed gives the same output on one backend and chunk size, not across them.
        backend: "auto" or a name.
        selector: which blocks to keep (:mod:`spas_attn.selectors`). There is no backward pass through
            a selection, and its kernels have no dropout and no masks but key padding; for other calls "auto" computes
            exactly and ``explain`` says why.
        scale: factor on q·k; ``d_head ** -0.5`` by default.

    Attributes:
        last_report: :class:`Report` of the last call, None before.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_head: int,
        dropout: float = 0.1,
        chunk_size: int = 512,
        use_flash_attention: bool = False,
        attention_dropout: float = 0.0,
        *,
        backend: str = "auto",
        selector: Selector | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "num_heads": num_heads, "d_head": d_head, "chunk_size": chunk_size}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        for name, rate in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise ValueError(f"{name} must be in [0, 1), got {rate!r}")
        check_flag("use_flash_attention", use_flash_attention)
        if not is_name(backend):
            raise ValueError(f"backend must be 'auto' or one of {sorted(WAYS)}, got {backend!r}")
        if selector is not None and not isinstance(selector, Selector):
            raise TypeError(f"selector must be a Selector or None, got {type(selector).__name__}")
        self.d_model, self.num_heads, self.d_head = d_model, num_heads, d_head
        self.attention_dropout = float(attention_dropout)
        self.scale = d_head**-0.5 if scale is None else float(scale)
        inner = num_heads * d_head
        self.to_q = nn.Linear(d_model, inner, bias=False)
        self.to_k = nn.Linear(d_model, inner, bias=False)
        self.to_v = nn.Linear(d_model, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, d_model), nn.Dropout(dropout))
        self.last_report: Report | None = None
        self._chooser = Chooser(backend, chunk_size, use_flash_attention, selector)

    @property
    def last_backend(self) -> str | None:
        """Name of the backend that computed the last call, None before the first."""
        return None if self.last_report is None else self.last_report.backend

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``query`` over ``key`` and ``value``.

        Args:
            query: ``[B, Lq, d_model]``.
            key: ``[B, Lk, d_model]``; the query by default.
            value: ``[B, Lk, d_model]``; the key by default.
            mask: boolean or integer, True or 1 = attend: ``[B, Lk]``, ``[Lq, Lk]``, ``[B, Lq, Lk]`` or
                ``[B or 1, H or 1, Lq or 1, Lk]``; floating, of the same shapes: added to the scores, -inf hides.
                A 2-D mask with B = Lq, an integer mask of other numbers and a floating one of zeros and ones are
                ambiguous and refused. For masks of ``nn.MultiheadAttention``, which have the opposite sense, see
                :func:`mask_from_multihead_attention`.
            attention_bias: floating, added to the scores, ``[Lq, Lk]`` or 4-D and broadcastable to
                ``[B, H, Lq, Lk]``; differentiable, the chunked backends never expand it to all scores. What
                the mask hides stays hidden.

        Returns:
            ``[B, Lq, d_model]`` in the query's dtype (autocast's where that is on). The attention of a query that sees
            no key is 0, and no gradient flows through it; its output is the bias of ``to_out``.

        Raises:
            ValueError, TypeError: on bad arguments, and for a backend asked for by name that cannot compute the call.
        """
        problem = self._problem(query, key, value, mask, attention_bias)
        with torch.autocast(query.device.type, enabled=False):
            out, self.last_report = self._chooser.run(problem)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def explain(
        self,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
    ) -> Report:
        """What computed the last call and why; with arguments, what would compute such a call."""
        if query is not None:
            return self._chooser.choose(self._problem(query, key, value, mask, attention_bias))
        if self.last_report is None:
            raise ValueError("explain() tells about the last call, and there was none: pass query, or call the module")
        return self.last_report

    def extra_repr(self) -> str:
        """The settings that no submodule shows."""
        chooser = self._chooser
        return (
            f"num_heads={self.num_heads}, d_head={self.d_head}, backend={chooser.backend!r}, "
            f"chunk_size={chooser.chunk_size}, attention_dropout={self.attention_dropout}"
        )

    def _problem(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None, bias: Tensor | None
    ) -> Problem:
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value)
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, self.d_head)).transpose(1, 2)
            for projection, x in ((self.to_q, query), (self.to_k, key), (self.to_v, value))
        )
        dropout = self.attention_dropout if self.training else 0.0
        return make_problem(q, k, v, mask, bias, self.scale, dropout)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.dim() != 3 or x.shape[-1] != self.d_model or 0 in x.shape:
                raise ValueError(f"{name} must be [B, L, {self.d_model}] and not empty, got {tuple(x.shape)}")
            if x.shape[0] != query.shape[0]:
                raise ValueError(f"{name} must have the query's batch {query.shape[0]}, got {x.shape[0]}")
        if key.shape[1] != value.shape[1]:
            raise ValueError(f"key and value must have one length, got {key.shape[1]} and {value.shape[1]}")
