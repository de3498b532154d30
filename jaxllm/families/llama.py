"""Llama 2, 3, 3.1 and later: configuration and weight names. The map here is what most families start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import Heads, WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Llama configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    bias = fields.flag("attention_bias")
    cfg = ModelConfig(
        **fields.sizes(),
        **fields.rope(),
        activation=fields.activation(),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """Parameter path in the decoder -> the checkpoint tensors it is made of. PyTorch linears are [out, in]."""
    result = tables(cfg)
    for i in range(cfg.num_layers):
        prefix, path = f"model.layers.{i}", ("layers", i)
        result |= {
            (*path, "attention_norm", "scale"): whole(f"{prefix}.input_layernorm.weight", cfg.hidden_size),
            (*path, "ffn_norm", "scale"): whole(f"{prefix}.post_attention_layernorm.weight", cfg.hidden_size),
            **attention(cfg, i, copies),
            **ffn(cfg, i),
        }
    return result


def tables(cfg: ModelConfig, norm_offset: float = 0.0) -> WeightMap:
    """Embedding, final norm and, where it is not tied, the LM head."""
    table = (cfg.vocab_size, cfg.hidden_size)
    result: WeightMap = {
        ("embedding",): whole("model.embed_tokens.weight", *table),
        ("final_norm", "scale"): whole("model.norm.weight", cfg.hidden_size, offset=norm_offset),
    }
    if not cfg.tie_word_embeddings:
        result["lm_head",] = whole("lm_head.weight", *table)
    return result


def attention(cfg: ModelConfig, layer: int, copies: int, norm_offset: float = 0.0) -> WeightMap:
    """Projections, with biases and QK-norm where the configuration has them."""
    heads, name = Heads.of(cfg, copies), f"model.layers.{layer}.self_attn"
    path = ("layers", layer, "attention")
    q, k, v = (f"{name}.{kind}_proj" for kind in "qkv")
    result: WeightMap = {
        (*path, "qkv"): weights.qkv((f"{q}.weight", f"{k}.weight", f"{v}.weight"), heads),
        (*path, "out"): weights.out_projection(f"{name}.o_proj.weight", heads),
    }
    if cfg.qkv_bias:
        result[*path, "qkv_bias"] = weights.qkv_bias((f"{q}.bias", f"{k}.bias", f"{v}.bias"), heads)
    if cfg.out_bias:
        result[*path, "out_bias"] = whole(f"{name}.o_proj.bias", cfg.hidden_size)
    if cfg.qk_norm == "head":
        result[*path, "q_norm"] = whole(f"{name}.q_norm.weight", cfg.head_dim, offset=norm_offset)
        result[*path, "k_norm"] = whole(f"{name}.k_norm.weight", cfg.head_dim, offset=norm_offset)
    elif cfg.qk_norm:
        result[*path, "q_norm"] = weights.per_head(f"{name}.q_norm.weight", heads)
        result[*path, "k_norm"] = weights.per_head(f"{name}.k_norm.weight", heads, keys=True)
    return result


def ffn(cfg: ModelConfig, layer: int, name: str = "mlp", path: tuple[str, ...] = ("ffn",), size: int = 0) -> WeightMap:
    """A gated FFN, with biases where the configuration has them."""
    d, f = cfg.hidden_size, size or cfg.intermediate_size
    prefix, where = f"model.layers.{layer}.{name}", ("layers", layer, *path)
    gate, up, down = (f"{prefix}.{kind}_proj" for kind in ("gate", "up", "down"))
    result: WeightMap = {
        (*where, "gate_up"): weights.gate_up(f"{gate}.weight", f"{up}.weight", d, f),
        (*where, "down"): weights.transposed(f"{down}.weight", d, f),
    }
    if cfg.mlp_bias:
        result[*where, "gate_up_bias"] = weights.gate_up_bias(f"{gate}.bias", f"{up}.bias", f)
        result[*where, "down_bias"] = whole(f"{down}.bias", d)
    return result


FAMILY = Family("llama", config, weight_map)
