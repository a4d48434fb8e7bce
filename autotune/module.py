"""SparseAttention: the tunable attention that adapters install in a model, one per attention layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from spas_attn import backends, count_fallback, sparse_attention
from spas_attn.attention import Precision
from spas_attn.checks import PRECISIONS
from spas_attn.selectors import MeanSimilarity, Selector, Tokens
from spas_attn.selectors.tokens import Ranges

Mode = Literal["dense", "tune", "sparse"]
BUFFERS = ("is_sparse", "cdfthreshd", "simthreshd1", "pvthreshd")
PV_OFF = 50.0  # log2 of a probability ratio; far below float32 resolution, so nothing is skipped
DEFAULT_L1, DEFAULT_PV_L1, DEFAULT_TAIL = 0.06, 0.07, 0.5


class Observer(Protocol):
    """What a calibration hands to the modules it watches."""

    def __call__(
        self,
        module: SparseAttention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool,
        scale: float,
        attn_mask: Tensor | None,
        window: int | None,
        text: Ranges,
    ) -> None:
        """See one call of one layer; shapes as in :meth:`SparseAttention.forward`."""


def check_bounds(l1: float, pv_l1: float, tail: float | None) -> None:
    """Refuse bounds that cannot be meant: 0 < l1 < pv_l1, and tail > 0 or None."""
    for name, bound in (("l1", l1), ("pv_l1", pv_l1), ("tail", 1.0 if tail is None else tail)):
        if isinstance(bound, bool) or not isinstance(bound, Real):
            raise TypeError(f"{name} must be a number (a relative error){' or None' * (name == 'tail')}, got {bound!r}")
    if not l1 > 0:
        raise ValueError(f"l1 must be above 0 (a relative error), got {l1}")
    if not pv_l1 > l1:
        raise ValueError(
            f"pv_l1 bounds selection, PV skip and quantisation together: it must exceed l1={l1}, got {pv_l1}"
        )
    if tail is not None and not tail > 0:
        raise ValueError(f"tail must be above 0 (a relative error of one query) or None for off, got {tail}")


@dataclass(frozen=True)
class Thresholds:
    """Tuned values of one layer, one per head: ``is_sparse`` bool, the others float32, all ``[heads]``."""

    is_sparse: Tensor
    cdfthreshd: Tensor
    simthreshd1: Tensor
    pvthreshd: Tensor


class SparseAttention(nn.Module):
    """Attention of one layer: dense until it is tuned, watched while tuning, block-sparse afterwards.

    Thresholds are non-persistent buffers, so a patched model has the state_dict of the unpatched one; they keep
    their float32 when the model is cast, and follow q's device at call time.

    Args:
        l1: bound of the mean relative L1 error of selection alone, per head.
        pv_l1: bound of the mean error of everything (selection, PV skip, quantisation); above ``l1``.
        tail: bound of the 99.5th percentile of one query's relative error; None = off.
        selector: the rule whose thresholds are tuned; its block sizes and pool belong to the tuned file.
        backend, precision: as in :func:`spas_attn.sparse_attention`.
        text_sink: always keep the blocks that hold text tokens, of queries and of keys, where the model says which
            they are (``text`` of :meth:`forward`); prompts are few tokens that everything depends on.

    Attributes:
        mode: "dense" (not tuned yet), "tune" or "sparse".
        dense_now: run this call dense whatever the mode, unwatched by a calibration (dense steps of a schedule).
        always_dense: run dense in mode "sparse" (a layer that is to stay dense); a calibration watches it all the same.
        family, layer_idx: name of the model's family, and place among its attention layers; set by the adapter.
        head_dim: set by the adapter, for the record in the tuned file; None when it does not say.
        dense_steps: what :func:`modify_model.patch` was told, for the record in the tuned file.
    """

    is_sparse: Tensor | None
    cdfthreshd: Tensor | None
    simthreshd1: Tensor | None
    pvthreshd: Tensor | None

    def __init__(
        self,
        l1: float = DEFAULT_L1,
        pv_l1: float = DEFAULT_PV_L1,
        tail: float | None = DEFAULT_TAIL,
        *,
        selector: MeanSimilarity | None = None,
        backend: str = "auto",
        precision: Precision = "bf16",
        text_sink: bool = True,
    ) -> None:
        super().__init__()
        check_bounds(l1, pv_l1, tail)
        if backend != "auto":
            backends.get(backend)  # refuses unknown names
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
        if selector is not None and not isinstance(selector, MeanSimilarity):  # its thresholds are what is tuned
            raise TypeError(f"selector must be a MeanSimilarity or PeakMass, or None, got {selector!r}")
        if not isinstance(text_sink, bool):
            raise TypeError(f"text_sink must be True or False, got {text_sink!r}")
        self.l1, self.pv_l1, self.tail = l1, pv_l1, tail
        self.selector = selector or MeanSimilarity()
        self.backend, self.precision, self.text_sink = backend, precision, text_sink
        self.mode: Mode = "dense"
        self.dense_now = self.always_dense = False
        self.family: str | None = None
        self.layer_idx: int | None = None
        self.head_dim: int | None = None
        self.dense_steps: tuple[float, float] | None = None
        self.observer: Observer | None = None
        self.lengths: tuple[int, int] | None = None  # shortest and longest calibrated number of keys
        self.expected_density: float | None = None  # of a calibration or a tuned file
        self.last_density: Tensor | None = None  # of the last sparse call, [B, Hq], when record_density is set
        self.record_density = False
        self._all_dense = False
        self._filters = self._skips = False  # any similarity filter, any PV skip: known without asking the device
        self._warned_length = False
        self._served: dict[torch.device, tuple[Tensor, Tensor | float, Tensor]] = {}  # see _effective
        for name in BUFFERS:
            self.register_buffer(name, None, persistent=False)

    @property
    def heads(self) -> int | None:
        """Number of query heads, known once thresholds exist."""
        return None if self.is_sparse is None else int(self.is_sparse.shape[0])

    def set_heads(self, heads: int) -> None:
        """Create thresholds that keep everything for ``heads`` query heads; the mode stays as it is."""
        values = Thresholds(
            torch.zeros(heads, dtype=torch.bool),
            torch.ones(heads),
            torch.full((heads,), -1.0),
            torch.full((heads,), PV_OFF),
        )
        self._store(values)

    def set_thresholds(
        self, values: Thresholds, *, expected_density: float | None = None, lengths: tuple[int, int] | None = None
    ) -> None:
        """Install tuned values and switch to mode "sparse".

        Args:
            values: one value per query head.
            expected_density: mean share of kept blocks, for the choice of the backend; None when unknown.
            lengths: shortest and longest calibrated number of keys; serving far outside them warns once.

        Raises:
            ValueError: when a tensor is not ``[heads]`` or not finite.
        """
        heads = values.is_sparse.shape[0]
        for name in BUFFERS:
            tensor = getattr(values, name)
            if tuple(tensor.shape) != (heads,):
                raise ValueError(f"{name} must have shape [{heads}], got {list(tensor.shape)}")
            if not bool(torch.isfinite(tensor.float()).all()):
                raise ValueError(f"{name} must be finite, got {tensor.tolist()}")
        self._store(values)
        self.expected_density, self.lengths, self._warned_length = expected_density, lengths, False
        self.mode = "sparse"

    def thresholds(self) -> Thresholds:
        """The values in force; a RuntimeError when there are none yet."""
        if self.is_sparse is None:
            raise RuntimeError("this layer has no thresholds yet: tune it or load a tuned file first")
        return Thresholds(*(getattr(self, name) for name in BUFFERS))

    def _store(self, values: Thresholds) -> None:
        device = torch.device("cpu") if self.is_sparse is None else self.is_sparse.device
        for name in BUFFERS:
            tensor = getattr(values, name).detach().to(device, torch.bool if name == "is_sparse" else torch.float32)
            setattr(self, name, tensor.clone())
        self._served = {}
        sparse = values.is_sparse.bool()
        self._all_dense = not bool(sparse.any())
        self._filters = bool((values.simthreshd1[sparse] > 0).any())  # no similarity is negative
        self._skips = bool((values.pvthreshd[sparse] < PV_OFF).any())

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
        text: Ranges = (),
    ) -> Tensor:
        """Attention of one call.

        Args:
            q: ``[B, Hq, Lq, D]``.
            k, v: ``[B, Hkv, Lk, D]``.
            dense: runs the model's original attention and returns ``[B, Hq, Lq, D]``.
            is_causal, scale, window: as in :func:`spas_attn.sparse_attention`.
            attn_mask: bool key padding ``[B, Lk]`` or None; a 4-D mask runs dense, counted.
            text: (start, stop) of text tokens among queries and keys; their blocks are kept (see ``text_sink``).

        Returns:
            ``[B, Hq, Lq, D]``; in the modes "dense" and "tune", and for fewer queries than a block (decode), exactly
            what ``dense`` returns.
        """
        if self.mode == "dense" or self.dense_now or q.shape[2] < self.selector.block_q:
            return dense()
        if attn_mask is not None and attn_mask.dim() == 4:
            count_fallback("the model passed a full 4-D attention mask, which sparse attention does not represent")
            return dense()
        device = q.device.type
        if torch.is_autocast_enabled(device) and (self.mode == "sparse" or not q.dtype == k.dtype == v.dtype):
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))  # as dense attention does
        if self.mode == "tune":
            out = dense()
            if self.observer is not None:
                with torch.no_grad():
                    self.observer(
                        self, q, k, v, is_causal=is_causal, scale=scale, attn_mask=attn_mask, window=window, text=text
                    )
            return out
        if self._all_dense or self.always_dense:
            return dense()
        self._check_length(k.shape[2])
        selector, pv_threshold = self.tuned(q.device, text)
        # On a processor PV skip saves no time: leaving it out is faster and more exact. The calibration's check, which
        # calls the kernels itself, carries it out, so that a file tuned here holds its bounds on a GPU too.
        skip = pv_threshold if self._skips and device != "cpu" else None
        with torch.autocast(device, enabled=False):  # kernels choose their precisions themselves
            out, stats = sparse_attention(
                q,
                k,
                v,
                selector,
                is_causal=is_causal,
                scale=scale,
                attn_mask=attn_mask,
                window=window,
                pv_threshold=skip,
                precision=self.precision,
                error_bound=self.pv_l1,
                backend=self.backend,
                expected_density=self.expected_density,
                return_stats=True,
            )
        if self.record_density:
            self.last_density = stats.density
        return out

    def tuned(self, device: torch.device, text: Ranges = ()) -> tuple[Selector, Tensor]:
        """The selector with this layer's thresholds (and text sink), and the PV thresholds ``[Hq]``, on ``device``.

        Heads with ``is_sparse == False`` keep everything.
        """
        cdf, sim, pv = self._effective(device)
        selector = replace(self.selector, cdf_threshold=cdf, sim_threshold=sim)
        sink = self.sink_of(text)
        return (selector if sink is None else selector | sink), pv

    def _effective(self, device: torch.device) -> tuple[Tensor, Tensor | float, Tensor]:
        """Thresholds of cdf, similarity and PV skip on ``device``, dense heads keeping everything.

        Made once for each device: a call must not wait for copies, nor launch kernels for a few numbers.
        """
        if torch.compiler.is_compiling():  # a traced graph must not depend on what is kept here
            return self._made_for(device)
        if device not in self._served:
            self._served[device] = self._made_for(device)
        return self._served[device]

    def _made_for(self, device: torch.device) -> tuple[Tensor, Tensor | float, Tensor]:
        values = self.thresholds()
        sparse = values.is_sparse.to(device)
        cdf = torch.where(sparse, values.cdfthreshd.to(device), 1.0)
        sim = torch.where(sparse, values.simthreshd1.to(device), -1.0) if self._filters else -1.0
        return cdf, sim, torch.where(sparse, values.pvthreshd.to(device), PV_OFF)

    def sink_of(self, text: Ranges) -> Tokens | None:
        """The selector that keeps the text's blocks, None without a text or with ``text_sink=False``."""
        if not text or not self.text_sink:
            return None
        return Tokens(text, block_q=self.selector.block_q, block_k=self.selector.block_k, sink=False)

    def _check_length(self, k_len: int) -> None:
        """Warn once when the keys are more than twice as many, or fewer than half, as in the calibration."""
        if self.lengths is None or self._warned_length or torch.compiler.is_compiling():
            return
        shortest, longest = self.lengths
        if k_len > 2 * longest or 2 * k_len < shortest:
            self._warned_length = True
            warnings.warn(
                f"this layer was calibrated with {shortest} to {longest} keys and now gets {k_len}: its error bounds "
                "were not measured there; calibrate at the lengths you serve",
                RuntimeWarning,
                stacklevel=2,
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseAttention:
        """Move with the model, but never change dtype: bfloat16 cannot hold a threshold of 0.98 to three digits."""
        saved = {name: getattr(self, name) for name in BUFFERS}
        self._served = {}
        super()._apply(fn, recurse)
        for name, tensor in saved.items():
            if tensor is not None:
                device = getattr(self, name).device
                # Offloading parks weights on `meta`, where values are lost; these few numbers stay where they are.
                setattr(self, name, tensor if device.type == "meta" else tensor.to(device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A calibration in progress belongs to this process; a copied or pickled model is not part of it.
        state = dict(self.__dict__)
        state["observer"], state["last_density"], state["_served"] = None, None, {}
        return state

    def extra_repr(self) -> str:
        return f"mode={self.mode}, heads={self.heads}, l1={self.l1}, pv_l1={self.pv_l1}, tail={self.tail}"


# Attributes of a pipeline object that hold its transformers, and the prefix of the second one in a tuned file.
_PIPELINE_PARTS = (("transformer", ""), ("transformer_2", "transformer_2."))


def transformers_of(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules of a model or pipeline that hold its attention layers, each with its prefix in a tuned file."""
    if isinstance(model, nn.Module):
        return [("", model)]
    parts = [(prefix, getattr(model, name, None)) for name, prefix in _PIPELINE_PARTS]
    found = [(prefix, part) for prefix, part in parts if isinstance(part, nn.Module)]
    if not found:
        raise ValueError(f"model must be a module or a pipeline with .transformer, got {type(model).__name__}")
    return found


def sparse_modules(model: Any) -> dict[str, SparseAttention]:
    """All SparseAttention modules of a model or pipeline by path, `_orig_mod.` and PEFT prefixes stripped.

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


def clean_path(path: str) -> str:
    """A module's path without what torch.compile and PEFT put into it."""
    parts = [part for part in path.split(".") if part != "_orig_mod"]
    return ".".join(parts).removeprefix("base_model.model.")
