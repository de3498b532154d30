"""gpt-oss: sinks, biases, every other layer windowed, experts with a clamped gate. MXFP4 files are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ClampedSwiglu, ModelConfig, RoutedExperts
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import Heads, Part, Source, WeightMap, whole

# transformers' own rope parameters, for a file without any.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face gpt-oss configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    bias = fields.flag("attention_bias", True)
    experts = RoutedExperts(
        num_experts=fields.size("num_local_experts"),
        per_token=fields.size("num_experts_per_tok"),
        ffn_size=sizes["intermediate_size"],
        score="softmax_chosen",
        bias=True,
    )
    cfg = ModelConfig(
        **sizes,
        **fields.rope(150_000.0, default=_ROPE),
        local=fields.local(sizes["num_layers"], range(0, sizes["num_layers"], 2)),
        qkv_bias=bias,
        out_bias=bias,
        attention_sinks=True,
        clamped_swiglu=ClampedSwiglu(
            alpha=float(fields.number("swiglu_alpha", 1.702)), limit=fields.positive("swiglu_limit", 7.0)
        ),
        experts=experts,
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with all experts in one tensor, gate and up alternating in its last dim."""
    assert cfg.experts is not None
    e, d, f = cfg.experts.num_experts, cfg.hidden_size, cfg.experts.ffn_size
    (k, g), result = Heads.of(cfg, copies).grouped, llama.tables(cfg)
    for i in range(cfg.num_layers):
        prefix, path = f"model.layers.{i}", ("layers", i)
        mlp = f"{prefix}.mlp"
        sinks = Part(name=f"{prefix}.self_attn.sinks", shape=(k * g,), view=(k, g), order=(0, 1), start=(0, 0))
        both = Part(
            name=f"{mlp}.experts.gate_up_proj",
            shape=(e, d, 2 * f),
            view=(e, d, f, 2),
            order=(0, 1, 3, 2),
            start=(0, 0, 0, 0),
        )
        both_bias = Part(
            name=f"{mlp}.experts.gate_up_proj_bias", shape=(e, 2 * f), view=(e, f, 2), order=(0, 2, 1), start=(0, 0, 0)
        )
        result |= {
            (*path, "attention_norm", "scale"): whole(f"{prefix}.input_layernorm.weight", d),
            (*path, "ffn_norm", "scale"): whole(f"{prefix}.post_attention_layernorm.weight", d),
            **llama.attention(cfg, i, copies),
            (*path, "attention", "sinks"): Source((sinks,)),
            (*path, "ffn", "router"): weights.transposed(f"{mlp}.router.weight", e, d),
            (*path, "ffn", "router_bias"): whole(f"{mlp}.router.bias", e),
            (*path, "ffn", "gate_up"): Source((both,)),
            (*path, "ffn", "gate_up_bias"): Source((both_bias,)),
            (*path, "ffn", "down"): whole(f"{mlp}.experts.down_proj", e, f, d),
            (*path, "ffn", "down_bias"): whole(f"{mlp}.experts.down_proj_bias", e, d),
        }
    return result


FAMILY = Family("gpt_oss", config, weight_map)
