"""Every field of every configuration class of the installed transformers has its rule, and the rules are true."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxllm.families.architecture_fields import RULES
from jaxllm.families.field_rules import HARMLESS, ROPE
from jaxllm.families.registry import ARCHITECTURES

ROOT = Path(__file__).parents[2]


def declared(config_class: Any) -> set[str]:
    """What the class knows: its own fields, the base's, and other names of them."""
    return {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)


@pytest.mark.parametrize("architecture", RULES)
def test_every_field_that_transformers_declares_is_classified_once(architecture: str) -> None:
    rules = RULES[architecture]
    config_class = getattr(transformers, rules.config_class)
    kinds = [
        rules.computed | rules.undeclared | ROPE,
        HARMLESS | rules.harmless,
        set(rules.neutral),
        set(rules.spellings),
    ]
    for name in sorted(declared(config_class)):
        found = [kind for kind in kinds if name in kind]
        assert len(found) == 1 or name in rules.spellings, f"{rules.config_class}.{name}: {len(found)} kinds"


@pytest.mark.parametrize("architecture", RULES)
def test_no_rule_is_about_a_field_that_is_not_there(architecture: str) -> None:
    rules = RULES[architecture]
    config_class = getattr(transformers, rules.config_class)
    names = declared(config_class)
    assert config_class.model_type == rules.model_type
    assert rules.computed | set(rules.neutral) <= names
    assert not rules.undeclared & {field.name for field in dataclasses.fields(config_class)}
    assert not set(rules.foreign) & names
    pairs = {frozenset(pair) for pair in rules.spellings.items()}
    assert pairs == {frozenset(pair) for pair in config_class.attribute_map.items()}


@pytest.mark.parametrize("architecture", RULES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    rules = RULES[architecture]
    defaults = {field.name: field.default for field in dataclasses.fields(getattr(transformers, rules.config_class))}
    assert rules.defaults == {name: defaults[name] for name in rules.defaults}
    for name in rules.neutral:
        assert defaults[name] is None or defaults[name] in rules.neutral[name]


@pytest.mark.parametrize("architecture", RULES)
def test_null_is_taken_where_transformers_takes_it(architecture: str) -> None:
    rules = RULES[architecture]
    for field in dataclasses.fields(getattr(transformers, rules.config_class)):
        if field.name in rules.computed:
            assert rules.refuses_null(field.name) == (type(None) not in typing.get_args(field.type)), field.name
    assert rules.nullable <= rules.computed


def test_the_document_lists_what_the_rules_say() -> None:
    spec = importlib.util.spec_from_file_location("config_fields", ROOT / "scripts" / "config_fields.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FILE.read_text(encoding="utf-8") == script.table(), "run python scripts/config_fields.py"


def test_every_supported_architecture_has_rules() -> None:
    assert set(ARCHITECTURES) == set(RULES)
