"""Tiny random checkpoints of every family, saved by Hugging Face transformers, and what transformers makes of them.

Weights are drawn with a spread that makes the softmax peaked, so that windows, soft-caps and biases matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 8.0],
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_hidden_layers": 3,
}
_LATENT_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Tiny:
    """A configuration class of transformers with its arguments, and the mesh beyond tp=1 to test on."""

    config: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    mesh: str = "tp=4"

    def hf_config(self) -> Any:
        base = {} if "n_embd" in self.kwargs else _BASE
        return getattr(transformers, self.config)(**{**base, **self.kwargs})

    @property
    def architecture(self) -> str:
        """The name that the configuration's `architectures` will have."""
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[getattr(transformers, self.config).model_type]


FAMILIES: dict[str, Tiny] = {
    "llama": Tiny(
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "llama_biases": Tiny("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": Tiny("MistralConfig", {"sliding_window": 11, "head_dim": 32}),
    "qwen2": Tiny(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1,
                        "tie_word_embeddings": True}
    ),
    "qwen3": Tiny("Qwen3Config", {"head_dim": 32, "attention_bias": True}, mesh="tp=2"),
    "gemma": Tiny("GemmaConfig", {"head_dim": 32, "tie_word_embeddings": True}, mesh="tp=2"),
    "gemma2": Tiny(
        "Gemma2Config",
        {"head_dim": 32, "sliding_window": 9, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
             "final_logit_softcapping": 3.0, "tie_word_embeddings": True, "num_hidden_layers": 3,
             "attention_bias": True},
    ),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 20, "tie_word_embeddings": True,
             "num_hidden_layers": 4,
             "sliding_window_pattern": 3,
             "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                                  "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        mesh="tp=2",
    ),
    "phi3": Tiny("Phi3Config", {"sliding_window": 12}),
    "phi3_short": Tiny("Phi3Config", {"original_max_position_embeddings": 100, "rope_parameters": _LONGROPE}),
    "phi3_long": Tiny("Phi3Config", {"original_max_position_embeddings": 1,
                                     "rope_parameters": _LONGROPE | {"attention_factor": 1.2}}),
    "olmo2": Tiny("Olmo2Config"),
    "olmo3": Tiny(
        "Olmo3Config",
        {"sliding_window": 7, "num_hidden_layers": 4,
             "rope_parameters": {"full_attention": _YARN, "sliding_attention": {"rope_type": "default",
                                                                                "rope_theta": 10000.0}}},
    ),
    "smollm3": Tiny(
        "SmolLM3Config",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 9,
             "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite": Tiny(
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.5,
             "attention_bias": True, "mlp_bias": True},
    ),
    "granite_moe": Tiny(
        "GraniteMoeConfig",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.5,
             "num_local_experts": 4, "num_experts_per_tok": 2},
        mesh="ep=2,tp=2",
    ),
    "cohere": Tiny("CohereConfig", {"use_qk_norm": True, "logit_scale": 0.5, "tie_word_embeddings": True}),
    "cohere2": Tiny(
        "Cohere2Config",
        {"sliding_window": 9, "num_hidden_layers": 4, "logit_scale": 0.5, "tie_word_embeddings": True,
             "attention_bias": True},
        mesh="tp=2",
    ),
    "glm": Tiny("GlmConfig", {"head_dim": 16}, mesh="tp=2"),
    "glm4": Tiny("Glm4Config", {"head_dim": 16}),
    "glm4_moe": Tiny(
        "Glm4MoeConfig",
        dict(**_LATENT_EXPERTS, head_dim=32, use_qk_norm=True, attention_bias=True, n_group=4, topk_group=2,
             routed_scaling_factor=1.5),
        mesh="ep=4,tp=2",
    ),
    "gpt2": Tiny(
        "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
        mesh="tp=2",
    ),
    "gpt2_by_layer": Tiny(
        "GPT2Config",
        {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96,
             "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    ),
    "mixtral": Tiny(
        "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 13}, mesh="ep=2,tp=2"
    ),
    "qwen2_moe": Tiny(
        "Qwen2MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "decoder_sparse_step": 2,
             "shared_expert_intermediate_size": 40, "norm_topk_prob": True, "num_hidden_layers": 4,
             "use_sliding_window": True, "sliding_window": 10, "mlp_only_layers": [1]},
        mesh="ep=4,tp=2",
    ),
    "qwen3_moe": Tiny(
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
             "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1],
             "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        mesh="ep=4,tp=2",
    ),
    "deepseek_v2": Tiny(
        "DeepseekV2Config",
        dict(**_LATENT, **_LATENT_EXPERTS, q_lora_rank=None, topk_method="group_limited_greedy", n_group=4,
             topk_group=2, routed_scaling_factor=1.5, rope_parameters=dict(_YARN, mscale=0.707, mscale_all_dim=0.707)),
        mesh="ep=2,tp=2",
    ),
    "deepseek_v3": Tiny(
        "DeepseekV3Config",
        dict(**_LATENT, **_LATENT_EXPERTS, q_lora_rank=20, n_group=4, topk_group=2, norm_topk_prob=True,
             routed_scaling_factor=2.5, rope_parameters=dict(_YARN, mscale=1.0, mscale_all_dim=1.0)),
        mesh="ep=4,tp=2",
    ),
    "gpt_oss": Tiny(
        "GptOssConfig",
        {"head_dim": 32, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
             "rope_parameters": dict(_YARN, truncate=False)},
        mesh="ep=2,tp=4",
    ),
}  # fmt: skip
LONGEST_WINDOW = 13


def save_tiny(name: str, folder: Path) -> Any:
    """Save the family's tiny model to `folder` and return it."""
    torch.manual_seed(0)
    config = FAMILIES[name].hf_config()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key or "embed_scale" in key:
                continue
            spread = 0.3 if "correction" in key else 0.4 if value.ndim == 1 else 0.15
            value.add_(torch.randn_like(value) * spread)
    model.save_pretrained(folder)
    return model


def reference(model: Any, prompts: list[list[int]], num_tokens: int) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits of every position of each prompt, and greedy continuations, as transformers computes them."""
    logits, tokens = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits.append(model(ids).logits[0].numpy())
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, min_new_tokens=num_tokens,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        tokens.append(out[0, len(prompt) :].tolist())
    return logits, tokens
