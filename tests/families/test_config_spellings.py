"""A configuration means what transformers makes of it: older and newer spellings, missing fields, nulls, nonsense.

The oracle is transformers' configuration class: it reads the same keys and writes them down again in its own spelling,
and both must give the same ModelConfig. What its values compute is compared in test_families.py.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import transformers
from tiny import FAMILIES

from jaxllm.config import ModelConfig
from jaxllm.families import notices, read_config
from jaxllm.families.architecture_fields import RULES
from jaxllm.families.registry import architecture_of

# Refused where they are missing: transformers' own size would be another model's.
REQUIRED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps num_local_experts "
    "max_position_embeddings n_positions n_embd n_layer n_head query_pre_attn_scalar num_experts num_experts_per_tok "
    "moe_intermediate_size n_routed_experts kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
).split()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "rope_scaling beside rope_parameters": {"rope_scaling": YARN},
    "rope_scaling with a theta of its own": {"rope_scaling": {**YARN, "rope_theta": 99.0}, "rope_theta": 777.0},
    "rope_scaling and rope_theta": {"rope_scaling": YARN, "rope_theta": 777.0},
    "rope_scaling by its older key": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_scaling by both keys": {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
    "rope_scaling null": {"rope_scaling": None, "rope_theta": 777.0},
    "rope_scaling empty": {"rope_scaling": {}, "rope_theta": 777.0},
    "rope_scaling with a stranger": {"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}},
    "rope_parameters without theta": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 777.0},
    "rope_parameters null": {"rope_parameters": None, "rope_theta": 777.0},
    "no original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "original length beside": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    """A configuration class of transformers and one of its configurations as JSON."""
    config = FAMILIES[name].hf_config()
    return type(config), {**config.to_dict(), "architectures": [FAMILIES[name].architecture]}


def as_transformers_reads(config_class: Any, hf: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration in transformers' own spelling, or None where it refuses it."""
    try:
        return config_class.from_dict(copy.deepcopy(hf)).to_dict()
    except Exception:  # of many kinds: a strict dataclass's, KeyError, ZeroDivisionError
        return None


def outcome(hf: dict[str, Any]) -> ModelConfig | None:
    """What is read; None where it is refused: transformers' classes take what its models then stumble over."""
    try:
        return read_config(hf)
    except ValueError:
        return None


def check(config_class: Any, hf: dict[str, Any], label: str) -> bool:
    """Both spellings have one outcome; whether it is a model."""
    theirs = as_transformers_reads(config_class, hf)
    if theirs is None:
        return False
    assert outcome(hf) == outcome(theirs), label
    return outcome(hf) is not None


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("gpt2")])
def test_rope_spellings_mean_what_transformers_makes_of_them(name: str) -> None:
    config_class, base = tiny(name)
    taken = 0
    for label, change in ROPES.items():
        for start in (base, {key: value for key, value in base.items() if key != "rope_parameters"}):
            taken += check(config_class, start | change, label)
    assert taken > (5 if name.startswith("phi3") else 20)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_missing_or_null_field_means_what_transformers_makes_of_it(name: str) -> None:
    config_class, base = tiny(name)
    rules = RULES[architecture_of(base)]
    for key in sorted((rules.computed | rules.undeclared) - {"num_key_value_heads"} & rules.computed):
        missing = {k: v for k, v in base.items() if k != key}
        if key in REQUIRED and key not in rules.spellings.values() and key not in rules.defaults:
            with pytest.raises(ValueError, match=f"{key}="):
                read_config(missing)
        elif key not in REQUIRED:
            check(config_class, missing, f"without {key}")
        if key in base and as_transformers_reads(config_class, base | {key: None}) is None:
            with pytest.raises(ValueError, match=key):
                read_config(base | {key: None})
        elif key not in REQUIRED:
            check(config_class, base | {key: None}, f"{key} null")


@pytest.mark.parametrize("name", [name for name in FAMILIES if RULES[FAMILIES[name].architecture].spellings])
def test_other_names_of_a_field_win_as_in_transformers(name: str) -> None:
    config_class, base = tiny(name)
    for other, key in RULES[FAMILIES[name].architecture].spellings.items():
        value = base.get(key, base.get(other))
        without = {k: v for k, v in base.items() if k not in (key, other)}
        assert check(config_class, without | {other: value}, other)
        assert check(config_class, without | {key: value, other: 2 * value}, f"{other} beside {key}")


NONSENSE = ["seven", "", float("nan"), float("inf"), -1, 0, 1.5, 10**30, 10**400, True, [], [None], {}, {"a": 1}, [[1]]]


@pytest.mark.parametrize("name", FAMILIES)
def test_nonsense_gives_one_line_that_names_the_field(name: str) -> None:
    _, base = tiny(name)
    rules = RULES[architecture_of(base)]
    keys = (
        rules.computed | rules.undeclared | set(rules.neutral) | set(rules.spellings) | {"rope_scaling", "rope_theta"}
    )
    for key in sorted(keys):
        for value in NONSENSE:
            try:
                cfg = read_config(base | {key: value})
            except ValueError as error:
                assert "\n" not in str(error), (key, value)
                assert len(str(error)) < 500, (key, value)
            else:
                assert isinstance(cfg, ModelConfig), (key, value)
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "rms_norm_eps"):
        if key in rules.computed:
            for value in ("seven", float("nan"), -1, True, [], {}):
                with pytest.raises(ValueError, match=key):
                    read_config(base | {key: value})


@pytest.mark.parametrize(
    "rope",
    [
        [1],
        "yarn",
        3,
        {"rope_type": 3},
        {"rope_type": "yarn", "factor": "4"},
        {"rope_type": "yarn", "factor": float("nan")},
        {"rope_type": "yarn", "factor": -2},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": []},
        {"rope_type": "yarn", "factor": 2.0, "mscale": "x", "mscale_all_dim": 1.0},
        {"rope_type": "longrope", "short_factor": ["x"], "long_factor": [1.0]},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_theta": "big"},
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_nonsense_in_the_rope_parameters_is_refused(key: str, rope: Any) -> None:
    _, base = tiny("qwen3")
    with pytest.raises(ValueError, match=r"rope_|factor|beta_fast|mscale"):
        read_config(base | {key: rope})


def test_a_base_that_is_lost_with_rope_parameters_is_said(caplog: pytest.LogCaptureFixture) -> None:
    notices.say_once.cache_clear()
    _, base = tiny("qwen3")
    base["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert read_config(base | {"rope_scaling": YARN}).rope_theta == 1e4
    assert "rope_theta=1000000.0" in caplog.text
    assert read_config(base | {"rope_scaling": {**YARN, "rope_theta": 1e6}}).rope_theta == 1e6


# Fields that act only with others, or whose double says the same here.
WITH: dict[str, dict[str, Any]] = {
    "use_sliding_window": {"sliding_window": 8, "max_window_layers": 1},
    "sliding_window": {"use_sliding_window": True, "max_window_layers": 1},
    "max_window_layers": {"use_sliding_window": True, "sliding_window": 8},
    "no_rope_layer_interval": {"no_rope_layers": None},
}
OTHER = {"max_window_layers": 0, "decoder_sparse_step": 3, "n_inner": 100, "q_lora_rank": 16}


def changed(value: Any, key: str) -> Any:
    """Another value that makes sense for the field."""
    match value:
        case _ if key in OTHER:
            return OTHER[key]
        case bool():
            return not value
        case int() | float():
            return 2 * value or 1
        case str():
            return "gelu_new" if value == "silu" else "silu"
        case list():
            return [0, 2]
        case _:
            return 2.5


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "phi3"])
def test_every_computed_field_changes_the_model_or_is_refused(name: str) -> None:
    """A rule that calls a field computed is a lie where no family reads it."""
    _, base = tiny(name)
    rules = RULES[architecture_of(base)]
    base.pop("layer_types", None)
    for other, key in rules.spellings.items():
        base.setdefault(key, base.pop(other, None))
    for key in sorted(rules.computed - {"layer_types"}):
        start = base | {k: v for k, v in WITH.get(key, {}).items() if k in base}
        value = changed(base.get(key), key)
        after = outcome(start | {key: value})
        assert after is None or after != read_config(start), f"{key}: {base.get(key)} -> {value}"


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "olmo3", "smollm3", "qwen2_moe", "gpt_oss"])
def test_layer_types_say_which_layers_slide(name: str) -> None:
    _, base = tiny(name)
    types = ["full_attention"] * base["num_hidden_layers"]
    types[1] = "sliding_attention"
    local = read_config(base | {"layer_types": types}).local
    assert local is not None
    assert local.layers == (1,)


def test_an_architecture_by_another_name_and_none_but_the_model_type() -> None:
    _, base = tiny("llama")
    want = read_config(base)
    for names in (["LLaMAForCausalLM"], [], None):
        assert read_config(base | {"architectures": names}) == want
    del base["architectures"]
    assert read_config(base) == want
    with pytest.raises(ValueError, match="model_type 'unheard_of'"):
        read_config(base | {"model_type": "unheard_of"})
    with pytest.raises(ValueError, match="LlamaForTokenClassification"):
        read_config(base | {"architectures": ["LlamaForTokenClassification"]})
    with pytest.raises(ValueError, match="architectures='LlamaForCausalLM'"):
        read_config(base | {"architectures": "LlamaForCausalLM"})
    assert transformers.LlamaConfig.model_type == RULES["LlamaForCausalLM"].model_type


@pytest.mark.parametrize(
    ("name", "field", "neutral", "others"),
    [
        ("qwen2", "use_mrope", False, (True, "yes")),
        ("qwen3_moe", "qkv_bias", False, (True,)),
        ("qwen3_moe", "use_qk_norm", True, (False,)),
        ("qwen3_moe", "shared_expert_intermediate_size", 0, (64,)),
        ("llama", "use_qk_norm", False, (True, 1)),
        ("llama", "sliding_window", None, (4096,)),
        ("llama", "layer_types", ["full_attention"] * 2, (["sliding_attention"] * 2,)),
        ("llama", "partial_rotary_factor", 1.0, (0.5,)),
        ("llama", "is_causal", True, (False,)),
        ("phi3", "lm_head_bias", False, (True,)),
        ("deepseek_v3", "moe_layer_freq", 1, (2,)),
        ("deepseek_v3", "topk_method", "noaux_tc", ("greedy",)),
        ("gemma2", "hidden_act", "gelu", ("silu",)),
        ("gpt2", "add_cross_attention", False, (True,)),
    ],
)
def test_a_field_of_other_code_passes_only_with_the_value_that_is_computed(name, field, neutral, others) -> None:
    _, base = tiny(name)
    base.pop(field, None)
    assert read_config(base | {field: neutral}) == read_config(base)
    for other in others:
        with pytest.raises(ValueError, match=re.escape(f"{field}={other!r}")):
            read_config(base | {field: other})
