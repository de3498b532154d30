"""GGUF tensor names -> Hugging Face tensor names, one `Family` of data per architecture.

To add an architecture, add its entry to `FAMILIES`; `gguf_config.py` reads the same entry for the config.
Knows nothing of files, metadata values or how tensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxllm.checkpoints.base import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What one GGUF architecture is called in Hugging Face terms."""

    architecture: str
    model_type: str
    block_names: Mapping[str, str]  # GGUF stem inside a block -> Hugging Face stem inside a layer
    permuted: frozenset[str] = frozenset()  # stems whose rows GGUF interleaves for its rotary embedding
    constants: Mapping[str, Any] = field(default_factory=dict)  # config keys GGUF has no word for
    sizes: Mapping[str, str] = field(default_factory=dict)  # further whole numbers: GGUF key -> config key
    norm_offset: float = 0.0  # what the file's norms have too much: Gemma's store 1 + w


_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM_NAMES = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        block_names=_LLAMA_NAMES,
        permuted=frozenset({"attn_q", "attn_k"}),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        block_names=_LLAMA_NAMES,
        constants={"use_sliding_window": False},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        block_names=_LLAMA_NAMES | _QK_NORM_NAMES,
        constants={"use_sliding_window": False, "attention_bias": False},
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        block_names=_LLAMA_NAMES
        | _QK_NORM_NAMES
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        constants={
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        sizes={"attention.sliding_window": "sliding_window"},
        norm_offset=1.0,
    ),
}

# No leading zeros: blk.0 and blk.00 would be the same layer.
_BLOCK_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(\w+)\.(weight|bias)", re.ASCII)
_TOP_TENSOR = re.compile(r"(\w+)\.(weight|bias)", re.ASCII)


def family_of(metadata: Mapping[str, Any]) -> Family:
    """The family that `general.architecture` names.

    Raises:
        CheckpointError: It is none of `FAMILIES`, or the file is one part of a split model.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"general.architecture={name!r} is not supported as GGUF; expected one of: {known}")
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError("it is one part of a split GGUF; merge the parts (llama-gguf-split --merge)")
    return FAMILIES[name]


def hf_name(family: Family, name: str) -> tuple[str, bool]:
    """The Hugging Face name of the GGUF tensor `name`, and whether its rows are permuted.

    Raises:
        CheckpointError: The architecture has no such tensor; leaving it out would change the mathematics.
    """
    if match := _BLOCK_TENSOR.fullmatch(name):
        layer, stem, kind = match.groups()
        if stem in family.block_names:
            return f"model.layers.{layer}.{family.block_names[stem]}.{kind}", stem in family.permuted
    elif (match := _TOP_TENSOR.fullmatch(name)) and match[1] in _TOP_NAMES:
        return f"{_TOP_NAMES[match[1]]}.{match[2]}", False
    raise CheckpointError(f"tensor {name!r} has no place in a {family.model_type} model")
