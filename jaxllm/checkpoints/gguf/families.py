"""The architectures of GGUF files in Hugging Face terms: names of configuration and tensors, one `Family` each.

To add an architecture, add its entry to `FAMILIES`; `gguf_config.py` reads the same entry for the config. Names and
layouts are those of llama.cpp's converter. Knows nothing of files or how tensors are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.checkpoints.gguf.experts import (
    DEEPSEEK2,
    DEEPSEEK3,
    GLM4_MOE,
    GPT_OSS,
    GRANITE_MOE,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
)
from jaxllm.checkpoints.gguf.family import (
    ATTENTION,
    ATTENTION_BIAS,
    GEMMA,
    LLAMA,
    LLAMA_BIASES,
    NO_WINDOW,
    POST_NORMS,
    QK_NORM,
    UNROTATED,
    WINDOW_PATTERN,
    Family,
    Values,
    windowed_layers,
)
from jaxllm.checkpoints.gguf.granite import GRANITE
from jaxllm.checkpoints.gguf.rules import plain, transposed


def _gemma2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """The file does not say what scores are scaled by; only the 27B (46 layers) differs from its head width."""
    scalar = _per_head(config) if config["num_hidden_layers"] == 46 else config["head_dim"]
    return {"query_pre_attn_scalar": scalar, **windowed_layers(values, config, 2)}


def _gemma3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """As Gemma 2's (the 27B has 62 layers). A file without a window has none in any layer."""
    scalar = _per_head(config) if config["num_hidden_layers"] == 62 else config["head_dim"]
    return {"query_pre_attn_scalar": scalar, **windowed_layers(values, config, 6 if config["sliding_window"] else 1)}


def _per_head(config: Mapping[str, Any]) -> int:
    return config["hidden_size"] // config["num_attention_heads"]


def _phi3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """Phi-4 writes a window of 0: none. The length that factors begin at stands outside the rotary parameters."""
    original = values.get("rope.scaling.original_context_length") or config["max_position_embeddings"]
    return {"sliding_window": config.get("sliding_window") or None, "original_max_position_embeddings": original}


def _every_fourth_is_full(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return windowed_layers(values, config, 4)


def _smollm3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    """Every fourth layer turns nothing; the file does not say so."""
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]}


_llama = Family(architecture="LlamaForCausalLM", model_type="llama", rules=LLAMA | UNROTATED, biases=LLAMA_BIASES)
_GLM: dict[str, Any] = {
    "biases": {"attention_bias": (("attn_q", "attn_qkv"), ATTENTION[:3])},
    "has_partial_rotary": True,
}
# One norm feeds both halves of a block.
_COHERE: dict[str, Any] = {
    "rules": {stem: rule for stem, rule in (LLAMA | QK_NORM).items() if stem != "ffn_norm"},
    "epsilon": "attention.layer_norm_epsilon",
    "rename": {"rms_norm_eps": "layer_norm_eps"},
    "biases": ATTENTION_BIAS,
}
_olmo2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    rules=LLAMA | QK_NORM | {name: rule for name, rule in POST_NORMS.items() if name != "ffn_norm"},
    biases=ATTENTION_BIAS,
)
FAMILIES: dict[str, Family] = {
    "llama": _llama,
    "qwen2": Family(architecture="Qwen2ForCausalLM", model_type="qwen2", rules=LLAMA, constants=NO_WINDOW),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        rules=LLAMA | QK_NORM,
        constants=NO_WINDOW,
        biases=ATTENTION_BIAS,
    ),
    "qwen2moe": QWEN2_MOE,
    "qwen3moe": QWEN3_MOE,
    "gemma": Family(architecture="GemmaForCausalLM", model_type="gemma", rules=LLAMA, constants=GEMMA, norm_offset=1.0),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        rules=LLAMA | POST_NORMS,
        constants=GEMMA,
        keys={
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        defaults={"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        more=_gemma2,
        reads=frozenset({WINDOW_PATTERN}),
        norm_offset=1.0,
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        rules=LLAMA | QK_NORM | POST_NORMS,
        constants=GEMMA,
        keys={
            "attention.sliding_window": "sliding_window",
            "rope.freq_base_swa": "rope_local_base_freq",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        defaults={"sliding_window": None, "rope_local_base_freq": 10000.0, "final_logit_softcapping": None},
        more=_gemma3,
        reads=frozenset({WINDOW_PATTERN}),
        norm_offset=1.0,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        rules=LLAMA | {"attn_qkv": plain("self_attn.qkv_proj"), "ffn_up": plain("mlp.gate_up_proj")},
        keys={"attention.sliding_window": "sliding_window"},
        defaults={"sliding_window": None},
        more=_phi3,
        has_partial_rotary=True,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        rules={
            "attn_norm": plain("ln_1"),
            "attn_qkv": transposed("attn.c_attn"),
            "attn_output": transposed("attn.c_proj"),
            "ffn_norm": plain("ln_2"),
            "ffn_up": transposed("mlp.c_fc"),
            "ffn_down": transposed("mlp.c_proj"),
        },
        constants={"activation_function": "gelu_new"},
        epsilon="attention.layer_norm_epsilon",
        rename={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "rms_norm_eps": "layer_norm_epsilon",
            **dict.fromkeys(("num_key_value_heads", "head_dim", "rope_theta", "hidden_act")),
        },
        layer="transformer.h",
        tops={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
    ),
    "olmo2": _olmo2,
    "deepseek2": DEEPSEEK2,
    "gpt-oss": GPT_OSS,
    "smollm3": replace(_llama, architecture="SmolLM3ForCausalLM", model_type="smollm3", more=_smollm3),
    "granite": GRANITE,
    "granitemoe": GRANITE_MOE,
    "glm4moe": GLM4_MOE,
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        model_type="glm4",
        rules=LLAMA
        | {
            "post_attention_norm": plain("post_self_attn_layernorm"),
            "post_ffw_norm": plain("post_mlp_layernorm"),
            "ffn_up": plain("mlp.gate_up_proj"),
        },
        **_GLM,
    ),
    "chatglm": Family(
        architecture="GlmForCausalLM",
        model_type="glm",
        rules=LLAMA | {"ffn_up": plain("mlp.gate_up_proj")},
        **_GLM,
    ),
    "command-r": Family(
        architecture="CohereForCausalLM",
        model_type="cohere",
        keys={"logit_scale": "logit_scale"},
        flags={"use_qk_norm": "attn_q_norm.weight"},
        **_COHERE,
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        model_type="cohere2",
        keys={"logit_scale": "logit_scale", "attention.sliding_window": "sliding_window"},
        more=_every_fourth_is_full,
        reads=frozenset({WINDOW_PATTERN}),
        **_COHERE,
    ),
}
# The same architecture with experts, a window or a correction of the router's choice is another class there.
WITH_EXPERTS = {"llama": MIXTRAL}
WITH_WINDOW = {
    "olmo2": replace(
        _olmo2,
        architecture="Olmo3ForCausalLM",
        model_type="olmo3",
        keys={"attention.sliding_window": "sliding_window"},
        more=_every_fourth_is_full,
        reads=frozenset({WINDOW_PATTERN, "rope.freq_base_swa"}),
        nests_rope=True,
    )
}
WITH_CORRECTION = {"deepseek2": DEEPSEEK3}
