"""The fields that published models have in their config.json: they load, as transformers reads them, or are refused
for a reason that is true. The file has one configuration per line, with the sizes of the models it is named after.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxllm.families import read_config
from jaxllm.families.architecture_fields import RULES
from jaxllm.families.registry import architecture_of

LINES = (Path(__file__).parent / "published_configs.jsonl").read_text().splitlines()
CONFIGS = {line["name"]: line["config"] for line in map(json.loads, LINES)}
REFUSED = {
    "quantised by mlx": "'group_size': 64",
    "Falcon": "FalconForCausalLM",
    "Mamba": "MambaForCausalLM",
}
# What transformers 5 itself does not load, or reads by a class of another name.
WITHOUT_ORACLE = ("Phi-3-mini-128k, first release", "gemma-3-4b-it")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in REFUSED])
def test_a_published_configuration_means_what_transformers_makes_of_it(name: str) -> None:
    hf: dict[str, Any] = CONFIGS[name]
    cfg = read_config(hf)
    if name not in WITHOUT_ORACLE:
        config_class = getattr(transformers, RULES[architecture_of(hf)].config_class)
        theirs = config_class.from_dict(copy.deepcopy(hf)).to_dict()
        assert read_config(theirs | {"architectures": hf["architectures"]}) == cfg


@pytest.mark.parametrize("name", REFUSED)
def test_a_configuration_that_cannot_be_computed_is_refused_by_its_reason(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        read_config(CONFIGS[name])


@pytest.mark.parametrize(("name", "billions"), [
    ("Llama-3.1-8B-Instruct", 8.03), ("Llama-2-70b", 68.98), ("Mixtral-8x7B", 46.70), ("Qwen3-30B-A3B", 30.53),
    ("gemma-2-27b", 27.23), ("Phi-3.5-mini", 3.82), ("Phi-4-mini", 3.84), ("gpt2-xl", 1.558), ("SmolLM3-3B", 3.08),
    ("DeepSeek-V2-Lite", 15.71), ("DeepSeek-V3-bf16", 671.03), ("Kimi-K2", 1026.4), ("gpt-oss-20b", 20.91),
    ("Qwen1.5-MoE", 14.32), ("granite-3.3-2b", 2.53), ("GLM-4-9B-0414", 9.40), ("gemma-3-4b-it", 3.88),
])  # fmt: skip
def test_the_parameters_of_a_published_model_are_as_many_as_published(name: str, billions: float) -> None:
    assert read_config(CONFIGS[name]).num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)


NONSENSE: list[Any] = ["x", "", None, float("nan"), float("inf"), -1, 0, 1, 2.5, 10**400, 1e300, 2**31, True, [], [1],
                       ["x"], [None], [[1]], ["full_attention"], {}, {"a": 1}, {"rope_type": "yarn"}, {"type": ["x"]},
                       {"full_attention": 3}, {"full_attention": {"rope_theta": "x"}}]  # fmt: skip
KEYS = ("text_config", "vision_config", "quantization", "rope_scaling", "rope_parameters", "rope_theta", "layer_types",
        "sliding_window", "architectures", "model_type", "partial_rotary_factor", "head_dim")  # fmt: skip


def test_a_damaged_configuration_gives_a_model_or_one_line() -> None:
    rng, configs = random.Random(0), list(CONFIGS.values())
    for _ in range(20_000):
        hf = dict(rng.choice(configs))
        hf |= {key: rng.choice(NONSENSE) for key in rng.sample([*hf, *KEYS], rng.randint(1, 4))}
        try:
            read_config(hf)
        except ValueError as error:
            assert "\n" not in str(error), hf
            assert len(str(error)) < 1000, hf
