"""Tiny random models of transformers, one row each, whose weights are large enough for every fault to show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

WINDOW = 96  # more than a block of 64, so that windowed layers have blocks to drop
COMMON: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
ROUTED = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_group=1, topk_group=1,
    first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
FIRST_SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12
)  # fmt: skip
LLAMA_4 = dict(
    head_dim=16, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=192,
    no_rope_layers=[1, 0], moe_layers=[1],
)  # fmt: skip
HYBRID = dict(
    head_dim=16, shared_expert_intermediate_size=48, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """One model: its classes in transformers, what its config has beside COMMON, and what is expected of it.

    Attributes:
        config, model: names of the classes.
        changes: of the config.
        layers: attention layers that are made sparse.
        dense: why all its calls run dense; "" for a model that runs sparse.
        dense_when: why some layers run dense, by case ("left padding", ...).
        without: cases that transformers does not have for this model.
    """

    config: str
    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    dense: str = ""
    dense_when: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


CHUNKED = "chunked attention of padded, batched or cached tokens"
MODELS = {
    "Llama": Tiny("LlamaConfig", "LlamaForCausalLM"),
    "Qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM"),
    "Qwen2 SWA": Tiny(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    ),
    "Qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=32)),
    "Qwen3-MoE": Tiny("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(head_dim=32, **MOE)),
    "Mistral": Tiny("MistralConfig", "MistralForCausalLM", dict(sliding_window=WINDOW)),
    "Gemma 2": Tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW, attn_logit_softcapping=5.0),
        dense="the attention was called with softcap",
    ),
    "Gemma 3": Tiny(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW) | FIRST_SLIDING,
    ),
    "Phi-3": Tiny("Phi3Config", "Phi3ForCausalLM", dict(sliding_window=WINDOW)),
    "GLM-4": Tiny("Glm4Config", "Glm4ForCausalLM", dict(head_dim=16)),
    "OLMo 3": Tiny("Olmo3Config", "Olmo3ForCausalLM", dict(sliding_window=WINDOW) | FIRST_SLIDING),
    "Granite": Tiny("GraniteConfig", "GraniteForCausalLM", dict(attention_multiplier=0.05)),
    "SmolLM3": Tiny("SmolLM3Config", "SmolLM3ForCausalLM", dict(no_rope_layers=[1, 0])),
    "DeepSeek-V3": Tiny(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        LATENT | ROUTED,
    ),
    "GPT-OSS": Tiny(
        "GptOssConfig",
        "GptOssForCausalLM",
        dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW) | FIRST_SLIDING,
    ),
    "Llama 4": Tiny(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        LLAMA_4,
        dense_when={"left padding": CHUNKED, "chunked prefill": CHUNKED, "beams": CHUNKED},
    ),
    "Qwen3-Next": Tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        HYBRID | MOE,
        layers=1,
        without=("prompt lookup",),
    ),
    "Qwen2.5-VL": Tiny("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
}


def make(name: str, attention: str | dict[str, str] | None = "eager", **changes: Any) -> Any:
    """A model in eval mode; the same weights every time, of std 0.25 (attention sinks: 1).

    Keyword arguments change its config further.
    """
    row = MODELS[name]
    kind = getattr(transformers, row.config)
    config = _vision_language(kind) if name == "Qwen2.5-VL" else kind(**(COMMON | row.changes | changes))
    torch.manual_seed(0)
    if attention is not None:
        config._attn_implementation = attention
    model = getattr(transformers, row.model)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 or path.endswith("sinks"):
                parameter.normal_(std=1.0 if path.endswith("sinks") else 0.25)
    return model


def _vision_language(kind: Any) -> Any:
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=1, window_size=16, fullatt_block_indexes=[1], in_chans=3,
    )  # fmt: skip
    tokens = dict(image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123)
    return kind(text_config=COMMON | dict(rope_parameters=rope), vision_config=vision, **tokens)
