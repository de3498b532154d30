"""The compiled program holds the collectives that the shipped rules promise, and no others."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from jaxllm.config import EngineConfig
from jaxllm.sharding.collectives import KINDS, count_collectives, format_counts
from tests.helpers.tiny_model import HIDDEN, write_tiny_model

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
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert cells["all-reduce"] == ["2", "5", f"{counts['bytes']['all-reduce']:,}"]
    assert cells == {kind: cells[kind] for kind in KINDS}
