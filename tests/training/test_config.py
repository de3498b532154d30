"""Every field of a training run is a flag and a name of its TOML file; what contradicts itself is refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from jaxllm.cli import main
from jaxllm.commands import train
from jaxllm.config.fields import describe
from jaxllm.training.config import TrainConfig

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def parsed(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train._fields(parser.parse_args(words))


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_documented_and_a_flag(name):
    doc = describe(TrainConfig)[name]
    assert doc.help
    flag = f"--{name.replace('_', '-')}"
    if name == "task":
        words, value = ["sft"], "sft"
    elif doc.kind is bool:
        words, value = ([f"--no-{flag[2:]}"], False) if doc.default else ([flag], True)
    elif doc.choices:
        words, value = [flag, doc.choices[-1]], doc.choices[-1]
    else:
        value = {int: 3, float: 0.5, str: "else"}[doc.kind]
        words = [flag, str(value)]
    assert parsed(*words) == {name: value}


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('task = "sft"\ndata = "a"\noutput = "b"\nsteps = 3\n')
    config = TrainConfig(**parsed("--config", str(file), "--steps", "5"))
    assert (config.task, config.data, config.steps, config.passes) == ("sft", "a", 5, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output": ""}, "output is missing; say --output PATH"),
        ({"steps": 0}, "steps=0; it must be at least 1"),
        ({"eval_fraction": 0.6, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"model": "x", "num_layers": 2}, "num_layers is for a model from scratch"),
        ({"lora_rank": 4}, "lora_rank adapts a model that there is"),
        ({"lora_alpha": 4.0}, "are of an adapter; say --lora-rank R"),
        ({"depth": 4, "num_heads": 4}, "leave out num_layers, num_heads and hidden_size"),
        ({"optimizer": "sgd"}, "use one of adamw, muon"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"balance_labels": True}, "balance_labels is for task classify"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"data": "a", "output": "b", **fields})


def test_the_command_says_one_line_and_fails(tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert main(["train", "--data", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip() == f"jaxllm: error: {tmp_path}/empty.txt: the file is empty"


def test_a_loss_that_is_no_number_ends_the_run(run):
    with pytest.raises(ValueError, match=r"the loss of step \d+ is (nan|inf); lower learning_rate.*pass 1, batch"):
        run("wild", learning_rate=1e30, max_grad_norm=0.0, weight_decay=0.0, eval_fraction=0.0)


def test_every_step_is_a_line_of_json(run):
    report = run("logged", steps=3)
    steps = [entry for entry in report["log"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu"} <= steps[0].keys()
    keys = {"task", "steps", "tokens", "train_loss", "eval_loss", "eval_accuracy", "tokens_per_s", "mfu", "output"}
    assert keys <= report.keys() and report["tokens"] == 3 * 8 * 16
    json.dumps({key: report[key] for key in keys})
