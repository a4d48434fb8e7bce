"""SparseAttention: the tunable attention that adapters install in a model, one per attention layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spas_attn import backends, count_fallback
from spas_attn.again import attend_again
from spas_attn.call import ALIASES, PRECISIONS, Call, Precision, Ranges
from spas_attn.checks import check_flag
from spas_attn.selectors import MeanSimilarity, Selector, Tokens

from .paths import clean_path, transformers_of
from .tuned import FILE_KEYS, Tuned, check_bounds

Mode = Literal["dense", "tune", "sparse"]
DEFAULT_L1, DEFAULT_PV_L1, DEFAULT_TAIL = 0.06, 0.07, 0.5

# Why a call runs dense whatever the thresholds are, and no calibration looks at it.
SCHEDULED = "it is dense by schedule (dense_steps)"
SHORT = "it has fewer queries than a block"
FULL_MASK = "the model passed a full 4-D attention mask, which sparse attention does not represent"

# A calibration's view of one layer: gets each call, or the reason why a call cannot be looked at.
Observer = Callable[[Call | str], None]


def _of_tuned(name: str) -> Any:
    """A tensor of the tuned state, before one is there of a state that keeps everything; None without heads."""
    return property(lambda self: getattr(self.tuned or (self.heads and Tuned.dense(self.heads)), name, None))


class SparseAttention(nn.Module):
    """Attention of one layer: dense until it is tuned, watched while tuning, block-sparse afterwards.

    Its tuned state is neither parameter nor buffer, so a patched model has the state_dict of the unpatched one, and
    casting the model leaves the thresholds alone: bfloat16 cannot hold 0.98 to three digits.

    Args:
        l1: bound of the mean relative L1 error of selection alone, per head.
        pv_l1: bound of the mean error of everything (selection, PV skip, quantisation); above ``l1``.
        tail: bound of the 99.5th percentile of one query's relative error; None = off.
        selector: the rule whose threshold is tuned, ``MeanSimilarity()`` by default; belongs to the tuned file.
        backend, precision: as in :func:`spas_attn.sparse_attention`.
        text_sink: always keep the blocks that hold text tokens, of queries and of keys, where the model says which
            they are (``text`` of :meth:`forward`); prompts are few tokens that everything depends on.
        graphs: replay a sparse call whose inputs lie where those of an earlier one lay as a CUDA graph (about half
            the host time; backend `triton`). Its output is memory of the graph, which the next such call overwrites:
            for models that are done with a layer's output by then, and for inputs in static buffers.

    Attributes:
        tuned: the state that a calibration or a tuned file gave, None before; see :class:`Tuned`.
        is_sparse, cdfthreshd, simthreshd1, pvthreshd: its tensors under the names of the tuned file; before it is
            there, those of a state that keeps everything.
        mode: "dense" (not tuned yet), "tune" or "sparse".
        dense_now: run this call dense whatever the mode, unwatched by a calibration (dense steps of a schedule).
        always_dense: run dense in mode "sparse" (a layer that is to stay dense); a calibration watches it all the same.
        heads: number of query heads, None until it is known.
        kv_heads: number of KV heads, as the adapter says; None where they are as many.
        gates: a :class:`autotune.learn.HeadGates` while they are learnt, else None: it then computes every call but
            those that run dense whatever the thresholds are, in all modes but "tune".
        family, layer_idx: name of the model's family, and place among its attention layers; set by the adapter.
        head_dim, dense_steps: as the adapter and :func:`modify_model.patch` say, for the tuned file; or None.
        record_density: keep the densities of calls: of the last in ``last_density`` (``[B, Hq]``, None if it ran
            dense), and in ``recorded`` (``[2]``) the sum of their means and their number.
    """

    gates: nn.Module | None
    is_sparse, cdfthreshd, simthreshd1, pvthreshd = (_of_tuned(name) for name in FILE_KEYS.values())

    def __init__(
        self,
        l1: float = DEFAULT_L1,
        pv_l1: float = DEFAULT_PV_L1,
        tail: float | None = DEFAULT_TAIL,
        *,
        selector: Selector | None = None,
        backend: str = "auto",
        precision: Precision = "native",
        text_sink: bool = True,
        graphs: bool = False,
    ) -> None:
        super().__init__()
        check_bounds(l1, pv_l1, tail)
        if backend != "auto":
            backends.get(backend)  # rejects unknown names
        if ALIASES.get(precision, precision) not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        if selector is not None and not isinstance(selector, Selector):
            raise TypeError(f"selector must be a Selector or None, got {selector!r}")
        for name, flag in (("text_sink", text_sink), ("graphs", graphs)):
            check_flag(name, flag)
        self.l1, self.pv_l1, self.tail = l1, pv_l1, tail
        self.selector = selector or MeanSimilarity()
        self.backend, self.precision, self.text_sink = backend, ALIASES.get(precision, precision), text_sink
        self.graphs = graphs
        self.mode: Mode = "dense"
        self.dense_now = self.always_dense = False
        self.register_module("gates", None)
        self.heads: int | None = None
        self.kv_heads: int | None = None
        self.family: str | None = None
        self.layer_idx: int | None = None
        self.head_dim: int | None = None
        self.dense_steps: tuple[float, float] | None = None
        self.observer: Observer | None = None
        self.record_density = False
        self.last_density: Tensor | None = None
        self.recorded = torch.zeros(2, device="cpu")  # also where models are built on `meta`
        self.seen_noise: float | None = None  # of the call that the observer is shown
        self._tuned: Tuned | None = None
        self._device = torch.device("cpu")  # of the model's weights
        self._warned: set[str] = set()
        self._joined: tuple[Selector, Ranges, Selector] | None = None  # what with_text made last, and of what

    @property
    def tuned(self) -> Tuned | None:
        return self._tuned

    @tuned.setter
    def tuned(self, tuned: Tuned | None) -> None:
        if tuned is not None:
            self.set_heads(tuned.heads)
            tuned = tuned if tuned.is_sparse.device == self._device else tuned.to(self._device)
        self._tuned = tuned

    @property
    def device(self) -> torch.device:
        """Of the model's weights."""
        return self._device

    @property
    def needs_noise(self) -> bool:
        """Whether a call has to bring its noise level: there are thresholds by phase, or a calibration is looking."""
        return self.mode == "tune" or (self._tuned is not None and bool(self._tuned.edges))

    def set_heads(self, heads: int) -> None:
        """Say how many query heads the layer has; a ValueError when it is known to have another number."""
        if self.heads not in (None, heads):
            raise ValueError(f"this layer has {self.heads} query heads, got {heads}")
        self.heads = heads

    def set_thresholds(self, tuned: Tuned) -> None:
        """Install a tuned state and switch to mode "sparse"."""
        self.tuned, self.mode, self._warned = tuned, "sparse", set()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dense: Callable[[], Tensor],
        is_causal: bool,
        scale: float,
        attn_mask: Tensor | None = None,
        window: int | None = None,
        cu_seqlens: Tensor | None = None,
        sinks: Tensor | None = None,
        text: Ranges = (),
        scheduled: bool = False,
        share: tuple[int, int] | None = None,
        noise: float | Tensor | None = None,
    ) -> Tensor:
        """Attention of one call.

        Args:
            q: ``[B, Hq, Lq, D]``.
            k, v: ``[B, Hkv, Lk, D]``.
            dense: runs the model's original attention and returns ``[B, Hq, Lq, D]``.
            is_causal, scale, window: as in :func:`spas_attn.sparse_attention`.
            attn_mask: bool key padding ``[B, Lk]`` or None; a 4-D mask runs dense, counted.
            cu_seqlens: int32 ``[n + 1]``, bounds of packed sequences among queries and keys alike (a batch of 1); a
                calibration watches each of them as a call of its own.
            sinks: ``[Hq]``, logits of attention sinks, which the model's own attention has too.
            text: (start, stop) of text tokens among queries and keys; their blocks are kept (see ``text_sink``).
            scheduled: run this call dense whatever the mode, unwatched by a calibration (dense steps); an argument,
                because threads share the module.
            share: (rank, size) where q, k and v hold the heads of one of ``size`` ranks (sequence parallelism by
                exchange of heads): its heads' thresholds are taken.
            noise: level of the call, 1 = pure noise, for thresholds by phase; a tensor on q's device when compiled.

        Returns:
            ``[B, Hq, Lq, D]``; in the modes "dense" and "tune", and for fewer queries than a block (decode), exactly
            what ``dense`` returns.
        """
        unfit = SCHEDULED if scheduled else self._unfit(q, attn_mask)
        if self.gates is not None and unfit is None and self.mode != "tune":
            return self.gates(
                *self._cast(q, k, v), dense=dense, share=share, is_causal=is_causal, scale=scale, attn_mask=attn_mask,
                window=window, cu_seqlens=cu_seqlens, sinks=sinks,
            )  # fmt: skip
        options: dict[str, Any] = dict(
            attn_mask=attn_mask, is_causal=is_causal, scale=scale, window=window, text=text, sinks=sinks,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, precision=self.precision, error_bound=self.pv_l1,
        )  # fmt: skip
        sparse = self.mode == "sparse" and unfit is None and not self.always_dense
        if sparse and not self._in_force().at_noise(noise).all_dense:
            return self._sparse(q, k, v, options, share, noise)
        out = dense()
        if self.mode == "tune" and self.observer is not None:
            self.seen_noise = None if noise is None else float(noise)
            with torch.no_grad():
                for seen in [unfit] if unfit else Call.make(*self._cast(q, k, v), **options).split():
                    self.observer(SHORT if isinstance(seen, Call) and seen.q_len < self.selector.block_q else seen)
        if self.record_density and unfit != SHORT:
            self._record(None, q.device)
        return out

    def _unfit(self, q: Tensor, attn_mask: Tensor | None) -> str | None:
        """Why a call runs dense whatever the thresholds are."""
        if self.dense_now:
            return SCHEDULED
        if q.shape[2] < self.selector.block_q:
            return SHORT
        if attn_mask is not None and attn_mask.dim() == 4:
            if self.mode != "dense":
                count_fallback(FULL_MASK)
            return FULL_MASK
        return None

    def _cast(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What dense attention computes with under autocast."""
        device = q.device.type
        computes = self.mode == "sparse" or self.gates is not None
        if torch.is_autocast_enabled(device) and (computes or not q.dtype == k.dtype == v.dtype):
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        return q, k, v

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], share: tuple[int, int] | None,
        noise: float | Tensor | None,
    ) -> Tensor:  # fmt: skip
        tuned = self._in_force().at_noise(noise)
        self._check_length(k.shape[2], options, tuned.lengths)
        tuned = tuned if share is None else tuned.share(*share)
        selector, pv = tuned.serve(self.selector, q.device, noise)
        # On a CPU PV skip saves no time: leaving it out is faster and more exact. The calibration's check, which calls
        # the kernels itself, carries it out, so that a file tuned here holds its bounds on a GPU too.
        skip = pv if tuned.skips and q.device.type != "cpu" else None
        out, stats = attend_again(
            *self._cast(q, k, v), self.with_text(selector, options["text"]), options, backend=self.backend,
            wants_stats=self.record_density, static=self.graphs,
            trusted={"pv_threshold": skip, "expected_density": tuned.expected_density},
        )  # fmt: skip
        if self.record_density and stats is not None:
            self._record(stats.density, q.device)
        return out

    def serving(self, call: Call) -> tuple[Selector, Tensor]:
        """What serves a call: the selector with this layer's thresholds and text sink, and PV thresholds ``[Hq]``."""
        selector, pv = self._in_force().serve(self.selector, call.q.device)
        return self.with_text(selector, call.text), pv

    def with_text(self, selector: Selector, text: Ranges) -> Selector:
        """A selector that keeps the text's blocks too: a union, so that they do not count toward a threshold."""
        if not text or not self.text_sink:
            return selector
        if torch.compiler.is_compiling():
            return _with_tokens(selector, text)
        known = self._joined  # threads share the module
        if known is None or known[0] is not selector or known[1] != text:
            known = self._joined = (selector, text, _with_tokens(selector, text))
        return known[2]

    def _in_force(self) -> Tuned:
        if self._tuned is None:
            raise RuntimeError("this layer has no thresholds yet: tune it or load a tuned file first")
        return self._tuned

    def _record(self, density: Tensor | None, device: torch.device) -> None:
        self.last_density = density
        mean = torch.ones((), device=device) if density is None else density.mean()
        self.recorded = self.recorded.to(device) + torch.stack([mean, torch.ones_like(mean)])

    def _check_length(self, k_len: int, options: dict[str, Any], lengths: tuple[int, int] | None) -> None:
        """Warn, once for each direction, when there are over twice as many keys, or under half, as calibrated."""
        # The lengths of packed sequences are known to the device only.
        if lengths is None or options["cu_seqlens_q"] is not None or torch.compiler.is_compiling():
            return
        far = "long" if k_len > 2 * lengths[1] else "short" if 2 * k_len < lengths[0] else None
        if far is None or far in self._warned:
            return
        self._warned.add(far)
        # Padding makes a call longer than its text; that is looked at once, because it waits for the device.
        real = k_len if options["attn_mask"] is None else int(options["attn_mask"].sum(-1).max())
        if real > 2 * lengths[1] or 2 * real < lengths[0]:
            warnings.warn(
                f"this layer was calibrated with {lengths[0]} to {lengths[1]} keys and now gets {real}: its error "
                "bounds were not measured there; calibrate at the lengths you serve",
                RuntimeWarning,
                stacklevel=2,
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseAttention:
        super()._apply(fn, recurse)
        device = fn(torch.zeros(0, dtype=torch.bool, device=self._device)).device
        # Offloading parks weights on `meta`, where values are lost; these few numbers stay where they are.
        if device.type != "meta":
            self._device = device
            self.tuned = self._tuned
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A calibration in progress belongs to this process; a copied or pickled model is not part of it.
        return dict(self.__dict__) | {"observer": None, "last_density": None, "_joined": None}

    def extra_repr(self) -> str:
        facts = f"mode={self.mode}, heads={self.heads}, l1={self.l1}, pv_l1={self.pv_l1}, tail={self.tail}"
        return facts if self._tuned is None else f"{facts}, thresholds: {self._tuned.origin}"


def _with_tokens(selector: Selector, text: Ranges) -> Selector:
    return selector | Tokens(text, block_q=selector.block_q, block_k=selector.block_k, sink=False)


def sparse_modules(model: Any) -> dict[str, SparseAttention]:
    """All SparseAttention modules of a model or pipeline by path, without what wrappers put into it.

    Raises:
        ValueError: when there are none (the model is not patched).
    """
    found = {
        prefix + clean_path(name): module
        for prefix, part in transformers_of(model)
        for name, module in part.named_modules()
        if isinstance(module, SparseAttention)
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no SparseAttention layers: patch it first (modify_model.patch(model))"
        )
    return found
