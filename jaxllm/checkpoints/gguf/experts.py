"""GGUF architectures with a mixture of experts, in Hugging Face terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf.family import (
    ATTENTION,
    ATTENTION_BIAS,
    LLAMA,
    NO_WINDOW,
    QK_NORM,
    UNROTATED,
    WINDOW_PATTERN,
    Family,
    Values,
    windowed_layers,
)
from jaxllm.checkpoints.gguf.granite import GRANITE
from jaxllm.checkpoints.gguf.rules import (
    Rule,
    experts,
    experts_interleaved,
    experts_stacked,
    experts_transposed,
    experts_with_gate_above,
    joined,
    keys_and_values,
    named,
    one_row,
    plain,
)


def _expert_rules(names: Mapping[str, str], count: str) -> dict[str, Rule]:
    """`ffn_gate_exps`, `ffn_up_exps` and `ffn_down_exps`, or the first two in one."""
    both = experts_with_gate_above(names["gate"], names["up"], count)
    return {f"ffn_{part}_exps": experts(name, count) for part, name in names.items()} | {"ffn_gate_up_exps": both}


_QWEN_EXPERTS = _expert_rules(
    {part: "mlp.experts.{}." + f"{part}_proj" for part in ("gate", "up", "down")}, "num_experts"
)
_QWEN_MOE_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
}


def _mixtral_names() -> dict[str, str]:
    return {part: "block_sparse_moe.experts.{}." + w for part, w in {"gate": "w1", "down": "w2", "up": "w3"}.items()}


def _qwen2_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """Files of 2024 leave sizes out that llama.cpp then works out like this."""
    shared = config["shared_expert_intermediate_size"] or config["intermediate_size"]
    return {**_qwen3_moe(values, config), "shared_expert_intermediate_size": shared}


def _qwen3_moe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    size = config["moe_intermediate_size"] or config["intermediate_size"] // config["num_experts_per_tok"]
    return {"moe_intermediate_size": size}


def _gpt_oss(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """Only experts have a width; what the other key says counts where there is no key of their own."""
    size = values.get("expert_feed_forward_length") or config["intermediate_size"]
    return {"intermediate_size": size, **windowed_layers(values, config, 2)}


def _deepseek(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """Widths of a head: of today's files, and of those before keys and values were stored compressed."""
    width = values.get("attention.key_length_mla") or values.get("attention.key_length")
    value_width = values.get("attention.value_length_mla") or values.get("attention.value_length")
    rope = values.get("rope.dimension_count")
    if not all(isinstance(size, int) for size in (width, value_width, rope)) or not 0 < rope < width:  # type: ignore
        raise CheckpointError(f"attention.key_length_mla={width}, rope.dimension_count={rope} are not widths of a head")
    groups = config.get("n_group") or 1
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "qk_nope_head_dim": width - rope,  # type: ignore[operator]
        "qk_rope_head_dim": rope,
        "v_head_dim": value_width,
        "head_dim": rope,
        "n_group": groups,
        "topk_group": config.get("topk_group") or 1,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
    }


def _deepseek3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return _deepseek(values, config) | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    rules=LLAMA
    | UNROTATED
    | {"ffn_gate_inp": plain("block_sparse_moe.gate")}
    | _expert_rules(_mixtral_names(), "num_local_experts"),
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    expert_names=_mixtral_names(),
)
DEEPSEEK2 = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    rules=LLAMA
    | {
        "attn_q_a": plain("self_attn.q_a_proj"),
        "attn_q_a_norm": plain("self_attn.q_a_layernorm"),
        "attn_q_b": plain("self_attn.q_b_proj"),
        "attn_kv_a_mqa": plain("self_attn.kv_a_proj_with_mqa"),
        "attn_kv_a_norm": plain("self_attn.kv_a_layernorm"),
        "attn_kv_b": plain("self_attn.kv_b_proj"),
        "attn_k_b": keys_and_values("self_attn.kv_b_proj", "attn_k_b", "attn_v_b"),
        "attn_v_b": joined("attn_k_b"),
        "ffn_gate_inp": plain("mlp.gate"),
        "exp_probs_b": named("mlp.gate.e_score_correction_bias", "bias"),
        **{f"ffn_{part}_shexp": plain(f"mlp.shared_experts.{part}_proj") for part in ("gate", "up", "down")},
    }
    | _expert_rules({part: "mlp.experts.{}." + f"{part}_proj" for part in ("gate", "up", "down")}, "n_routed_experts"),
    keys={
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "leading_dense_block_count": "first_k_dense_replace",
    },
    defaults={
        "q_lora_rank": None,
        "n_shared_experts": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "n_group": None,
        "topk_group": None,
        "first_k_dense_replace": 0,
    },
    more=_deepseek,
    reads=frozenset(
        {
            "attention.key_length",
            "attention.value_length",
            "attention.key_length_mla",
            "attention.value_length_mla",
            "rope.dimension_count",
            "expert_gating_func",
        }
    ),
)

DEEPSEEK3 = replace(DEEPSEEK2, architecture="DeepseekV3ForCausalLM", model_type="deepseek_v3", more=_deepseek3)
GLM4_MOE = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    rules=LLAMA
    | QK_NORM
    | {"post_attention_norm": plain("post_attention_layernorm")}
    | {stem: rule for stem, rule in DEEPSEEK2.rules.items() if stem.endswith(("exps", "shexp", "_inp", "_probs_b"))},
    keys={key: name for key, name in DEEPSEEK2.keys.items() if "lora" not in key},
    defaults={
        "n_shared_experts": 0,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    },
    biases={"attention_bias": (("attn_q", "attn_qkv"), ATTENTION[:3])},
    flags={"use_qk_norm": "attn_q_norm.weight"},
    reads=frozenset({"expert_gating_func"}),
    has_partial_rotary=True,
)
QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    rules=LLAMA
    | {"ffn_gate_inp": plain("mlp.gate"), "ffn_gate_inp_shexp": one_row("mlp.shared_expert_gate")}
    | {f"ffn_{part}_shexp": plain(f"mlp.shared_expert.{part}_proj") for part in ("gate", "up", "down")}
    | _QWEN_EXPERTS,
    keys=_QWEN_MOE_KEYS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    defaults={"moe_intermediate_size": None, "shared_expert_intermediate_size": None, "norm_topk_prob": False},
    constants=NO_WINDOW | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    more=_qwen2_moe,
    reads=frozenset({"expert_shared_count"}),
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    rules=LLAMA | QK_NORM | {"ffn_gate_inp": plain("mlp.gate")} | _QWEN_EXPERTS,
    keys=_QWEN_MOE_KEYS,
    defaults={"moe_intermediate_size": None, "norm_topk_prob": True},
    constants=NO_WINDOW | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    more=_qwen3_moe,
    biases=ATTENTION_BIAS,
)
GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    rules=LLAMA
    | {
        "post_attention_norm": plain("post_attention_layernorm"),
        "attn_sinks": named("self_attn.sinks", "weight"),
        "ffn_gate_inp": plain("mlp.router"),
        "ffn_gate_exps": experts_interleaved(
            "mlp.experts.gate_up_proj", "num_local_experts", "ffn_gate_exps", "ffn_up_exps"
        ),
        "ffn_up_exps": joined("ffn_gate_exps"),
        "ffn_down_exps": experts_transposed("mlp.experts.down_proj", "num_local_experts"),
    },
    keys={
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    constants={"attention_bias": True},
    more=_gpt_oss,
    reads=frozenset({"expert_feed_forward_length", WINDOW_PATTERN}),
)
GRANITE_MOE = replace(
    GRANITE,
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    rules=LLAMA
    | UNROTATED
    | {
        "ffn_gate_inp": plain("block_sparse_moe.router.layer"),
        "ffn_gate_exps": experts_stacked(
            "block_sparse_moe.input_linear", "num_local_experts", "ffn_gate_exps", "ffn_up_exps"
        ),
        "ffn_up_exps": joined("ffn_gate_exps"),
        "ffn_down_exps": plain("block_sparse_moe.output_linear"),
    },
    keys={
        **GRANITE.keys,
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    biases=ATTENTION_BIAS,
)
