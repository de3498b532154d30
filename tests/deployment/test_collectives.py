"""The compiled program holds the collectives that the shipped rules promise, and no others."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from jaxllm.cli import main
from jaxllm.config import EngineConfig
from jaxllm.deployment.collectives import count_collectives, format_counts
from jaxllm.deployment.program_text import KINDS, find_collectives
from tests.helpers.tiny_model import HIDDEN, write_tiny_model

pytestmark = pytest.mark.optimized

NONE = dict.fromkeys(KINDS, 0)


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory):
    """Counts by (layers, rules, tokens, mesh); every program is compiled once."""
    model = functools.cache(lambda layers: write_tiny_model(tmp_path_factory.mktemp("tiny"), num_layers=layers))

    @functools.cache
    def run(layers: int, rules: str, tokens: int = 16, mesh: str = "tp=2") -> dict:
        config = EngineConfig(
            model=str(model(layers)), mesh=mesh, sharding_rules=rules, dtype="float32", max_num_seqs=4
        )
        return count_collectives(config, num_tokens=tokens)

    return run


@pytest.mark.parametrize(
    ("rules", "per_block"),
    [("megatron", NONE | {"all-reduce": 2}), ("column_only", NONE | {"all-gather": 4}), ("replicated", NONE)],
)
def test_shipped_rules_cost_what_they_promise_in_each_block(count, rules, per_block):
    assert count(2, rules)["per_block"] == per_block


@pytest.mark.parametrize("rules", ["megatron", "column_only"])
def test_one_more_layer_adds_exactly_one_block_of_collectives(count, rules):
    """Needs no names in the program: an independent check of what is counted as inside a block."""
    two, three = count(2, rules), count(3, rules)
    growth = {kind: three["total"][kind] - two["total"][kind] for kind in KINDS}
    assert growth == two["per_block"] == three["per_block"]
    assert (two["num_layers"], three["num_layers"]) == (2, 3)


def test_nothing_runs_when_nothing_is_cut(count):
    assert count(2, "replicated")["total"] == NONE
    assert count(2, "replicated")["bytes"] == NONE


def test_number_of_collectives_does_not_depend_on_the_number_of_tokens(count):
    small, large = count(2, "megatron", 16), count(2, "megatron", 32)
    assert small["total"] == large["total"]
    assert large["bytes"]["all-reduce"] == 2 * small["bytes"]["all-reduce"]


def test_megatron_reduces_two_residuals_per_block_and_the_embedding(count):
    for layers in (2, 3):
        assert count(layers, "megatron")["total"] == NONE | {"all-reduce": 2 * layers + 1}
        assert count(layers, "megatron")["bytes"] == NONE | {"all-reduce": (2 * layers + 1) * 16 * HIDDEN * 4}


def test_rules_of_ones_own_work_from_a_path(count, tmp_path: Path):
    """Only the feed-forward cut: one all-reduce per block is left."""
    path = tmp_path / "ffn_only.toml"
    cut = 'ffn = "tp"\nffn_in = "tp"\n'
    path.write_text(f"[parameters]\n{cut}[activations]\n{cut}", encoding="utf-8")
    counts = count(2, str(path))
    assert counts["per_block"] == NONE | {"all-reduce": 1}
    assert counts["total"] == NONE | {"all-reduce": 2}


def test_report_carries_what_was_asked_and_its_table_shows_every_kind(count):
    counts = count(2, "megatron")
    assert (counts["mesh"], counts["sharding_rules"], counts["num_tokens"]) == ({"tp": 2}, "megatron", 16)
    lines = format_counts(counts).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[2 : 2 + len(KINDS)]}
    assert cells["all-reduce"] == ["2", "5", f"{counts['bytes']['all-reduce']:,}"]
    assert cells == {kind: cells[kind] for kind in KINDS}


def test_table_of_a_block_says_what_each_device_holds_and_where_it_was_reduced(count):
    table = {step["step"]: step for step in count(2, "megatron")["block"]}
    held = {name: [device["slices"] for device in step["devices"]] for name, step in table.items()}
    whole = [[0, 16], [0, HIDDEN]]
    for name in ("x", "after attention", "after ffn"):
        assert held[name] == [whole, whole]
    assert held["ffn hidden"] == [[[0, 16], [0, HIDDEN]], [[0, 16], [HIDDEN, 2 * HIDDEN]]]
    assert [box[1] for box in held["qkv"]] == [[0, 1], [1, 2]]  # whole heads
    reduced = {name for name, step in table.items() if step["collectives"]}
    assert reduced == {"after attention", "after ffn"}
    assert [device["mesh"] for device in table["x"]["devices"]] == [{"tp": 0}, {"tp": 1}]
    text = format_counts(count(2, "megatron"))
    assert "[:, 64:128]" in text and "all-reduce (4,096 bytes)" in text


def test_every_collective_of_a_block_is_in_its_table(count):
    for rules in ("megatron", "column_only", "replicated"):
        counts = count(2, rules)
        sent = [c["kind"] for step in counts["block"] for c in step["collectives"]]
        assert {kind: sent.count(kind) for kind in KINDS} == counts["per_block"]


def test_tpu_program_is_counted_where_a_topology_is_named_and_drawn_where_a_file_is(tmp_path, capsys):
    model = write_tiny_model(tmp_path / "one", num_layers=1)
    picture = tmp_path / "block.png"
    args = ["--model", str(model), "--mesh", "tp=2", "--topology", "v5e:2x2", "--plot", str(picture)]
    assert main(["collectives", *args]) == 0
    assert "all-reduce                   2       3" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "size", "num_bytes"),
    [
        ("%a = f32[4,8]{1,0} all-reduce(%b), replica_groups=[2,4]<=[8], to_apply=%add", 4, 128),
        ("%a = bf16[4,8]{1,0} all-gather(%b), replica_groups={{0,1},{2,3}}, dimensions={0}", 2, 64),
        ("%a = bf16[4]{0:T(8)S(1)} all-reduce(%b), replica_groups=mesh['a'=3,'b'=2] {'b','a'}, x=1", 6, 8),
        ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%b), replica_groups={{0,1,2,3}}, dimensions={0}", 4, 32),
        ("%a = f32[2]{0} collective-permute(%b), source_target_pairs={{0,1},{1,0}}", 2, 8),
    ],
)
def test_collective_is_read_in_every_spelling(text, size, num_bytes):
    (found,) = find_collectives("  " + text)
    assert (found.group_size, found.num_bytes) == (size, num_bytes)
