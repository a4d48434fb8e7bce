"""Serving a table of heads (DuoAttention, arXiv 2410.10819; PruLong, arXiv 2506.17121) on a patched language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from autotune import SparseAttention
from autotune.module import sparse_modules, transformers_of
from autotune.tuned import PV_OFF, Tuned
from spas_attn.published import full_heads, window_sizes
from spas_attn.selectors import ByHead, Selector, Streaming

from .families import find_family
from .modify_transformers import TransformersFamily

M = TypeVar("M")


def stream_heads(
    model: M,
    source: str | Path | Tensor | list[list[float]],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    sink_tokens: int | None = None,
    local_tokens: int | None = None,
) -> M:
    """Let the heads of a table attend to a sink and a local window only, in place; the others keep their rule.

    Full heads keep the thresholds that a calibration or a tuned file gave them, and run dense where there were none.
    The model can be calibrated further, which leaves the streaming heads alone, and saved and loaded as any tuned
    model. Without a cache of its own the streaming heads are sparse in prefill only; :class:`StreamingCache` holds no
    more than they see. Another table may follow: it replaces this one.

    Args:
        model: a patched language model (:func:`modify_model.patch`).
        source: a folder or file of DuoAttention's or PruLong's format, or the table itself, ``[layers, KV heads]``: at
            1 a head keeps everything, at 0 it streams. A row for every attention layer of the model.
        sparsity, threshold: which heads stream where values lie between, as in
            :func:`spas_attn.published.streaming_heads`.
        sink_tokens, local_tokens: of the streaming heads; by default those beside the table's file.

    Returns:
        The model.

    Raises:
        ValueError: when the model is not patched or no language model, and on a table that does not fit it, or a
            missing size or rule. Nothing is changed then.
        RuntimeError: while the model is being calibrated, or learns its heads.
    """
    modules = list(sparse_modules(model).values())
    root = transformers_of(model)[0][1]
    family = find_family(root)
    if not isinstance(family, TransformersFamily):
        raise ValueError(f"model must be a language model of transformers, got {type(root).__name__} ({family.name})")
    layers = family.layers(root)
    found = {family.kv_heads(layer.attention) for layer in layers}
    if len(found) != 1:
        raise ValueError(f"model must have one number of KV heads in all its layers, got {sorted(found)}")
    if any(module.mode == "tune" or module.observer is not None for module in modules):
        raise RuntimeError("the model is being calibrated: stream heads before or after that")
    if any(module.gates is not None for module in modules):
        raise RuntimeError("the model learns its heads: call remove() of what learn() returned first")
    full = full_heads(source, sparsity=sparsity, threshold=threshold, layers=len(layers), kv_heads=found.pop())
    sizes = window_sizes(source, sink_tokens, local_tokens)
    states = []
    for module in modules:
        row, blocks = ~full[module.layer_idx or 0], (module.selector.block_q, module.selector.block_k)
        rule = Streaming(*sizes, block_q=blocks[0], block_k=blocks[1])
        states.append(_streaming(module, row.repeat_interleave((module.heads or 1) // len(row)), rule))
    for module, (selector, tuned) in zip(modules, states, strict=True):
        module.selector = selector
        module.set_thresholds(tuned)
    return model


def _streaming(module: SparseAttention, streams: Tensor, rule: Streaming) -> tuple[Selector, Tuned]:
    """Selector and state of a layer whose heads ``[Hq]`` stream or keep what they have."""
    heads, present, tuned = len(streams), module.selector, module.tuned
    rest = present.rest if isinstance(present, ByHead) else present
    if tuned is None:
        tuned = dataclasses.replace(Tuned.dense(heads), calibrated=False)
    if tuned.edges or tuned.filters:
        what = "thresholds by phase" if tuned.edges else "similarity filters"
        raise ValueError(f"the layers have {what}, which do not go with streaming heads")
    streams = streams.to(tuned.is_sparse.device)
    sparse = tuned.is_sparse
    if isinstance(present, ByHead):  # nothing is known of heads that streamed before and are full now
        sparse = sparse & ~torch.tensor(present.streams, device=sparse.device)
    on = bool(streams.any())
    state = dataclasses.replace(
        tuned,
        is_sparse=sparse | streams,
        threshold=torch.where(sparse & ~streams, tuned.threshold, 1.0),
        pv=torch.where(streams, PV_OFF, tuned.pv),
        expected_density=None if on else tuned.expected_density,
        checked=tuned.checked and not on,
        tradeoff=None if on else tuned.tradeoff,  # its curves are of other rules
    )
    return (ByHead(tuple(streams.tolist()), rule, rest) if on else rest), state
