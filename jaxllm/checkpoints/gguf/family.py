"""What a GGUF architecture is in Hugging Face terms, and the names that most of them share.

Knows nothing of files or how tensors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxllm.checkpoints.gguf.rules import Rule, plain, queries_keys_values, unrotated, unused

WINDOW_PATTERN = "attention.sliding_window_pattern"
Values = Mapping[str, Any]  # a file's metadata below the architecture's prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What one GGUF architecture is called in Hugging Face terms.

    Attributes:
        rules: GGUF stem inside a block -> what becomes of it.
        constants: config keys that GGUF has no word for.
        keys: further GGUF keys -> config keys, read as they are; required unless `defaults` has the config key.
        biases: config keys that say whether a tensor has a bias -> GGUF stems that tell, and Hugging Face stems that
            all have one then.
        flags: config keys that say whether a block has a tensor.
        more: adds what has to be computed from the metadata and the config so far.
        reads: GGUF keys that `more` reads.
        norm_offset: what the file's norms have too much: Gemma's store 1 + w.
        has_partial_rotary: only a part of each head may turn.
        nests_rope: the config has a rotation for each kind of layer.
        rename: config keys that this architecture calls otherwise; None = has not.
        expert_names: of matrices that files of 2023 store expert by expert.
        layer, tops: prefix of a layer's tensors, and names outside the layers.
    """

    architecture: str
    model_type: str
    rules: Mapping[str, Rule]
    constants: Values = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Values = field(default_factory=dict)
    biases: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[Values, dict[str, Any]], dict[str, Any]] | None = None
    reads: frozenset[str] = frozenset()
    norm_offset: float = 0.0
    epsilon: str = "attention.layer_norm_rms_epsilon"
    has_partial_rotary: bool = False
    nests_rope: bool = False
    rename: Mapping[str, str | None] = field(default_factory=dict)
    expert_names: Mapping[str, str] = field(default_factory=dict)
    layer: str = "model.layers"
    tops: Mapping[str, str] = field(
        default_factory=lambda: {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    )


LLAMA: dict[str, Rule] = {
    "attn_norm": plain("input_layernorm"),
    "attn_q": plain("self_attn.q_proj"),
    "attn_k": plain("self_attn.k_proj"),
    "attn_v": plain("self_attn.v_proj"),
    "attn_qkv": queries_keys_values("self_attn"),
    "attn_output": plain("self_attn.o_proj"),
    "attn_rot_embd": unused,
    "ffn_norm": plain("post_attention_layernorm"),
    "ffn_gate": plain("mlp.gate_proj"),
    "ffn_up": plain("mlp.up_proj"),
    "ffn_down": plain("mlp.down_proj"),
}
QK_NORM: dict[str, Rule] = {"attn_q_norm": plain("self_attn.q_norm"), "attn_k_norm": plain("self_attn.k_norm")}
UNROTATED: dict[str, Rule] = {
    "attn_qkv": queries_keys_values("self_attn", are_rotated=False),
    "attn_q": unrotated("self_attn.q_proj", "num_attention_heads"),
    "attn_k": unrotated("self_attn.k_proj", "num_key_value_heads"),
}
POST_NORMS: dict[str, Rule] = {
    "post_attention_norm": plain("post_attention_layernorm"),
    "ffn_norm": plain("pre_feedforward_layernorm"),
    "post_ffw_norm": plain("post_feedforward_layernorm"),
}
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION_BIAS = {"attention_bias": (("attn_q", "attn_qkv"), ATTENTION)}
LLAMA_BIASES = ATTENTION_BIAS | {"mlp_bias": (("ffn_up",), MLP)}
NO_WINDOW = {"use_sliding_window": False}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def windowed_layers(values: Values, config: Mapping[str, Any], period: int) -> dict[str, Any]:
    """`layer_types`: as the file says (a period, or a truth value for each layer), else all but every `period`-th."""
    slides, layers = values.get(WINDOW_PATTERN, period), config["num_hidden_layers"]
    if isinstance(slides, int):
        slides = [slides == 0 or i % slides < slides - 1 for i in range(layers)]
    return {"layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in slides]}
