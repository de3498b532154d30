"""Checkpoints that also see: their text half, as a model of a family that exists.

A `config.json` with a `text_config` -> the configuration of the text decoder alone; a tensor's name -> its name there.
Nothing here computes: images are not understood, and a log line says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.families.architecture_fields import RULES
from jaxllm.families.notices import say_once

# Only models whose text half is a supported architecture and nothing else (Aya's, for one, leaves out the scale of
# Command-R's logits). Architecture -> whether its head is tied to its embedding where the file does not say.
WITH_EYES = {
    "Gemma3ForConditionalGeneration": True,
    "Mistral3ForConditionalGeneration": True,
    "LlavaForConditionalGeneration": False,
    "LlavaNextForConditionalGeneration": False,
    "LlavaOnevisionForConditionalGeneration": False,
    "Idefics3ForConditionalGeneration": False,
    "SmolVLMForConditionalGeneration": False,
    "InternVLForConditionalGeneration": True,
    "Qwen2VLForConditionalGeneration": False,
    "Qwen2_5_VLForConditionalGeneration": False,
    "Qwen3VLForConditionalGeneration": False,
}
# `model_type` of a text half -> the architecture that it is. Those of Qwen-VL turn by three positions (time, height,
# width), which are one and the same in a text.
_TEXT_TYPES = {rules.model_type: architecture for architecture, rules in RULES.items()} | {
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
_MROPE = ("mrope_section", "mrope_interleaved")
# What transformers takes where a text half leaves it out, as older files do.
DEFAULTS: dict[str, dict[str, Any]] = {
    "Gemma3ForCausalLM": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
    },
    "LlamaForCausalLM": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    "MistralForCausalLM": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
    },
}
_BESIDE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
_EYES = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "model_type",
)
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.text_model.": "model.",
}
_PARTS_THAT_SEE = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "connector", "image_newline")


def eyes_of(hf: Mapping[str, Any]) -> str | None:
    """The architecture, if it is one that sees and whose text half can be loaded."""
    names = hf.get("architectures")
    known = [name for name in names if isinstance(name, str) and name in WITH_EYES] if isinstance(names, list) else []
    return known[0] if known else None


def text_config(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text half; any other configuration comes back as it is.

    Raises:
        ValueError: the text half is none that is supported.
    """
    if (architecture := eyes_of(hf)) is None:
        return hf
    text = hf.get("text_config") or {key: value for key, value in hf.items() if key not in _EYES}
    if not isinstance(text, Mapping):
        raise ValueError(f"config.json has text_config={str(text)[:60]!r}; an object is required")
    kind = text.get("model_type") or hf.get("model_type")
    if not isinstance(kind, str) or kind not in _TEXT_TYPES:
        raise ValueError(f"the text half of this {architecture} is a {str(kind)[:60]!r}, which is not supported")
    half = _TEXT_TYPES[kind]
    say_once(f"config.json is of {architecture}: its text half is loaded, as {half}; images are not understood")
    beside = {key: hf[key] for key in _BESIDE if hf.get(key) is not None}
    made = {"tie_word_embeddings": WITH_EYES[architecture], **DEFAULTS.get(half, {}), **text, **beside}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(made.get(key), Mapping) and "mrope_section" in made[key]:
            made[key] = _of_one_position(made[key])
    return made | {"architectures": [half], "model_type": RULES[half].model_type}


def _of_one_position(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters of three positions as those of one."""
    return {key: "default" if value == "mrope" else value for key, value in rope.items() if key not in _MROPE}


def text_name(tensor: str) -> str | None:
    """A tensor's name in the text half; None for one that belongs to the eyes."""
    if tensor.removeprefix("model.").split(".")[0] in _PARTS_THAT_SEE:
        return None
    for prefix, ours in _PREFIXES.items():
        if tensor.startswith(prefix):
            return ours + tensor.removeprefix(prefix)
    return tensor
