"""Tiny random models of every architecture that GGUF knows, as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

BASE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
}  # fmt: skip
FACTORS = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]


@dataclass(frozen=True)
class Model:
    """A configuration class of transformers, its GGUF name, and what its own converter adds to the metadata."""

    config: str
    arch: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    more: Callable[[gguf.GGUFWriter], object] | None = None


def granite(w: gguf.GGUFWriter) -> None:
    w.add_attention_scale(0.2)
    w.add_embedding_scale(3.0)
    w.add_residual_scale(0.4)
    w.add_logit_scale(2.5)


def glm4_moe(w: gguf.GGUFWriter) -> None:
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_leading_dense_block_count(1)
    w.add_expert_shared_count(2)
    w.add_expert_weights_scale(1.5)
    w.add_expert_weights_norm(True)


def gemma2(w: gguf.GGUFWriter) -> None:
    w.add_attn_logit_softcapping(5.0)
    w.add_final_logit_softcapping(3.0)


MODELS = {
    "llama": Model("LlamaConfig", "llama", {"head_dim": 32}),
    "llama_biased": Model("LlamaConfig", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_yarn": Model("LlamaConfig", "llama", {"rope_parameters": YARN}),
    "mixtral": Model("MixtralConfig", "llama", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Model("Qwen2Config", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": Model("Qwen3Config", "qwen3", {"head_dim": 32}),
    "qwen2_moe": Model(
        "Qwen2MoeConfig", "qwen2moe", MOE | {"shared_expert_intermediate_size": 40},
        lambda w: w.add_expert_shared_feed_forward_length(40),
    ),
    "qwen3_moe": Model("Qwen3MoeConfig", "qwen3moe", MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "gemma": Model("GemmaConfig", "gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": Model(
        "Gemma2Config", "gemma2",
        {"head_dim": 32, "sliding_window": 9, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0, "tie_word_embeddings": True, "num_hidden_layers": 3},
        gemma2,
    ),
    "gemma3": Model(
        "Gemma3TextConfig", "gemma3",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
         "num_hidden_layers": 7,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
    ),
    "phi3": Model("Phi3Config", "phi3", {"sliding_window": 12}),
    "phi3_long": Model(
        "Phi3Config", "phi3",
        {"original_max_position_embeddings": 16,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": FACTORS,
                             "long_factor": [4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5], "attention_factor": 1.25}},
    ),
    "gpt2": Model("GPT2Config", "gpt2", {"n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "olmo2": Model("Olmo2Config", "olmo2"),
    "olmo3": Model(
        "Olmo3Config", "olmo2",
        {"sliding_window": 7, "num_hidden_layers": 4,
         "rope_parameters": {"full_attention": YARN,
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        lambda w: w.add_sliding_window_pattern([True, True, True, False]),
    ),
    "smollm3": Model("SmolLM3Config", "smollm3", {"num_hidden_layers": 4}),
    "granite": Model(
        "GraniteConfig", "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.5},
        granite,
    ),
    "granite_biased": Model(
        "GraniteConfig", "granite", {"attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.25}
    ),
    "granite_moe": Model(
        "GraniteMoeConfig", "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
         "attention_multiplier": 0.2, "logits_scaling": 2.5},
        granite,
    ),
    "glm": Model("GlmConfig", "chatglm", {"head_dim": 16}),
    "cohere": Model(
        "CohereConfig", "command-r", {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True},
        lambda w: w.add_logit_scale(0.25),
    ),
    "cohere2": Model(
        "Cohere2Config", "cohere2",
        {"logit_scale": 0.25, "sliding_window": 7, "num_hidden_layers": 5, "tie_word_embeddings": True},
        lambda w: w.add_logit_scale(0.25),
    ),
    "glm4": Model("Glm4Config", "glm4", {"head_dim": 16}),
    "glm4_moe": Model(
        "Glm4MoeConfig", "glm4moe",
        {"head_dim": 16, "use_qk_norm": True, "attention_bias": True, "moe_intermediate_size": 32,
         "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "routed_scaling_factor": 1.5},
        glm4_moe,
    ),
    "deepseek_v2": Model(
        "DeepseekV2Config", "deepseek2",
        LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5,
                  "rope_parameters": dict(YARN, mscale=0.707, mscale_all_dim=0.707)},
    ),
    "deepseek_v3": Model(
        "DeepseekV3Config", "deepseek2",
        LATENT | {"q_lora_rank": 20, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
                  "rope_parameters": dict(YARN, mscale=1.0, mscale_all_dim=1.0)},
        lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
    ),
    "gpt_oss": Model(
        "GptOssConfig", "gpt-oss",
        {"head_dim": 32, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "rope_parameters": dict(YARN, truncate=False)},
        lambda w: w.add_expert_feed_forward_length(96),
    ),
}  # fmt: skip


def save_model(name: str, folder: Path) -> Any:
    """Save the model to `folder` and return it."""
    import torch
    import transformers

    kwargs = MODELS[name].kwargs
    base = {"vocab_size": 96} if "n_embd" in kwargs else BASE
    config = getattr(transformers, MODELS[name].config)(**{**base, **kwargs})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in key and "embed_scale" not in key:
                value.add_(torch.randn_like(value) * (0.4 if value.ndim == 1 else 0.15))
    model.save_pretrained(folder)
    return model
