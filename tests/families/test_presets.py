"""Each preset is the published model: its parameters are counted, and the count agrees with the decoder itself."""

from __future__ import annotations

import math

import jax.numpy as jnp
import pytest
from flax import nnx
from tiny import FAMILIES

from jaxllm.config import ModelConfig
from jaxllm.families import read_config
from jaxllm.families.presets import PRESETS, preset
from jaxllm.families.registry import family_of
from jaxllm.models.decoder import Decoder

# As published with the weights. DeepSeek-V3 without its multi-token prediction layer, Gemma 3 without its eyes.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "mistral-7b": 7_241_732_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-3-27b": 27_009_346_304,
    "gemma-7b": 8_537_680_896,
    "smollm3-3b": 3_075_098_624,
    "granite-3.3-8b": 8_170_864_640,
    "glm-4-9b-0414": 9_400_279_040,
    "olmo-3-7b": 7_298_011_136,
    "command-r7b": 8_028_033_024,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-120b": 116_829_156_672,
    "gpt2": 124_439_808,
}


def test_every_preset_has_the_published_number_of_parameters() -> None:
    assert {name: preset(name).num_parameters for name in PRESETS} == PUBLISHED


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss-120b", "gemma-3-27b"])
def test_the_count_is_that_of_the_abstract_decoder(name: str) -> None:
    assert preset(name).num_parameters == decoder_elements(preset(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_count_of_every_family_is_that_of_its_decoder_and_its_tensors(name: str) -> None:
    hf = FAMILIES[name].hf_config()
    hf.architectures = [FAMILIES[name].architecture]
    cfg = read_config(hf.to_dict())
    tensors = {part.name: part.shape for s in family_of(hf.to_dict()).weight_map(cfg, 1).values() for part in s.parts}
    assert cfg.num_parameters == decoder_elements(cfg) == sum(map(math.prod, tensors.values()))


def decoder_elements(cfg: ModelConfig) -> int:
    model = nnx.eval_shape(lambda: Decoder(cfg, dtype=jnp.dtype("bfloat16")))
    return sum(leaf.get_value().size for _, leaf in nnx.to_flat_state(nnx.state(model)))


def test_active_parameters_count_the_chosen_experts_only() -> None:
    cfg = preset("mixtral-8x7b")
    experts = 32 * 6 * 3 * 4096 * 14336
    assert cfg.num_parameters - cfg.num_active_parameters == experts


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'llama-3\.1-8b'"):
        preset("llama-3.1-8")
