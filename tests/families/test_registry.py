"""Nothing is silently defaulted: what a family does not understand is refused by name; every field is read."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FAMILIES

from jaxllm.config import ClampedSwiglu, LinearScaling, LocalAttention, ModelConfig
from jaxllm.families import read_config
from jaxllm.families.presets import PRESETS
from jaxllm.families.registry import ARCHITECTURES
from jaxllm.models.decoder import Context, Decoder


@pytest.mark.parametrize("name", PRESETS)
def test_an_unknown_field_is_refused_by_every_family(name: str) -> None:
    with pytest.raises(ValueError, match="unknown field secret_scale=2"):
        read_config(PRESETS[name] | {"secret_scale": 2})


@pytest.mark.parametrize("name", PRESETS)
def test_a_missing_size_is_refused_by_every_family(name: str) -> None:
    key = "n_embd" if name == "gpt2" else "hidden_size"
    with pytest.raises(ValueError, match=f"{key}=None"):
        read_config({k: v for k, v in PRESETS[name].items() if k != key})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "spice": 1}}, "'spice'"),
        ("gpt-oss-120b", {"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'"),
        ("deepseek-v3", {"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ("gemma-3-27b", {"layer_types": ["chunked_attention"] * 62}, "layer_types"),
        ("gemma-3-27b", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("gemma-3-27b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "9 experts per token of 8"),
        ("qwen3-8b", {"layer_types": ["sliding_attention"] * 36}, "use_sliding_window"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(PRESETS[name] | change)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="SecretForCausalLM; supported architectures are LlamaForCausalLM"):
        read_config({"architectures": ["SecretForCausalLM"]})


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "deepseek_v3", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "dtype"])
def test_a_wrong_tensor_is_refused_by_name(
    name: str, change: str, tiny_model: Callable, load: Callable, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_model(name).folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    victim = max(key for key in tensors if ".1." in key)
    if change == "missing":
        del tensors[victim]
    elif change == "unexpected":
        victim += "_scale"
        tensors[victim] = np.zeros(3, np.float32)
    elif change == "shape":
        tensors[victim] = np.zeros((*tensors[victim].shape, 2), np.float32)
    else:
        tensors[victim] = tensors[victim].astype(np.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=victim.replace(".", r"\.")):
        load(tmp_path)


def test_every_architecture_has_a_tiny_checkpoint_that_is_compared_with_transformers() -> None:
    assert {tiny.architecture for tiny in FAMILIES.values()} == set(ARCHITECTURES)


# Each field of the configuration, changed: another output, another tree of parameters, or an error.
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
CHANGES: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 0.1,
    "rope_theta": 3.0,
    "rope_scaling": LinearScaling(factor=3.0),
    "tie_word_embeddings": True,
    "rotary_dim": 2,
    "rope_interleaved": True,
    "unrotated_layers": (0,),
    "residual_scale": 3.0,
    "logit_scale": 3.0,
    "parallel_block": True,
    "learned_positions": True,
    "embedding_scale": 3.0,
    "norm": "layer",
    "pre_norm": False,
    "post_norm": True,
    "qk_norm": "head",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "activation": "gelu_tanh",
    "gated": False,
    "clamped_swiglu": ClampedSwiglu(alpha=1.7, limit=0.1),
    "attention_scale": 2.0,
    "attention_softcap": 0.1,
    "attention_sinks": True,
    "final_softcap": 0.1,
    "local": LocalAttention(window=2, layers=(0,)),
    "latent": None,  # tests/models/test_families.py: another tree altogether
    "experts": None,
    "max_position_embeddings": None,  # what the engine refuses to go beyond
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig)])
def test_every_field_of_the_configuration_is_read(field: str) -> None:
    assert field in CHANGES, "say here how a change of this field shows"
    if CHANGES[field] is None:
        return
    base = read_config(BASE)
    changed = dataclasses.replace(
        base, **{field: CHANGES[field], **({"post_norm": True} if field == "pre_norm" else {})}
    )
    if field == "pre_norm":
        base = dataclasses.replace(base, post_norm=True)
    before, after = forward(base), forward(changed)
    assert before.keys() != after.keys() or any(
        before[k].shape != after[k].shape or not np.allclose(before[k], after[k], atol=1e-6) for k in before
    )


@functools.cache
def forward(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Shapes of all parameters, and logits with parameters that depend on their shape only; dense attention."""
    model = Decoder(cfg, dtype=jnp.dtype(jnp.float32))
    graph, state = nnx.split(model)
    filled = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.5, state)
    shapes = {".".join(map(str, p)): np.zeros(v.get_value().shape) for p, v in nnx.to_flat_state(filled)}
    model = nnx.merge(graph, filled)

    def attend(layer, q, kv, spec, sinks):
        scores = jnp.einsum("TKGH,SKH->KGTS", q, kv[:, :, 0]) * spec.scale
        if spec.softcap:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        i, j = jnp.arange(q.shape[0])[:, None], jnp.arange(q.shape[0])
        scores = jnp.where((j <= i) & (j > i - (spec.window or 99)), scores, -1e9)
        return jnp.einsum("KGTS,SKH->TKGH", jax.nn.softmax(scores, axis=-1), kv[:, :, 1])

    def same(x, *dims):
        return x

    context = Context(attend, same, lambda function, *_: function, jnp.dtype(jnp.float32))
    tokens = jnp.arange(6)
    return {**shapes, "logits": np.asarray(model.logits(model(tokens, tokens, context), same))}
