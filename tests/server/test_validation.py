"""The mistakes people make most: each gets one line that says what came and what to do."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.helpers.patience import patience
from tests.server.test_middleware import assert_error

COMPLETION, CHAT, RESPONSE = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HI = {"messages": [{"role": "user", "content": "hi"}]}
X = {"prompt": "x"}


def schema(value: Any) -> dict[str, Any]:
    return HI | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


MISTAKES = [
    (COMPLETION, X | {"temperature": -1}, "temperature is -1; it must be at least 0"),
    (COMPLETION, X | {"temperature": "hot"}, "temperature is a string; it must be a number"),
    (COMPLETION, X | {"max_tokens": "ten"}, "max_tokens is a string; it must be a whole number"),
    (COMPLETION, X | {"max_tokens": 10.5}, "max_tokens is 10.5; it must be a whole number"),
    (COMPLETION, X | {"max_tokens": True}, "max_tokens is true; it must be a whole number"),
    (COMPLETION, X | {"n": 1000}, "n is 1000; it must be at most 128"),
    (COMPLETION, X | {"logit_bias": {"yes": 5}}, "logit_bias.yes is 'yes'; it must be a match of the pattern"),
    (COMPLETION, {"prompt": 5}, "prompt is 5; it must be a string or a list"),
    (COMPLETION, {"prompt": []}, "prompt has 0 entries; it must have at least 1"),
    (COMPLETION, {"prompt": [1, 2, "a"]}, "prompt.2 is a string; it must be a whole number"),
    (COMPLETION, {"prompt": ["a", 1]}, "prompt.1 is 1; it must be a string"),
    (COMPLETION, {"prompt": ""}, "the prompt is empty; give at least one character"),
    (COMPLETION, {"prompt": [1] * 600}, "the prompt has 600 tokens and max_model_len is 512"),
    (COMPLETION, HI, "prompt is missing; a conversation goes to /v1/chat/completions"),
    (COMPLETION, [1], "the body is a list; it must be an object"),
    (COMPLETION, X | {"guided_json": {}}, "guided_json is not a field here; use structured_outputs.json"),
    (CHAT, X, "messages is missing; a plain prompt goes to /v1/completions"),
    (CHAT, HI | {"max_token": 5}, "max_token is not a field here; use max_tokens"),
    (CHAT, HI | {"stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
    (CHAT, {"messages": ["hi"]}, "messages.0 is a string; it must be an object"),
    (CHAT, {"messages": [{"role": "bot", "content": "x"}]}, "messages[0] has role 'bot'; expected one of system, "),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0] has no content; give text"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": ["x"]}]},
        "messages.0.content.0 is a string; it must be an object",
    ),
    (CHAT, HI | {"response_format": "json"}, "response_format is a string; it must be an object"),
    (CHAT, HI | {"response_format": {"type": "json_schema"}}, "response_format has no json_schema.schema; put"),
    (CHAT, schema({"type": "objekt"}), "the JSON schema is not usable: Invalid type: objekt"),
    (CHAT, HI | {"tools": [{"name": "f"}]}, "tools.0.type is missing; add it"),
    (
        CHAT,
        HI | {"tool_choice": "always"},
        "tool_choice is 'always'; it must be 'none', 'auto' or 'required' or an object",
    ),
    (CHAT, HI | {"tool_choice": "required"}, "tool_choice asks for a call, but there are no tools; give some"),
    (RESPONSE, {"input": "x", "max_tokens": 3}, "max_tokens is not a field here; use max_output_tokens"),
    (RESPONSE, {"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format has no schema; put"),
    ("/tokenize", {}, "give either prompt (a text) or messages (a conversation)"),
]


@pytest.mark.parametrize(("route", "body", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_remedy(http, route, body, message):
    error = assert_error(http.post(route, json=body), 400)
    assert error["message"].startswith(message) and "\n" not in error["message"], error


BROKEN = [
    (b'{"prompt": "x",}', "the body is not valid JSON: "),
    (b"", "the body is empty; send a JSON object"),
    (b'{"prompt": "\xff"}', "the body cannot be read as JSON; send UTF-8"),
    (b'{"prompt": ' + b"[" * 100_000, "the body cannot be read as JSON; "),
    (b'{"prompt": "\\ud800"}', "prompt has a lone surrogate; send valid Unicode text"),
]


@pytest.mark.parametrize(("body", "message"), BROKEN)
def test_a_broken_body_is_called_so(http, body, message):
    answer = http.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert assert_error(answer, 400)["message"].startswith(message)


def test_wrong_paths_and_methods_name_the_right_ones(http):
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1/chat/completion"):
        assert "did you mean '/v1/chat/completions'?" in assert_error(http.post(path, json=HI), 404)["message"]
    assert assert_error(http.get(CHAT), 405)["message"].endswith("use POST")


def test_fields_nobody_knows_and_null_ones_are_ignored(http):
    harmless = {"store": True, "verbosity": "low", "x": 1, "max_token": None, "functions": None}
    assert http.post(CHAT, json=HI | harmless | {"max_tokens": 1}).status_code == 200


def test_a_million_wrong_entries_bring_one_complaint_soon(http):
    body = json.dumps({"prompt": [-1] * 1_000_000})
    started = time.monotonic()
    assert_error(http.post(COMPLETION, content=body, headers={"content-type": "application/json"}), 400)
    assert time.monotonic() - started < patience(10)
