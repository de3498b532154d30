"""Rule files, meshes and sizes: what is legal is loaded, what is not is refused in one line that helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm.config import ModelConfig
from jaxllm.sharding.rules import (
    CUTTABLE_DIMS,
    ShardingRules,
    check_divides,
    kv_copies,
    load_rules,
    parse_mesh,
    rules_folder,
    vocab_padding,
)

SMOLLM2 = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
HEADS_ON_TP = ShardingRules("test", {"heads": "tp", "vocab": "tp"})


def rules_file(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(call, *args) -> str:
    with pytest.raises(ValueError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_shipped_rule_file_loads_under_its_own_name():
    names = {path.stem for path in rules_folder().glob("*.toml")}
    assert {"megatron", "column_only", "replicated"} <= names
    for name in names:
        assert load_rules(name).name == name


def test_megatron_cuts_columns_then_rows_and_replicated_nothing():
    megatron, replicated = load_rules("megatron"), load_rules("replicated")
    assert megatron.axes(("model_in", "heads", "qkv", "head_dim"), parameter=True) == (None, "tp", None, None)
    assert megatron.axes(("heads_in", "group", "head_dim", "model_out"), parameter=True)[0] == "tp"
    assert megatron.axes(("ffn_in", "model_out"), parameter=True) == ("tp", None)
    assert set(replicated.axes(tuple(CUTTABLE_DIMS), parameter=True)) == {None}


def test_rules_load_from_a_path_with_separate_tables(tmp_path):
    rules = load_rules(rules_file(tmp_path, '[parameters]\nffn = "tp"\n[activations]\ntokens = "dp"\n'))
    assert rules.name == "mine"
    assert rules.axes(("ffn", None), parameter=True) == ("tp", None)
    assert rules.axes(("tokens", "ffn"), parameter=False) == ("dp", None)


def test_unknown_name_lists_what_is_shipped():
    message = refusal(load_rules, "megatorn")
    assert "'megatorn'" in message
    for name in ("megatron", "column_only", "replicated"):
        assert name in message


def test_missing_file_is_named(tmp_path):
    assert "absent.toml" in refusal(load_rules, str(tmp_path / "absent.toml"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[parameters\n", ["mine.toml", "not valid TOML"]),
        ('[parameters]\nffn = "tp"\nffn = "dp"\n', ["mine.toml", "not valid TOML"]),
        ('[weights]\nffn = "tp"\n', ["unknown table 'weights'", "parameters and activations"]),
        ('parameters = "tp"\n', ["parameters must be a table"]),
        ('[parameters]\nffn = "xp"\n', ["ffn = 'xp'", "dp, fsdp, cp, ep, tp"]),
        ('[parameters]\nffn = ["dp", "xp"]\n', ["ffn = ['dp', 'xp'] is no mesh axis"]),
        ('[parameters]\nffn = ["dp", "dp"]\n', ["ffn = ['dp', 'dp'] names an axis twice"]),
        ('gather_weights = ["xp"]\n', ["gather_weights = ['xp'] is no mesh axis"]),
        (
            '[activations]\npages = "dp"\n',
            ["pages = ['dp'] but tokens = []", "tokens must begin with"],
        ),
        ('[activations]\npages = "dp"\ntokens = ["tp", "dp"]\n', ["tokens = ['tp', 'dp']"]),
        ('[activations]\ntokens = ["cp", "tp"]\n', ["tokens = ['cp', 'tp'] has more than one axis beyond pages = []"]),
        ("[activations]\nffn = 2\n", ["ffn = 2"]),
        ('[parameters]\nfnn = "tp"\n', ["'fnn' is unknown", "ffn"]),
        ('[parameters]\nhead_dim = "tp"\n', ["'head_dim' cannot be cut", "heads"]),
        ('[activations]\nqkv = "tp"\n', ["'qkv' cannot be cut"]),
    ],
)
def test_fault_in_a_rule_file_is_named_with_what_would_be_right(tmp_path, text, named):
    message = refusal(load_rules, rules_file(tmp_path, text))
    for part in named:
        assert part in message


def test_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    assert "not valid TOML" in refusal(load_rules, str(tmp_path / "mine.toml"))


def test_one_axis_on_two_dims_of_one_array_is_refused():
    rules = ShardingRules("twice", {"model_in": "tp", "ffn": "tp"})
    with pytest.raises(ValueError, match=r"'twice' put axis 'tp' on two dims of one array .*model_in.*ffn"):
        rules.axes(("model_in", "gate_up", "ffn"), parameter=True)
    assert rules.axes(("model_in", "gate_up", "ffn"), parameter=False) == (None, None, None)
    assert rules.axes(("ffn", "model_out"), parameter=True) == ("tp", None)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("tp=1", {"tp": 1}), ("dp=2,tp=4", {"dp": 2, "tp": 4}), (" tp=3 , dp=1 ", {"tp": 3, "dp": 1})],
)
def test_mesh_text_becomes_sizes_in_its_order(text, sizes):
    assert list(parse_mesh(text).items()) == list(sizes.items())


@pytest.mark.parametrize(
    "text", ["", "tp", "tp=", "=3", "tp=0", "tp=-1", "tp=2.0", "tp=x", "xp=2", "tp=2,", "tp=2;dp=2", "TP=2"]
)
def test_bad_mesh_text_is_refused_with_an_example(text):
    message = refusal(parse_mesh, text)
    assert repr(text) in message
    assert "tp=4" in message


def test_digits_of_other_kinds_are_refused_with_an_example():
    assert "tp=4" in refusal(parse_mesh, "tp=²")


def test_axis_named_twice_is_refused():
    assert "'tp' twice" in refusal(parse_mesh, "tp=2,tp=4")


@pytest.mark.parametrize(("size", "copies"), [(1, 1), (3, 1), (9, 3)])
def test_nine_heads_on_three_kv_heads_are_cut_by_1_3_or_9(size, copies):
    assert kv_copies(SMOLLM2, HEADS_ON_TP, {"tp": size}) == copies


@pytest.mark.parametrize("size", [2, 4, 6, 8, 18, 27])
def test_a_cut_inside_a_head_names_the_legal_sizes(size):
    message = refusal(kv_copies, SMOLLM2, HEADS_ON_TP, {"tp": size})
    assert f"tp={size}" in message
    assert "num_heads=9" in message and "num_kv_heads=3" in message
    assert message.endswith("use tp=1, 3 or 9")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "legal"),
    [(32, 8, {1, 2, 4, 8, 16, 32}), (12, 4, {1, 2, 4, 12}), (6, 6, {1, 2, 3, 6}), (8, 1, {1, 2, 4, 8})],
)
def test_legal_sizes_leave_every_device_whole_heads(heads, kv_heads, legal):
    config = replace(SMOLLM2, num_heads=heads, num_kv_heads=kv_heads)
    for size in range(1, heads + 2):
        if size not in legal:
            refusal(kv_copies, config, HEADS_ON_TP, {"tp": size})
            continue
        stored = kv_heads * kv_copies(config, HEADS_ON_TP, {"tp": size})
        assert stored == max(kv_heads, size), "heads are repeated only as often as devices need them"
        assert heads % stored == 0


def test_heads_cut_as_activations_alone_are_checked_too():
    rules = ShardingRules("mine", {}, {"heads": ("dp", "tp")})
    assert refusal(kv_copies, SMOLLM2, rules, {"dp": 2, "tp": 2}).endswith("dp*tp=4 between heads; use dp*tp=1, 3 or 9")
    assert kv_copies(SMOLLM2, rules, {"dp": 3, "tp": 3}) == 3


def test_heads_that_lie_on_no_axis_need_no_copies():
    assert kv_copies(SMOLLM2, ShardingRules("none"), {"tp": 2}) == 1
    assert kv_copies(SMOLLM2, HEADS_ON_TP, {"dp": 2}) == 1


@pytest.mark.parametrize(
    ("vocab", "size", "padding"), [(49152, 3, 0), (49152, 9, 6), (258, 4, 2), (7, 8, 1), (7, 1, 0)]
)
def test_vocabulary_is_padded_to_the_next_multiple(vocab, size, padding):
    assert vocab_padding(replace(SMOLLM2, vocab_size=vocab), HEADS_ON_TP, {"tp": size}) == padding
    assert (vocab + padding) % size == 0


def test_vocabulary_that_is_not_cut_is_not_padded():
    assert vocab_padding(SMOLLM2, ShardingRules("none"), {"tp": 5}) == 0
    assert vocab_padding(SMOLLM2, HEADS_ON_TP, {"dp": 5}) == 0


def test_dim_that_does_not_divide_is_named_with_the_sizes_that_do():
    mesh = {"tp": 4}
    check_divides("down", (12, 7), ("ffn_in", "model_out"), ("tp", None), mesh)
    check_divides("down", (12, 7), ("ffn_in", "model_out"), (None, "dp"), mesh)
    message = refusal(check_divides, "layers.0.down", (12, 6), ("ffn_in", "model_out"), (None, "tp"), mesh)
    assert message == "layers.0.down: dim model_out=6 does not divide by mesh axis tp=4; use tp=1, 2, 3 or 6"
