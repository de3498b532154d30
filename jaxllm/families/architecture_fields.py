"""What becomes of each field of the configuration of every supported architecture (see field_rules.py). Pure data."""

from __future__ import annotations

from typing import Any

from jaxllm.families.field_rules import FieldRules

_OFF = (False,)


def _rules(
    config_class: str, model_type: str, computed: str, *, length: int, eps: float = 1e-6, **rest: Any
) -> FieldRules:
    """`rest` as FieldRules, the sets as words of one string. `length` and `eps`: transformers' defaults of the longest
    sequence and of the norms."""
    fields = frozenset(computed.split())
    sets = {name: frozenset(rest.pop(name, "").split()) for name in ("nullable", "undeclared", "harmless")}
    common = {"max_position_embeddings": length, "n_positions": length, "rms_norm_eps": eps, "layer_norm_eps": eps}
    defaults = {name: value for name, value in common.items() if name in fields} | rest.pop("defaults", {})
    return FieldRules(
        config_class=config_class, model_type=model_type, computed=fields, defaults=defaults, **sets, **rest
    )


_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps "
    "max_position_embeddings tie_word_embeddings rope_parameters "
)
_DENSE = _SIZES + "head_dim hidden_act "
_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types "
_COHERE = _SIZES.replace("rms_norm_eps", "layer_norm_eps") + "hidden_act attention_bias logit_scale "
_GEMMA = _SIZES + "head_dim hidden_activation attention_bias query_pre_attn_scalar attn_logit_softcapping "
_GEMMA += "final_logit_softcapping sliding_window layer_types "
_LATENT = _SIZES + "hidden_act kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
_LATENT += "first_k_dense_replace n_group n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size "
_LATENT += "routed_scaling_factor topk_group "
_EXPERTS = "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers "
_ONE_WAY = {"use_bidirectional_attention": _OFF}
# Gemma's files say it twice: the class computes `hidden_activation`, and no other than this one was ever published.
_GELU = {"hidden_act": ("gelu_pytorch_tanh", "gelu")}

_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
_GLM_DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True}

RULES: dict[str, FieldRules] = {
    "LlamaForCausalLM": _rules(
        "LlamaConfig",
        "llama",
        _DENSE + "attention_bias mlp_bias",
        nullable="head_dim num_key_value_heads",
        length=2048,
    ),
    "MistralForCausalLM": _rules(
        "MistralConfig",
        "mistral",
        _DENSE + "sliding_window",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        nullable="head_dim",
        length=131072,
    ),
    "Qwen2ForCausalLM": _rules(
        "Qwen2Config",
        "qwen2",
        _SIZES + "hidden_act " + _WINDOWS,
        undeclared="head_dim",
        foreign={"attention_bias": (True,), "qkv_bias": (True,)},
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        nullable="num_key_value_heads",
        length=32768,
    ),
    "Qwen3ForCausalLM": _rules(
        "Qwen3Config",
        "qwen3",
        _DENSE + _WINDOWS + "attention_bias",
        foreign={"use_qk_norm": (True,)},
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        nullable="num_key_value_heads",
        length=32768,
    ),
    "GemmaForCausalLM": _rules(
        "GemmaConfig",
        "gemma",
        _DENSE + "attention_bias",
        undeclared="hidden_activation",
        neutral=_ONE_WAY,
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
        length=8192,
    ),
    "Gemma2ForCausalLM": _rules(
        "Gemma2Config",
        "gemma2",
        _GEMMA,
        neutral=_ONE_WAY,
        foreign=_GELU,
        defaults=_GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        length=8192,
    ),
    "Gemma3ForCausalLM": _rules(
        "Gemma3TextConfig",
        "gemma3_text",
        _GEMMA,
        undeclared="sliding_window_pattern rope_local_base_freq",
        harmless="_sliding_window_pattern",  # what transformers 5 saves beside layer_types
        neutral=_ONE_WAY,
        foreign=_GELU,
        defaults=_GEMMA_DEFAULTS,
        length=131072,
    ),
    "Phi3ForCausalLM": _rules(
        "Phi3Config",
        "phi3",
        _SIZES + "hidden_act sliding_window original_max_position_embeddings",
        undeclared="head_dim",
        harmless="resid_pdrop embd_pdrop",
        defaults={"original_max_position_embeddings": 4096},
        nullable="num_key_value_heads",
        length=4096,
        eps=1e-05,
    ),
    "Olmo2ForCausalLM": _rules(
        "Olmo2Config",
        "olmo2",
        _SIZES + "hidden_act attention_bias",
        undeclared="head_dim",
        nullable="num_key_value_heads",
        length=2048,
        eps=1e-05,
    ),
    "Olmo3ForCausalLM": _rules(
        "Olmo3Config",
        "olmo3",
        _SIZES + "hidden_act attention_bias sliding_window layer_types",
        undeclared="head_dim",
        defaults={"sliding_window": 4096},
        nullable="num_key_value_heads",
        length=2048,
        eps=1e-05,
    ),
    "GPT2LMHeadModel": _rules(
        "GPT2Config",
        "gpt2",
        "vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon "
        "scale_attn_weights scale_attn_by_inverse_layer_idx tie_word_embeddings",
        harmless="resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation "
        "summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn n_ctx n_special "
        "predict_special_tokens",
        neutral={"add_cross_attention": _OFF},
        defaults={"tie_word_embeddings": True, "scale_attn_weights": True},
        spellings={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        length=1024,
    ),
    "MixtralForCausalLM": _rules(
        "MixtralConfig",
        "mixtral",
        _DENSE + "sliding_window num_local_experts num_experts_per_tok",
        defaults={"num_key_value_heads": 8},
        spellings={"num_experts": "num_local_experts"},
        nullable="head_dim",
        length=131072,
        eps=1e-05,
    ),
    "Qwen2MoeForCausalLM": _rules(
        "Qwen2MoeConfig",
        "qwen2_moe",
        _SIZES + "hidden_act qkv_bias shared_expert_intermediate_size " + _WINDOWS + _EXPERTS,
        undeclared="head_dim",
        defaults={
            "num_key_value_heads": 16,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "qkv_bias": True,
            "shared_expert_intermediate_size": 5632,
        },
        nullable="num_key_value_heads",
        length=32768,
    ),
    "Qwen3MoeForCausalLM": _rules(
        "Qwen3MoeConfig",
        "qwen3_moe",
        _SIZES + "hidden_act attention_bias use_sliding_window sliding_window " + _EXPERTS,
        undeclared="head_dim",
        harmless="max_window_layers",
        foreign={"use_qk_norm": (True,)},
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        spellings={"num_local_experts": "num_experts"},
        length=32768,
    ),
    "DeepseekV2ForCausalLM": _rules(
        "DeepseekV2Config",
        "deepseek_v2",
        _LATENT + "topk_method head_dim",
        undeclared="qk_head_dim",
        neutral={"attention_bias": _OFF, "mlp_bias": _OFF, "norm_topk_prob": _OFF},
        foreign={"scoring_func": ("softmax",)},
        defaults={"q_lora_rank": 1536, "n_shared_experts": 2},
        spellings={"num_experts": "n_routed_experts"},
        nullable="head_dim n_group num_experts_per_tok num_key_value_heads topk_group",
        length=2048,
    ),
    "DeepseekV3ForCausalLM": _rules(
        "DeepseekV3Config",
        "deepseek_v3",
        _LATENT + "norm_topk_prob rope_interleave",
        undeclared="head_dim qk_head_dim",
        neutral={"attention_bias": _OFF},
        foreign={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        defaults={
            "q_lora_rank": 1536,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_interleave": True,
        },
        spellings={"num_local_experts": "n_routed_experts", "num_nextn_predict_layers": "num_mtp_layers"},
        nullable="first_k_dense_replace n_group norm_topk_prob num_experts_per_tok num_key_value_heads rope_interleave "
        "topk_group v_head_dim",
        length=4096,
    ),
    "GptOssForCausalLM": _rules(
        "GptOssConfig",
        "gpt_oss",
        _SIZES
        + "head_dim sliding_window layer_types attention_bias num_local_experts num_experts_per_tok swiglu_alpha "
        "swiglu_limit",
        harmless="initial_context_length experts_per_token",
        neutral={"hidden_act": ("silu",)},
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "attention_bias": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        spellings={"num_experts": "num_local_experts"},
        length=131072,
        eps=1e-05,
    ),
    "SmolLM3ForCausalLM": _rules(
        "SmolLM3Config",
        "smollm3",
        _SIZES + "hidden_act use_sliding_window sliding_window layer_types no_rope_layers no_rope_layer_interval "
        "attention_bias mlp_bias",
        undeclared="head_dim",
        harmless="max_window_layers",
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        nullable="num_key_value_heads",
        length=32768,
    ),
    "GraniteForCausalLM": _rules(
        "GraniteConfig",
        "granite",
        _SIZES + "hidden_act attention_bias mlp_bias embedding_multiplier logits_scaling residual_multiplier "
        "attention_multiplier",
        undeclared="head_dim",
        nullable="num_key_value_heads",
        length=2048,
    ),
    "GlmForCausalLM": _rules(
        "GlmConfig",
        "glm",
        _DENSE + "attention_bias",
        defaults=_GLM_DEFAULTS,
        nullable="head_dim num_key_value_heads",
        length=131072,
        eps=1.5625e-07,
    ),
    "GraniteMoeForCausalLM": _rules(
        "GraniteMoeConfig",
        "granitemoe",
        _SIZES + "hidden_act attention_bias embedding_multiplier logits_scaling residual_multiplier "
        "attention_multiplier num_local_experts num_experts_per_tok",
        undeclared="head_dim",
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
        nullable="attention_multiplier embedding_multiplier logits_scaling residual_multiplier num_experts_per_tok "
        "num_local_experts num_key_value_heads",
        length=2048,
    ),
    "CohereForCausalLM": _rules(
        "CohereConfig",
        "cohere",
        _COHERE + "use_qk_norm",
        undeclared="head_dim",
        defaults={"logit_scale": 0.0625, "tie_word_embeddings": True},
        nullable="layer_norm_eps logit_scale num_key_value_heads use_qk_norm",
        length=8192,
        eps=1e-05,
    ),
    "Cohere2ForCausalLM": _rules(
        "Cohere2Config",
        "cohere2",
        _COHERE + "sliding_window layer_types",
        undeclared="head_dim sliding_window_pattern",
        defaults={"logit_scale": 0.0625, "tie_word_embeddings": True, "sliding_window": 4096},
        nullable="num_key_value_heads",
        length=8192,
        eps=1e-05,
    ),
    "Glm4ForCausalLM": _rules(
        "Glm4Config",
        "glm4",
        _DENSE + "attention_bias",
        defaults=_GLM_DEFAULTS,
        length=131072,
        eps=1.5625e-07,
    ),
    "Glm4MoeForCausalLM": _rules(
        "Glm4MoeConfig",
        "glm4_moe",
        _SIZES
        + "hidden_act attention_bias use_qk_norm first_k_dense_replace n_group n_routed_experts n_shared_experts "
        "num_experts_per_tok moe_intermediate_size routed_scaling_factor topk_group norm_topk_prob",
        undeclared="head_dim",
        foreign={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
        defaults={
            "num_key_value_heads": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        spellings={"num_local_experts": "n_routed_experts", "num_nextn_predict_layers": "num_mtp_layers"},
        length=131072,
        eps=1e-05,
    ),
}
