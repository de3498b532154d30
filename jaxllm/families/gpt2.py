"""GPT-2: learned positions, layer norms, biases everywhere, an FFN without a gate, fused `[in, out]` projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import Part, Source, WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face GPT-2 configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    d, n = fields.size("n_embd"), fields.size("n_head")
    if d % n:
        raise ValueError(f"config.json has n_embd={d}, which does not divide by n_head={n}")
    cfg = ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=d,
        intermediate_size=fields.size("n_inner", 4 * d),
        num_layers=fields.size("n_layer"),
        num_heads=n,
        num_kv_heads=n,
        head_dim=d // n,
        rms_norm_eps=fields.positive("layer_norm_epsilon", 1e-5),
        rope_theta=1.0,
        rotary_dim=0,
        learned_positions=True,
        max_position_embeddings=fields.size("n_positions"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation=fields.activation("activation_function", "gelu_new"),
        gated=False,
        attention_scale_by_layer=fields.flag("scale_attn_by_inverse_layer_idx"),
        attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """Conv1D weights are `[in, out]`: only the heads have to be split."""
    assert copies == 1, "GPT-2 has as many key/value heads as query heads"
    d, f, n, h = cfg.hidden_size, cfg.intermediate_size, cfg.num_heads, cfg.head_dim
    root = "transformer."
    result: WeightMap = {
        ("embedding",): whole(f"{root}wte.weight", cfg.vocab_size, d),
        ("positions",): whole(f"{root}wpe.weight", cfg.max_position_embeddings, d),
        **_norm(("final_norm",), f"{root}ln_f", d),
    }
    if not cfg.tie_word_embeddings:
        result["lm_head",] = whole("lm_head.weight", cfg.vocab_size, d)
    for i in range(cfg.num_layers):
        name, path = f"{root}h.{i}", ("layers", i)
        qkv = Part(
            name=f"{name}.attn.c_attn.weight",
            shape=(d, 3 * d),
            view=(d, 3, n, h),
            order=(0, 2, 1, 3),
            start=(0, 0, 0, 0),
        )
        bias = Part(name=f"{name}.attn.c_attn.bias", shape=(3 * d,), view=(3, n, h), order=(1, 0, 2), start=(0, 0, 0))
        out = Part(
            name=f"{name}.attn.c_proj.weight", shape=(d, d), view=(n, 1, h, d), order=(0, 1, 2, 3), start=(0, 0, 0, 0)
        )
        up = Part(name=f"{name}.mlp.c_fc.weight", shape=(d, f), view=(d, 1, f), order=(0, 1, 2), start=(0, 0, 0))
        up_bias = Part(name=f"{name}.mlp.c_fc.bias", shape=(f,), view=(1, f), order=(0, 1), start=(0, 0))
        result |= {
            **_norm((*path, "attention_norm"), f"{name}.ln_1", d),
            **_norm((*path, "ffn_norm"), f"{name}.ln_2", d),
            (*path, "attention", "qkv"): Source((qkv,)),
            (*path, "attention", "qkv_bias"): Source((bias,)),
            (*path, "attention", "out"): Source((out,)),
            (*path, "attention", "out_bias"): whole(f"{name}.attn.c_proj.bias", d),
            (*path, "ffn", "gate_up"): Source((up,)),
            (*path, "ffn", "gate_up_bias"): Source((up_bias,)),
            (*path, "ffn", "down"): whole(f"{name}.mlp.c_proj.weight", f, d),
            (*path, "ffn", "down_bias"): whole(f"{name}.mlp.c_proj.bias", d),
        }
    return result


def _norm(path: tuple[str | int, ...], name: str, d: int) -> WeightMap:
    return {(*path, "scale"): whole(f"{name}.weight", d), (*path, "bias"): whole(f"{name}.bias", d)}


FAMILY = Family("gpt2", config, weight_map, prefix="transformer.", ignored=(r".*\.attn\.(bias|masked_bias)",))
