"""What the attention calls of a model demand, and what its class allows: read off a model or config, duck-typed.

Facts about transformers are those of release 5.23; nothing of it is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MASKS = ("causal", "none", "padding", "full", "additive")


@dataclass(frozen=True)
class Features:
    """What the calls of a model demand.

    Attributes:
        q_len, k_len: queries and keys of a typical call; k_len None stands for q_len. One query is decoding.
        batch: prompts at once.
        heads, kv_heads, qk_dim, v_dim: of a layer.
        dtype: of q, k and v.
        mask: "causal", "none", "padding" (causal, with key padding), "full" (bool), "additive" (float).
        softcap, sinks, position_bias: whether logits are capped, softmax has learned sinks, scores get a bias.
        window: a query sees its last ``window`` keys; None for all.
        dropout: whether there is dropout, in training. backward: whether gradients are wanted.
        paged: a paged cache (continuous batching). varlen: packed sequences with ``cu_seq_lens``.
        output_attentions: whether probabilities are returned. compile: under torch.compile without graph breaks.
        deterministic: the same call twice has to give the same bits, gradients too. Independence of the batch's size is
            not judged.
        density: the share of blocks that sparse attention is expected to keep, where it is allowed.
    """

    q_len: int = 4096
    k_len: int | None = None
    batch: int = 1
    heads: int = 32
    kv_heads: int = 32
    qk_dim: int = 128
    v_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    mask: str = "causal"
    softcap: bool = False
    sinks: bool = False
    position_bias: bool = False
    window: int | None = None
    dropout: bool = False
    backward: bool = False
    paged: bool = False
    varlen: bool = False
    output_attentions: bool = False
    compile: bool = False
    deterministic: bool = False
    density: float = 0.25

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"mask must be one of {MASKS}, got {self.mask!r}")
        for name in ("q_len", "batch", "heads", "kv_heads", "qk_dim", "v_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads {self.kv_heads}, got {self.heads}")
        if self.keys < self.q_len and self.mask in ("causal", "padding"):
            raise ValueError(f"k_len must be at least q_len {self.q_len} under causality, got {self.keys}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.q_len if self.k_len is None else self.k_len

    @property
    def causal(self) -> bool:
        """Whether a query sees no later keys."""
        return self.mask in ("causal", "padding")

    @property
    def windowed(self) -> bool:
        """Whether the window hides any key."""
        return self.window is not None and self.window < self.keys

    @property
    def needs_mask(self) -> str | None:
        """Why SDPA has to be given a mask of tokens, None when ``is_causal`` says all."""
        if self.mask not in ("causal", "none"):
            return f"a {self.mask} mask"
        if self.windowed:
            return "a sliding window"
        if self.varlen:
            return "packed sequences"
        if self.position_bias:
            return "a position bias"
        if self.causal and 1 < self.q_len < self.keys:
            return "a chunk at the end of a longer prompt (SDPA's is_causal aligns to the upper left)"
        return None


@dataclass(frozen=True)
class Vetoes:
    """What a model's class says of itself; empty for a config alone.

    Attributes:
        owner: name of the class, "" when only a config is known.
        sdpa, flash, interface: its ``_supports_sdpa``, ``_supports_flash_attn``, ``_supports_attention_backend``.
        compatible: its ``_compatible_flash_implementations``.
    """

    owner: str = ""
    sdpa: bool = True
    flash: bool = True
    interface: bool = True
    compatible: tuple[str, ...] | None = None


def features_of(config: Any) -> dict[str, Any]:
    """The features that a model's config (of transformers, or like it) tells; a ValueError when it tells no heads."""
    config = getattr(config, "text_config", None) or config
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None)
    if not isinstance(heads, int):
        raise ValueError(f"config must tell num_attention_heads, and {type(config).__name__} does not")
    hidden = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None)
    size = getattr(config, "head_dim", None) or (hidden // heads if isinstance(hidden, int) else 128)
    rotated, plain = (getattr(config, f"qk_{part}_head_dim", None) for part in ("rope", "nope"))
    qk_dim = rotated + plain if rotated and plain is not None else size
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    windowed = getattr(config, "use_sliding_window", True) is not False
    window = getattr(config, "sliding_window", None) if windowed else None
    kind = str(getattr(config, "model_type", ""))
    return {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "qk_dim": qk_dim,
        "v_dim": getattr(config, "v_head_dim", None) or (qk_dim if not rotated else size),
        "softcap": getattr(config, "attn_logit_softcapping", None) is not None,
        "sinks": kind in _SINKS,
        "position_bias": getattr(config, "relative_attention_num_buckets", None) is not None,
        "window": window,
        **({"dtype": dtype} if isinstance(dtype, torch.dtype) else {}),
        **({"mask": "full"} if getattr(config, "attention_chunk_size", None) else {}),
    }


# Models of transformers 5.23 whose attention has learned sinks (`s_aux`).
_SINKS = frozenset(
    {
        "gpt_oss",
        "deepseek_v4",
        "mimo_v2_flash",
        "hy_v4",
        "granite_swa",
        "granitemoe_swa",
        "flint",
        "openai_privacy_filter",
    }
)


def vetoes_of(model: Any) -> Vetoes:
    """What the class of a model says of itself; a config says nothing."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "_supports_sdpa"):
        return Vetoes()
    flash = (getattr(model, name, None) for name in ("_supports_flash_attn", "_supports_flash_attn_2"))
    compatible = getattr(model, "_compatible_flash_implementations", None)
    return Vetoes(
        type(model).__name__,
        bool(model._supports_sdpa),
        any(flash),
        bool(getattr(model, "_supports_attention_backend", True)),
        None if compatible is None else tuple(compatible),
    )


def of_weights(model: torch.nn.Module) -> dict[str, Any]:
    """What the weights tell better than the config: the dtype, and learned sinks."""
    found: dict[str, Any] = {}
    kinds = [p.dtype for p in model.parameters() if p.dtype.is_floating_point]
    if kinds:
        found["dtype"] = max(set(kinds), key=kinds.count)
    if any(name.rsplit(".", 1)[-1] in ("sinks", "sink", "attention_sink_bias") for name, _ in model.named_parameters()):
        found["sinks"] = True
    return found
