"""Every field of `ModelConfig` and of its parts changes what the decoder computes from the same parameters.

A field either changes the logits while the tree of parameters stays as it is, or it changes the tree; then every
parameter that it brings (or takes away) must itself reach the logits.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.config import (
    ClampedSwiglu,
    DynamicScaling,
    LatentAttention,
    LinearScaling,
    LocalAttention,
    LongRopeScaling,
    ModelConfig,
    Rope,
    RopeScaling,
    RoutedExperts,
    YarnScaling,
    parts,
)
from jaxllm.models.decoder import Context, Decoder
from jaxllm.ops.rope import rope_tables

NUM_TOKENS = 7
PLAIN = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
LATENT = LatentAttention(q_rank=6, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4)
EXPERTS = RoutedExperts(
    num_experts=16, per_token=3, ffn_size=12, num_groups=4, groups_per_token=1, score="sigmoid", shared_size=12
)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)
YARN = YarnScaling(
    factor=4.0, beta_fast=2.0, beta_slow=0.1, original_max_position=16, attention_factor=1.1, truncate=False
)
LONG = LongRopeScaling(
    short_factors=(1.0, 2.0), long_factors=(3.0, 4.0), original_max_position=32, attention_factor=1.1
)
DYNAMIC = DynamicScaling(factor=4.0, original_max_position=16)
LOCAL = LocalAttention(window=3, layers=(0,))
CLAMPED = ClampedSwiglu(alpha=1.7, limit=0.1)


def plain(**fields: Any) -> ModelConfig:
    return dataclasses.replace(PLAIN, **fields)


# What a field is changed to, and the model that it is changed in where that is not the plain one.
FIELDS: dict[str, tuple[Any, ModelConfig]] = {
    "vocab_size": (33, PLAIN),
    "hidden_size": (20, PLAIN),
    "intermediate_size": (28, PLAIN),
    "num_layers": (2, PLAIN),
    "num_heads": (6, PLAIN),
    "num_kv_heads": (4, PLAIN),
    "head_dim": (8, PLAIN),
    "rms_norm_eps": (0.1, PLAIN),
    "rope_theta": (3.0, PLAIN),
    "rope_scaling": (LinearScaling(factor=3.0), PLAIN),
    "max_position_embeddings": (16, plain(rope_scaling=LONG)),
    "tie_word_embeddings": (True, PLAIN),
    "rotary_dim": (2, PLAIN),
    "rope_interleaved": (True, PLAIN),
    "unrotated_layers": ((0,), PLAIN),
    "learned_positions": (True, PLAIN),
    "embedding_scale": (3.0, plain(learned_positions=True)),
    "residual_scale": (3.0, PLAIN),
    "logit_scale": (3.0, PLAIN),
    "norm": ("layer_no_bias", PLAIN),
    "pre_norm": (False, plain(post_norm=True)),
    "post_norm": (True, PLAIN),
    "parallel_block": (True, PLAIN),
    "qk_norm": ("head", PLAIN),
    "qkv_bias": (True, PLAIN),
    "out_bias": (True, PLAIN),
    "mlp_bias": (True, PLAIN),
    "activation": ("gelu_tanh", PLAIN),
    "gated": (False, PLAIN),
    "clamped_swiglu": (CLAMPED, PLAIN),
    "attention_scale": (2.0, PLAIN),
    "attention_scale_by_layer": (True, plain(num_layers=2)),
    "attention_softcap": (0.1, PLAIN),
    "attention_sinks": (True, PLAIN),
    "final_softcap": (0.1, PLAIN),
    "local": (LOCAL, PLAIN),
    "latent": (LATENT, PLAIN),
    "experts": (EXPERTS, PLAIN),
}
# Words of a field beside the one above.
MORE = [
    ("activation", "gelu"),
    ("activation", "relu"),
    ("norm", "layer"),
    ("qk_norm", "full"),
    ("qk_norm", "head_layer"),
]
# A part with the field of `ModelConfig` that holds it, and each of its fields changed.
PARTS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "RopeScaling": (
        plain(rope_scaling=LLAMA3),
        {"factor": 2.0, "low_freq_factor": 0.1, "high_freq_factor": 1.5, "original_max_position": 64},
    ),
    "LinearScaling": (plain(rope_scaling=LinearScaling(factor=2.0)), {"factor": 3.0}),
    "YarnScaling": (
        plain(rope_scaling=YARN, head_dim=8),
        {
            "factor": 2.0,
            "beta_fast": 1.0,
            "beta_slow": 0.5,
            "original_max_position": 64,
            "attention_factor": 2.0,
            "truncate": True,
        },
    ),
    "LongRopeScaling": (
        plain(rope_scaling=LONG),
        {"short_factors": None, "long_factors": (5.0, 6.0), "original_max_position": 64, "attention_factor": 2.0},
    ),
    "DynamicScaling": (plain(rope_scaling=DYNAMIC), {"factor": 2.0, "original_max_position": 32}),
    "LocalAttention": (plain(local=LOCAL), {"window": 2, "layers": (), "rope_theta": 3.0}),
    "LatentAttention": (
        plain(latent=LATENT),
        {"q_rank": None, "kv_rank": 6, "nope_dim": 6, "rope_dim": 2, "value_dim": 6},
    ),
    "RoutedExperts": (
        plain(experts=EXPERTS),
        {
            "num_experts": 12,
            "per_token": 2,
            "ffn_size": 10,
            "score": "softmax",
            "renormalize": True,
            "scale": 2.0,
            "num_groups": 2,
            "groups_per_token": 2,
            "group_score": "top2",
            "correction_bias": True,
            "bias": True,
            "shared_size": 10,
            "shared_gate": True,
            "dense_layers": (0,),
        },
    ),
    "ClampedSwiglu": (plain(clamped_swiglu=CLAMPED), {"alpha": 1.0, "limit": 0.2}),
}


def test_every_field_is_changed_somewhere_below() -> None:
    made = {"Rope": {"dim", "theta", "scaling"}, "CacheRow": {"heads", "width", "halves", "is_cut"}}  # of other fields
    known = {"ModelConfig": set(FIELDS), **made}
    known |= {name: set(changes) for name, (_, changes) in PARTS.items()}
    classes = [ModelConfig, *(c for c in vars(parts).values() if dataclasses.is_dataclass(c))]
    assert {c.__name__: {f.name for f in dataclasses.fields(c)} for c in classes} == known


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_model_changes_its_output(field: str) -> None:
    value, base = FIELDS[field]
    check_changed(base, dataclasses.replace(base, **{field: value}))


@pytest.mark.parametrize(("field", "word"), MORE)
def test_each_further_word_of_a_field_changes_the_output(field: str, word: str) -> None:
    value, base = FIELDS[field]
    check_changed(dataclasses.replace(base, **{field: value}), dataclasses.replace(base, **{field: word}))


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in PARTS for field in PARTS[name][1]])
def test_a_field_of_a_part_changes_the_output(name: str, field: str) -> None:
    base, changes = PARTS[name]
    holder = next(f.name for f in dataclasses.fields(base) if type(getattr(base, f.name)).__name__ == name)
    part, value = getattr(base, holder), changes[field]
    if field == "short_factors":  # those of a model that serves no sequence beyond the original length
        base, value = dataclasses.replace(base, max_position_embeddings=32), (5.0, 6.0)
    check_changed(base, dataclasses.replace(base, **{holder: dataclasses.replace(part, **{field: value})}))


@pytest.mark.parametrize("change", [{"dim": 2}, {"theta": 3.0}, {"scaling": LinearScaling(factor=2.0)}])
def test_a_field_of_the_rotary_embedding_changes_its_tables(change: dict[str, Any]) -> None:
    rope = Rope(dim=4, theta=10000.0, scaling=None)
    before, after = (rope_tables(jnp.arange(4), r, 64)[0] for r in (rope, dataclasses.replace(rope, **change)))
    assert before.shape != after.shape or not np.allclose(before, after)


def check_changed(base: ModelConfig, changed: ModelConfig) -> None:
    """Equal trees: other logits. Other trees: whatever only one of them has reaches the logits of its model."""
    before, after = computed(base), computed(changed)
    if before.shapes == after.shapes:
        assert differ(before.logits(), after.logits()), "the same parameters give the same logits"
    for one, other in ((before, after), (after, before)):
        for path in one.shapes:
            if one.shapes[path] != other.shapes.get(path):
                assert differ(one.logits(), one.logits(path)), f"{path} is there but does not reach the logits"


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape != b.shape or bool(np.abs(a - b).max() > 1e-5)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """A model with random parameters that depend on their path and shape alone."""

    shapes: dict[str, tuple[int, ...]]
    parameters: dict[str, jax.Array]
    run: Callable[[dict[str, jax.Array]], jax.Array]

    def logits(self, perturbed: str | None = None) -> np.ndarray:
        """`[T, V]`; with one parameter moved at random, if it is named."""
        values = dict(self.parameters)
        if perturbed is not None:
            values[perturbed] = values[perturbed] + jax.random.normal(jax.random.key(9), self.shapes[perturbed])
        return np.asarray(self.run(values))


@functools.cache
def computed(cfg: ModelConfig) -> Computed:
    """The decoder of this configuration without pages: every token attends to those before it."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, dtype=jnp.dtype(jnp.float32))))
    shapes = {".".join(map(str, path)): v.get_value().shape for path, v in nnx.to_flat_state(state)}
    values = {name: _random(name, shape) for name, shape in shapes.items()}

    def run(values: dict[str, jax.Array]) -> jax.Array:
        flat = [(path, leaf.replace(values[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
        model, tokens = nnx.merge(graph, nnx.from_flat_state(flat)), jnp.arange(3, 3 + NUM_TOKENS)
        context = Context(attend, _same, lambda function, *_: function, jnp.dtype(jnp.float32))
        return model.logits(model(tokens, jnp.arange(NUM_TOKENS), context), _same)

    # One by one the operations of most models are compiled already; a loop over experts never is.
    return Computed(shapes, values, jax.jit(run) if cfg.experts else run)


def _random(name: str, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(zlib.crc32(f"{name}{shape}".encode())), shape) * 0.7


def _same(x: jax.Array, *dims: str | None) -> jax.Array:
    return x


def attend(layer: int, q: jax.Array, kv: jax.Array, spec: Any, sinks: jax.Array | None) -> jax.Array:
    """Dense causal attention as the specification says it, with a window, a soft-cap and sinks."""
    keys = kv[:, :, 0]
    values = kv[:, :, 1] if spec.value_width is None else keys[..., : spec.value_width]
    scores = jnp.einsum("TKGH,SKH->KGTS", q, keys) * spec.scale
    if spec.softcap:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    i, j = jnp.arange(q.shape[0])[:, None], jnp.arange(q.shape[0])
    scores = jnp.where((j <= i) & (j > i - (spec.window or NUM_TOKENS)), scores, -1e9)
    if sinks is not None:
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[..., None, None], (*scores.shape[:3], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : q.shape[0]]
    return jnp.einsum("KGTS,SKH->TKGH", weights, values)
