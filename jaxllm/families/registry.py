"""The registry of model families: which file reads which Hugging Face architecture.

A family is a module with two functions: `config(hf) -> ModelConfig` and `weight_map(config, copies)`, which says
of which checkpoint tensors each decoder parameter is made. An architecture that is not here is refused by name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxllm.families.architecture_fields import RULES
from jaxllm.families.notices import say_once
from jaxllm.families.text_half import WITH_EYES, text_config

if TYPE_CHECKING:
    from jaxllm.config import ModelConfig
    from jaxllm.families.sources import WeightMap

# Architecture -> the module beside this one that reads it.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granite_moe",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere",
    "GlmForCausalLM": "glm",
    "Glm4ForCausalLM": "glm",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GPT2LMHeadModel": "gpt2",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "GptOssForCausalLM": "gpt_oss",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its configuration mapping, its weight-name map, and tensors that carry no weights.

    `weight_map(cfg, copies)` repeats each key/value head `copies` times. `prefix` stands before the names of all
    tensors but the head's; files leave it out or not. `ignored` are regular expressions.
    """

    name: str
    config: Callable[[Mapping[str, Any]], ModelConfig]
    weight_map: Callable[[ModelConfig, int], WeightMap]
    prefix: str = "model."
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    def ignores(self, tensor: str) -> bool:
        """Whether a tensor may be left out: buffers that can be computed."""
        return any(re.fullmatch(pattern, tensor) for pattern in self.ignored)


def _classifier(architecture: str) -> str:
    return re.sub("(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", architecture)


def is_classifier(hf: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a decoder with a score of each label in place of the vocabulary's."""
    names = hf.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)


# Names that files give to what is supported under another one.
_SYNONYMS = {"LLaMAForCausalLM": "LlamaForCausalLM", "GPT2Model": "GPT2LMHeadModel"} | {
    name.replace("ForCausalLM", "Model"): name for name in ARCHITECTURES if name.endswith("ForCausalLM")
}
_SYNONYMS |= {_classifier(name): name for name in ARCHITECTURES} | {
    "Gemma3TextForSequenceClassification": "Gemma3ForCausalLM"
}
HEAD_OF_CLASSIFIERS = "score.weight"
_TYPE_SYNONYMS = {"kimi_k2": "deepseek_v3"}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json`. Raises ValueError for what this engine would compute wrongly."""
    half = text_config(hf)
    return family_of(half).config(half)


def architecture_of(hf: Mapping[str, Any]) -> str:
    """The supported architecture that a configuration names in `architectures` or, without any, in `model_type`.

    Raises:
        ValueError: it names none that is supported.
    """
    hf = text_config(hf)
    names = hf.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"config.json has architectures={names!r}; expected a list of names")
    model_type = hf.get("model_type")
    for name in names or ():
        if (known := _SYNONYMS.get(name, name)) in ARCHITECTURES:
            if any(model_type == rules.model_type != RULES[known].model_type for rules in RULES.values()):
                say_once(f"config.json has model_type={model_type!r} but architectures={names}; read as {known}")
            return known
    for name in () if names else ARCHITECTURES:
        if RULES[name].model_type == _TYPE_SYNONYMS.get(str(model_type), model_type):
            return name
    got = ", ".join(names or ()) or (f"model_type {model_type!r}" if model_type else "no architecture")
    raise ValueError(
        f"the model's configuration names {got[:80]}; supported architectures (here without ForCausalLM) are "
        f"{', '.join(map(_short, ARCHITECTURES))}, and the text halves of {', '.join(map(_short, WITH_EYES))}"
    )


def _short(architecture: str) -> str:
    return re.sub("For(CausalLM|ConditionalGeneration)$", "", architecture)


def family_of(hf: Mapping[str, Any]) -> Family:
    """Return the family of a Hugging Face configuration, or raise ValueError naming what is supported."""
    return importlib.import_module(f"jaxllm.families.{ARCHITECTURES[architecture_of(hf)]}").FAMILY
