"""DeepSeek-V2 and V3: multi-head latent attention; shared and routed experts chosen group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import LatentAttention, ModelConfig, RoutedExperts
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields, positive
from jaxllm.families.qwen3_moe import experts
from jaxllm.families.registry import Family
from jaxllm.families.rope import yarn_magnitude
from jaxllm.families.sources import Part, Source, WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face DeepSeek configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    is_v3 = fields.architecture == "DeepseekV3ForCausalLM"
    latent = LatentAttention(
        q_rank=None if fields.get("q_lora_rank") is None else fields.size("q_lora_rank"),
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        value_dim=fields.size("v_head_dim"),
    )
    width = latent.nope_dim + latent.rope_dim
    fields.only("qk_head_dim", width)
    fields.only("head_dim", latent.rope_dim, width)
    sizes = fields.sizes() | {"head_dim": width}
    fields.only("num_key_value_heads", sizes["num_heads"])  # all heads share one compressed row
    sizes["num_kv_heads"] = sizes["num_heads"]
    cfg = ModelConfig(
        **sizes,
        **fields.rope(),
        activation=fields.activation(),
        attention_scale=width**-0.5 * _magnitude(fields) ** 2,
        latent=latent,
        rope_interleaved=fields.flag("rope_interleave", True) if is_v3 else True,
        experts=routed_experts(fields, sizes, is_v3),
    )
    fields.done()
    return cfg


def _magnitude(fields: Fields) -> float:
    """YaRN grows the scores themselves here, by `mscale_all_dim`, once for queries and once for keys."""
    rope = fields.rope_parameters(10000.0, {})
    if not (weight := rope.get("mscale_all_dim")):
        return 1.0
    return yarn_magnitude(positive("factor", rope.get("factor", 1.0)), positive("mscale_all_dim", weight))


def routed_experts(fields: Fields, sizes: Mapping[str, Any], is_v3: bool) -> RoutedExperts:
    """Experts chosen group by group: V3 by sigmoids and a learned correction, V2 by a softmax."""
    size, dense = fields.size("moe_intermediate_size"), fields.count("first_k_dense_replace", 0)
    groups = fields.size("n_group", 1), fields.size("topk_group", 1)
    kind: dict[str, Any] = {}
    if is_v3:
        renormalize = fields.flag("norm_topk_prob", True)
        kind = {"score": "sigmoid", "group_score": "top2", "correction_bias": True, "renormalize": renormalize}
    elif fields.only("topk_method", "greedy", "group_limited_greedy") == "greedy":
        groups = 1, 1
    return RoutedExperts(
        num_experts=fields.size("n_routed_experts"),
        per_token=fields.size("num_experts_per_tok"),
        ffn_size=size,
        scale=fields.positive("routed_scaling_factor", 1.0),
        num_groups=groups[0],
        groups_per_token=groups[1],
        shared_size=size * fields.count("n_shared_experts", 0),
        dense_layers=tuple(range(min(dense, sizes["num_layers"]))),
        **kind,
    )


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """Latent projections by head; dense layers as Llama's, routed ones as Qwen3-MoE's."""
    assert copies == 1, "latent attention has no key/value heads to repeat"
    result = llama.tables(cfg)
    for i in range(cfg.num_layers):
        prefix, path = f"model.layers.{i}", ("layers", i)
        result |= {
            (*path, "attention_norm", "scale"): whole(f"{prefix}.input_layernorm.weight", cfg.hidden_size),
            (*path, "ffn_norm", "scale"): whole(f"{prefix}.post_attention_layernorm.weight", cfg.hidden_size),
            **_attention(cfg, i),
            **(routed(cfg, i) if cfg.is_routed(i) else llama.ffn(cfg, i)),
        }
    return result


def routed(cfg: ModelConfig, layer: int) -> WeightMap:
    """Router and experts as Qwen3-MoE's, and the expert that every token visits."""
    assert cfg.experts is not None
    size, result = cfg.experts.shared_size, experts(cfg, layer)
    return result | llama.ffn(cfg, layer, "mlp.shared_experts", ("ffn", "shared"), size) if size else result


def _attention(cfg: ModelConfig, layer: int) -> WeightMap:
    assert cfg.latent is not None
    a, d, n = cfg.latent, cfg.hidden_size, cfg.num_heads
    path, name = ("layers", layer, "attention"), f"model.layers.{layer}.self_attn"
    width = a.nope_dim + a.rope_dim
    out = Part(
        name=f"{name}.o_proj.weight",
        shape=(d, n * a.value_dim),
        view=(d, n, a.value_dim),
        order=(1, 2, 0),
        start=(0, 0, 0),
    )
    result: WeightMap = {
        (*path, "kv_down"): weights.transposed(f"{name}.kv_a_proj_with_mqa.weight", a.cache_width, d),
        (*path, "kv_norm"): whole(f"{name}.kv_a_layernorm.weight", a.kv_rank),
        (*path, "kv_up"): _by_head(f"{name}.kv_b_proj.weight", n, a.nope_dim + a.value_dim, a.kv_rank),
        (*path, "out"): Source((out,)),
    }
    if a.q_rank is None:
        return result | {(*path, "query"): _by_head(f"{name}.q_proj.weight", n, width, d)}
    return result | {
        (*path, "q_down"): weights.transposed(f"{name}.q_a_proj.weight", a.q_rank, d),
        (*path, "q_norm"): whole(f"{name}.q_a_layernorm.weight", a.q_rank),
        (*path, "query"): _by_head(f"{name}.q_b_proj.weight", n, width, a.q_rank),
    }


def _by_head(name: str, n: int, width: int, inputs: int) -> Source:
    """`[in, N, H]` from a linear `[N * H, in]`."""
    part = Part(name=name, shape=(n * width, inputs), view=(n, width, inputs), order=(2, 0, 1), start=(0, 0, 0))
    return Source((part,))


FAMILY = Family("deepseek", config, weight_map)
