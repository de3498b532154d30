"""Command-R: both halves of a block read one layer norm without bias; neighbouring dims turn; logits are scaled.

Command-R+ norms queries and keys. The later release (`Cohere2ForCausalLM`: Command-R7B, Command-A) has a window on
three of four layers, and no positions on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import Heads, WeightMap


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Cohere configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    is_second = fields.architecture == "Cohere2ForCausalLM"
    sizes, bias = fields.sizes(norm_eps="layer_norm_eps"), fields.flag("attention_bias")
    layers = _windows(fields, sizes["num_layers"]) if is_second else {}
    cfg = ModelConfig(
        **sizes,
        **fields.rope(10_000.0 if is_second else 500_000.0),
        **layers,
        rope_interleaved=True,
        norm="layer_no_bias",
        parallel_block=True,
        qk_norm="head_layer" if not is_second and fields.flag("use_qk_norm") else None,
        activation=fields.activation(),
        qkv_bias=bias,
        out_bias=bias,
        logit_scale=float(fields.number("logit_scale")),
    )
    fields.done()
    return cfg


def _windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Only layers with a window have positions."""
    pattern = fields.size("sliding_window_pattern", 4)
    local = fields.local(num_layers, [i for i in range(num_layers) if (i + 1) % pattern])
    windowed = local.layers if local else ()
    return {"local": local, "unrotated_layers": tuple(i for i in range(num_layers) if i not in windowed)}


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, without the second norm of a block; the norms of queries and keys have a row for each head."""
    result, heads = llama.weight_map(cfg, copies), Heads.of(cfg, copies)
    for i in range(cfg.num_layers):
        del result["layers", i, "ffn_norm", "scale"]
        if cfg.qk_norm:
            path, name = ("layers", i, "attention"), f"model.layers.{i}.self_attn"
            result[*path, "q_norm"] = weights.per_head(f"{name}.q_norm.weight", heads, is_matrix=True)
            result[*path, "k_norm"] = weights.per_head(f"{name}.k_norm.weight", heads, keys=True, is_matrix=True)
    return result


FAMILY = Family("cohere", config, weight_map)
