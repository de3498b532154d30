"""Schemas as people write them: closed, rewritten where that is exact, and what is left out is named."""

from __future__ import annotations

import itertools
import json

import pytest
from llguidance import LLMatcher

from jaxllm.constraints.json_schema import prepare

jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="comes with schemathesis")
CLOSED = [
    ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": 1, "b": 2}),
    ({"properties": {"a": {}}}, {"a": 1}, {"z": 1}),
    ({"type": "array", "items": {"type": "object", "properties": {"a": {}}}}, [{"a": 1}], [{"b": 1}]),
    (
        {
            "allOf": [{"$ref": "#/$defs/A"}, {"properties": {"b": {"type": "integer"}}, "required": ["b"]}],
            "$defs": {"A": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        },
        {"b": 2},
        {"b": 1, "c": 1},
    ),
    (
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"properties": {"b": {}}}]},
        {"a": 1, "b": 1},
        {"a": 1, "c": 1},
    ),
    ({"type": "object", "properties": {"d": {"type": "object"}}}, {"d": {"free": 1}}, {"free": 1}),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {"any": 1}, {"any": "text"}),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, {"b": 1}, [1]),
    ({"type": "object", "properties": {}, "required": ["a"]}, {"a": 1}, {"a": 1, "b": 1}),
]


@pytest.mark.parametrize(("schema", "fits", "does_not"), CLOSED)
def test_objects_have_no_keys_but_their_own(schema, fits, does_not):
    prepared, ignored = prepare(schema)
    assert not ignored
    check = jsonschema_rs.validator_for(prepared)
    assert check.is_valid(fits) and jsonschema_rs.validator_for(schema).is_valid(fits)
    assert not check.is_valid(does_not)


EXACT = [
    {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "maxItems": 2},
    {"type": "integer", "minimum": 0, "maximum": 3, "not": {"const": 1}},
    {"enum": ["a", 1, True, None], "not": {"enum": [True, "a"]}},
    {"type": ["string", "null"], "not": {"type": "null"}},
    {"type": "object", "propertyNames": {"pattern": "^a+$"}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}},
    {"type": "integer", "format": "int32"},
]
VALUES = [
    None,
    True,
    0,
    1,
    2,
    3,
    4,
    -1,
    2**31,
    2**31 - 1,
    "a",
    "b",
    [],
    {},
    {"a": 1},
    {"aa": 1},
    {"c": 1},
    {"a": "x"},
    *([list(p) for n in (1, 2, 3) for p in itertools.product([1, 2, 3], repeat=n)]),
]


@pytest.mark.parametrize("schema", EXACT)
def test_rewritten_keywords_mean_the_same(schema):
    prepared, ignored = prepare(schema)
    assert not ignored
    before, after = jsonschema_rs.validator_for(schema), jsonschema_rs.validator_for(prepared)
    narrow = schema.get("format") == "int32"  # a format that no validator checks
    for value in VALUES:
        assert after.is_valid(value) == (before.is_valid(value) and not (narrow and value == 2**31)), value


IGNORED = [
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "string", "format": "password"}, "format 'password'"),
    ({"type": "string", "pattern": "^(?!foo)[a-z]+$"}, "pattern '^(?!foo)[a-z]+$'"),
    ({"type": "string", "pattern": r"\bx\b"}, r"pattern '\\bx\\b'"),
    ({"type": "string", "not": {"pattern": "a"}}, "not"),
    ({"if": {"type": "string"}, "then": {"maxLength": 3}, "else": {"type": "null"}}, "if"),
    ({"type": "array", "contains": {"const": 1}}, "contains"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
]


@pytest.mark.parametrize(("schema", "keyword"), IGNORED)
def test_what_cannot_be_enforced_is_left_out_and_named(schema, keyword):
    nested = {"type": "object", "properties": {"x": {"anyOf": [schema, {"type": "null"}]}}}
    prepared, ignored = prepare(nested)
    assert ignored == (keyword,)
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(prepared)))


WRONG = [
    ({"$ref": "#"}, "refers to itself"),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}}, "refers to itself"),
    ({"$ref": "#/$defs/None"}, "points to nothing"),
    ({"$ref": "https://example.org/s.json"}, "points outside"),
    ({"type": "string", "pattern": "["}, "pattern '[' is not a regular expression"),
    ([1], "it is list"),
    ("{", "Expecting property name"),
]


@pytest.mark.parametrize(("schema", "message"), WRONG)
def test_a_wrong_schema_is_told_in_its_own_words(schema, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        prepare(schema)
    assert message in str(error.value)


def test_size_and_depth_are_bounded():
    deep: dict = {}
    for _ in range(100):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="nested more than"):
        prepare(deep)
    defs = {f"n{i}": {"allOf": [{"$ref": f"#/$defs/n{i + 1}"}] * 3} for i in range(20)}
    with pytest.raises(ValueError, match="parts"):
        prepare({"$ref": "#/$defs/n0", "$defs": {**defs, "n20": {"type": "object", "properties": {"a": {}}}}})


NUMBERS = [
    ({"type": "number"}, ["0", "-1.5", "12345.678", "0.123456789"], ["1.1111111111", "1.0000000000", "3" * 30, "1e5"]),
    ({"type": "integer"}, ["0", "-7", "9" * 18], ["9" * 19, "1.0"]),
    ({"type": ["number", "null"], "minimum": 0, "maximum": 1}, ["0.5", "1", "null"], ["0.33333333333", "2"]),
    ({"type": "number", "maximum": 1e-12, "minimum": 0}, ["0.0000000000005"], ["1"]),
]


@pytest.mark.parametrize(("schema", "fit", "do_not"), NUMBERS)
def test_numbers_end(schema, fit, do_not):
    from llguidance import LLTokenizer

    prepared, ignored = prepare(schema)
    assert not ignored
    tokenizer = LLTokenizer("byte")
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(prepared))

    def is_whole(text: str) -> bool:
        matcher = LLMatcher(tokenizer, grammar)
        return matcher.try_consume_tokens(list(text.encode())) == len(text) and matcher.is_accepting()

    assert [text for text in fit if not is_whole(text)] == []
    assert [text for text in do_not if is_whole(text)] == []
