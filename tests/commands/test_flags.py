"""Flags and configuration classes cannot drift apart: one is made from the other."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import pytest

from jaxllm.cli import COMMANDS
from jaxllm.commands.flags import add_engine_flags, add_sampling_flags, engine_arguments, sampling_arguments
from jaxllm.config import EngineConfig
from jaxllm.config.fields import describe
from jaxllm.config.sampling import SamplingParams


def engine_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    return parser


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_field_is_documented(cls):
    assert [name for name, doc in describe(cls).items() if not doc.help] == []


def test_no_flag_is_the_default_configuration():
    assert EngineConfig(**engine_arguments(engine_parser().parse_args([]))) == EngineConfig()


OTHER: dict[type, Any] = {bool: None, int: 64, float: 0.5, str: "else"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineConfig)])
def test_every_field_is_a_flag_with_its_name_type_and_help(name):
    doc = describe(EngineConfig)[name]
    flag = f"--{name.replace('_', '-')}"
    if doc.kind is bool:
        words, expected = [f"--no-{flag[2:]}" if doc.default else flag], not doc.default
    elif doc.choices:
        words, expected = [flag, doc.choices[-1]], doc.choices[-1]
    elif typing.get_origin(doc.kind) is Mapping:
        words, expected = [flag, '{"a": 1}'], {"a": 1}
    else:
        words, expected = [flag, str(OTHER[doc.kind])], OTHER[doc.kind]
    args = engine_arguments(engine_parser().parse_args(words))
    assert args[name] == expected != getattr(EngineConfig(), name)
    assert " ".join(doc.help.removesuffix(".").split()[:3]) in " ".join(engine_parser().format_help().split())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mesh", 3, "text"),
        ("max_num_seqs", 2.0, "whole number"),
        ("max_num_seqs", True, "whole number"),
        ("seed", None, "whole number"),
        ("deterministic", 1, "True or False"),
        ("dtype", ["float32"], "one of auto"),
        ("kv_dtype", "int4", "one of auto"),
        ("gpu_memory_utilization", "0.9", "a number"),
        ("tokenizer", 1, "text"),
        ("preemption_mode", None, "one of auto"),
        ("disk_kv_path", 7, "text"),
        ("process_id", "1", "whole number"),
        ("default_chat_template_kwargs", "{}", "a table"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=f"^{name}=.*{words}"):
        EngineConfig(**{name: value})


def test_sampling_flags_override_only_what_was_given():
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser, max_tokens=7)
    assert sampling_arguments(parser.parse_args([])) == {"n": 1, "max_tokens": 7, "ignore_eos": False}
    args = sampling_arguments(parser.parse_args(["--top-p", "0.5", "--stop", "a", "--stop", "b", "--no-ignore-eos"]))
    assert args == {"n": 1, "max_tokens": 7, "ignore_eos": False, "top_p": 0.5, "stop": ["a", "b"]}


def test_every_command_says_what_it_does():
    assert all(module.HELP.endswith(".") for module in COMMANDS)
