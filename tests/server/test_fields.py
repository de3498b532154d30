"""Nothing is ignored: every field of every request changes something, or is refused by its name."""

from __future__ import annotations

import json

import pytest

from jaxllm.schema.messages_request import CountTokensRequest, MessagesRequest
from jaxllm.schema.other_servers import OTHERS
from jaxllm.schema.requests import ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest
from jaxllm.schema.responses_request import ResponsesRequest

MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BASE = {
    "completions": {"prompt": "hello there", "max_tokens": 6, "temperature": 1.0, "seed": 1},
    "chat/completions": {"messages": MESSAGES, "max_tokens": 6, "temperature": 1.0, "seed": 1},
    "responses": {"input": "hello", "max_output_tokens": 6, "temperature": 1.0, "seed": 1},
    "messages": {"messages": MESSAGES, "max_tokens": 6, "temperature": 1.0, "seed": 1},
    "messages/count_tokens": {"messages": MESSAGES},
    "embeddings": {"input": "hello"},
    "tokenize": {"messages": MESSAGES},
}
SAMPLING = {
    "keep_alive": "5m",
    "temperature": 0, "top_p": 0.1, "top_k": 1, "min_p": 0.9, "presence_penalty": 2, "frequency_penalty": 2,
    "repetition_penalty": 50, "seed": 2, "stop": list("abcdefghijklmnop"), "stop_token_ids": list(range(16)),
    "min_tokens": 6, "ignore_eos": True, "logit_bias": {"65": 100}, "bad_words": list("abcdefghijklmnopqrstuvwxyz"),
    "allowed_token_ids": [65, 66], "truncate_prompt_tokens": 2, "structured_outputs": {"regex": "[ab]{3}"},
    "skip_special_tokens": False, "include_stop_str_in_output": True,
}  # fmt: skip
OUTPUT = {
    "n": 2, "prompt_logprobs": 1, "return_token_ids": True, "request_id": "mine", "stream": True,
    "stream_options": {"include_usage": True}, "response_format": {"type": "json_object"},
    "return_tokens_as_token_ids": True, "kv_transfer_params": {"do_remote_decode": True},
}  # fmt: skip
CHANGES = {
    "completions": SAMPLING | OUTPUT | {
        "prompt": "other", "max_tokens": 3, "logprobs": 2, "echo": True, "suffix": "x", "best_of": 5,
        "add_special_tokens": False,
    },
    "chat/completions": SAMPLING | OUTPUT | {
        "messages": [{"role": "user", "content": "other words"}], "max_tokens": 3, "max_completion_tokens": 2,
        "logprobs": True, "top_logprobs": 2, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": True,
        "include_reasoning": False, "reasoning_effort": "high", "documents": [{"text": "x"}],
        "chat_template_kwargs": {"enable_thinking": True}, "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "responses": SAMPLING | {
        "input": "other words", "instructions": "Be brief", "max_output_tokens": 2,
        "text": {"format": {"type": "json_object"}}, "request_id": "mine",
        "tools": [{"type": "function", "name": "f"}], "tool_choice": "required", "parallel_tool_calls": False,
        "reasoning": {"effort": "high"}, "previous_response_id": "resp_x", "store": False, "truncation": "auto",
        "metadata": {"a": "b"}, "background": True, "conversation": "x", "prompt": {"id": "x"}, "top_logprobs": 2,
        "stream": True,
    },
    "messages": SAMPLING | {
        "messages": [{"role": "user", "content": "other words"}], "system": "Be brief", "max_tokens": 2, "stream": True,
        "request_id": "mine",
        "stop_sequences": list("abcdefghijklmnop"), "tools": [{"name": "f"}], "tool_choice": {"type": "any"},
    },
    "messages/count_tokens": {"messages": [{"role": "user", "content": "other words"}], "system": "Be brief"},
    "embeddings": {"input": "other", "encoding_format": "base64", "dimensions": 7},
    "tokenize": {"messages": [{"role": "user", "content": "other"}], "prompt": "x", "add_generation_prompt": False,
                 "return_token_strs": True, "continue_final_message": True},
}  # fmt: skip
# What a field needs beside it before it can show.
FEW = {"allowed_token_ids": [*range(65, 85)], "max_tokens": 24}
LETTERS = list("abcdefghijklmnop")
BESIDE = {
    "stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}, "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60},
    "return_tokens_as_token_ids": {"logprobs": 1}, "include_stop_str_in_output": {"stop": LETTERS, "max_tokens": 60},
    "skip_special_tokens": {"allowed_token_ids": [256, 257], "ignore_eos": True},
    "ignore_eos": {"allowed_token_ids": [256, 257, 65]}, "min_tokens": {"allowed_token_ids": [256, 257, 65]},
    "stop": {"max_tokens": 60}, "stop_sequences": {"max_tokens": 60}, "stop_token_ids": {"allowed_token_ids": [1, 2]},
    "bad_words": {"allowed_token_ids": [*range(97, 105), 65]},
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty"), FEW),
}  # fmt: skip
# Hints: scheduling, accounting and caching, whose effect an answer does not show; names of the model; templates' own.
QUIET = {
    "model", "user", "priority", "cache_salt", "metadata", "include", "reasoning_effort", "documents",
    "chat_template_kwargs", "include_reasoning", "reasoning", "thinking", "tools", "add_special_tokens", "truncation",
    "parallel_tool_calls", "store", "seed", "num_speculative_tokens",
}  # fmt: skip
CLASSES = {
    "completions": CompletionRequest, "chat/completions": ChatRequest, "responses": ResponsesRequest,
    "messages": MessagesRequest, "messages/count_tokens": CountTokensRequest, "embeddings": EmbeddingRequest,
    "tokenize": TokenizeRequest,
}  # fmt: skip
FIELDS = [(route, field.alias or name) for route, kind in CLASSES.items() for name, field in kind.model_fields.items()]
COUNT_ALONE = {"messages/count_tokens"}


def answer(http, route: str, body: dict) -> tuple[int, str]:
    got = http.post(f"/{route}" if route == "tokenize" else f"/v1/{route}", json=body)
    text = got.text
    if got.status_code == 200 and not body.get("stream"):
        shaped = got.json()
        for name in ("id", "created", "created_at"):
            if body.get("request_id") is None:
                shaped.pop(name, None)
        for item in (
            (*shaped.get("output", ()), *shaped.get("content", ())) if route in ("responses", "messages") else ()
        ):
            item.pop("id", None), item.pop("call_id", None)
        shaped.pop("usage", None) if route != "messages/count_tokens" else None
        text = json.dumps(shaped)
    return got.status_code, text


@pytest.mark.parametrize(("route", "name"), FIELDS)
def test_every_field_changes_the_answer_or_is_refused_by_name(http, route, name):
    changes = CHANGES[route]
    if name not in changes:
        sampled = route in COUNT_ALONE and name in MessagesRequest.model_fields
        assert name in QUIET or sampled, f"{name} of {route} is neither tried here nor known to be quiet"
        return
    if route in ("responses", "messages") and name in (
        "tool_choice",
        "parallel_tool_calls",
        "include_stop_str_in_output",
    ):
        pytest.skip("tried with each API's own shapes in test_agent_loops")
    limit = "max_output_tokens" if route == "responses" else "max_tokens"
    beside = {limit if key == "max_tokens" else key: value for key, value in BESIDE.get(name, {}).items()}
    if "chat" in route and "logprobs" in beside:
        beside["logprobs"] = True
    base = BASE[route] | beside
    if name == "prompt" and route == "tokenize":
        base = {}
    before, after = answer(http, route, base), answer(http, route, base | {name: changes[name]})
    assert before[0] == 200 or base == {}, before
    if after[0] != 200:
        assert after[0] in (400, 404) and name.split("_")[0] in after[1], after
    elif name not in QUIET:
        assert after != before


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_fields_of_other_servers_are_named_with_what_to_use(http, name):
    other = OTHERS[name]
    for route in ("completions", "chat/completions", "responses"):
        known = {field.alias or n for n, field in CLASSES[route].model_fields.items()}
        if name in known:
            continue
        got = http.post(f"/v1/{route}", json=BASE[route] | {name: {"x": "y"}})
        assert got.status_code == 400, name
        message = got.json()["error"]["message"]
        assert message.startswith(f"{name} ") and got.json()["error"]["param"] == name
        assert not any(f"use {field}" == message for field in known)
        for value in other.harmless:
            body = BASE[route] | {name: value, "max_tokens" if route != "responses" else "max_output_tokens": 1}
            assert http.post(f"/v1/{route}", json=body).status_code == 200, (name, value)


@pytest.mark.parametrize("value", ["0.5", 0.5])
def test_numbers_may_be_text_and_whole_ones_may_have_a_point(http, value):
    body = {"prompt": "x", "temperature": value, "max_tokens": "3", "n": 2.0, "model": ""}
    got = http.post("/v1/completions", json=body)
    assert got.status_code == 200 and len(got.json()["choices"]) == 2
    assert got.json()["usage"]["completion_tokens"] <= 6 and got.json()["system_fingerprint"].startswith("fp_")


def test_usage_comes_with_every_chunk_where_it_is_asked(http):
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for route in ("completions", "chat/completions"):
        got = http.post(f"/v1/{route}", json=BASE[route] | options).text
        chunks = [json.loads(line[6:]) for line in got.splitlines() if line.startswith("data: {")]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] >= 1


def test_what_of_a_schema_is_not_enforced_is_in_a_header(http):
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 2}
    body = {"prompt": "x", "max_tokens": 60, "structured_outputs": {"json": schema}}
    for stream in (False, True):
        got = http.post("/v1/completions", json=body | {"stream": stream})
        assert got.status_code == 200 and "uniqueItems" in got.headers["x-jaxllm-warning"]
    assert "x-jaxllm-warning" not in http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).headers


def test_gbnf_grammars_are_understood(http):
    grammar = 'root ::= "yes" | "no" tail\ntail ::= [0-9]'
    body = {"prompt": "x", "max_tokens": 9, "structured_outputs": {"grammar": grammar}}
    text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert text == "yes" or (text[:2] == "no" and text[2:].isdigit())
