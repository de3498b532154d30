"""Conversations of agents in every API: calls that must come, and calls in a history."""

from __future__ import annotations

import json

import pytest

PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
NESTED = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/Place"}},
    "required": ["at"],
    "$defs": {"Place": {"type": "object", "properties": {"zip": {"enum": [1, 2]}}, "required": ["zip"]}},
}
FUNCTIONS = {"weather": PARAMETERS, "nested": NESTED, "ping": None}
TOOLS = [
    {"type": "function", "function": {"name": name} | ({"parameters": p} if p else {})} for name, p in FUNCTIONS.items()
]
ASK = {"role": "user", "content": "Weather?"}


def fits(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    return {
        "weather": value in ({"city": "Paris"}, {"city": "Rome"}),
        "nested": value in ({"at": {"zip": 1}}, {"at": {"zip": 2}}),
        "ping": value == {},
    }[name]


def post(http, route: str, body: dict) -> dict:
    answer = http.post(f"/v1/{route}", json={"temperature": 1.0, "seed": 3} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(http, **body) -> dict:
    return post(http, "chat/completions", {"messages": [ASK], "tools": TOOLS, "max_tokens": 200} | body)["choices"][0]


NAMED = [{"type": "function", "function": {"name": n}} for n in FUNCTIONS] + [{"type": "function", "name": "ping"}]
SOME = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED[2]]}}


@pytest.mark.parametrize("choice", ["required", SOME, *NAMED])
def test_a_forced_call_has_the_arguments_of_its_function_and_no_others(http, choice):
    answer = chat(http, tool_choice=choice)
    (call,) = answer["message"]["tool_calls"]
    assert answer["finish_reason"] == "tool_calls" and fits(call["function"]["name"], call["function"]["arguments"])
    if choice != "required":
        wanted = NAMED[2] if choice is SOME else choice
        assert call["function"]["name"] == wanted.get("function", wanted)["name"]


def test_parallel_calls_are_several_only_where_that_is_asked(http):
    several = [chat(http, tool_choice="required", seed=s, parallel_tool_calls=True, max_tokens=400) for s in range(4)]
    calls = [answer["message"]["tool_calls"] for answer in several if answer["finish_reason"] == "tool_calls"]
    assert all(fits(c["function"]["name"], c["function"]["arguments"]) for answer in calls for c in answer)
    assert any(len(answer["message"]["tool_calls"]) > 1 for answer in several)
    for parallel in (False, None):
        message = chat(http, tool_choice="required", parallel_tool_calls=parallel)["message"]
        assert len(message["tool_calls"]) == 1


def test_no_call_where_none_may_come(http):
    answer = chat(http, tool_choice="none", max_tokens=8)
    assert "tool_calls" not in answer["message"]


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sun"}
HISTORIES = [
    [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
    [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1", "content": None}],
    [ASK, {"role": "assistant", "content": None}, {"role": "user", "content": "more"}],
    [ASK, {"role": "assistant", "content": ""}, {"role": "user", "content": "more"}],
    [ASK, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, {"role": "user", "content": "why"}],
    [{"role": "developer", "content": "Be brief"}, ASK],
    [ASK, {"role": "assistant", "content": "", "tool_calls": []}, {"role": "user", "content": "go on"}],
    *[
        [ASK, {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": bad}}]}, RESULT]
        for bad in ("{bad", "[1]", "", "null", {"city": "Rome"}, None)
    ],
]


@pytest.mark.parametrize("messages", HISTORIES)
def test_every_history_that_clients_send_back_goes_on(http, messages):
    assert post(http, "chat/completions", {"messages": messages, "max_tokens": 2, "tools": TOOLS})["choices"]


def test_streamed_forced_calls_concatenate_in_every_api(http):
    def events(route: str, body: dict) -> list[dict]:
        with http.stream("POST", f"/v1/{route}", json=body | {"stream": True, "temperature": 1.0, "seed": 1}) as answer:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]

    chunks = events("chat/completions", {"messages": [ASK], "tools": TOOLS, "tool_choice": "required"})
    deltas = [c["choices"][0]["delta"] for c in chunks]
    functions = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert fits(functions[0]["name"], "".join(f.get("arguments") or "" for f in functions))
    got = events("responses", {"input": "Weather?", "tools": response_tools(), "tool_choice": "required"})
    done = next(e for e in got if e["type"] == "response.function_call_arguments.done")
    parts = "".join(e["delta"] for e in got if e["type"] == "response.function_call_arguments.delta")
    assert parts == done["arguments"] and fits(done["name"], parts)
    assert [e["sequence_number"] for e in got] == list(range(len(got)))
    assert got[-1]["type"] == "response.completed" and got[-1]["response"]["output"][0]["arguments"] == parts
    got = events(
        "messages", {"messages": [ASK], "max_tokens": 200, "tools": message_tools(), "tool_choice": {"type": "any"}}
    )
    start = next(e for e in got if e["type"] == "content_block_start")["content_block"]
    parts = "".join(e["delta"]["partial_json"] for e in got if e["type"] == "content_block_delta")
    assert start["type"] == "tool_use" and fits(start["name"], parts)
    kinds = [e["type"] for e in got if e["type"] != "content_block_delta"]
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert got[-2]["delta"]["stop_reason"] == "tool_use" and got[-2]["usage"]["output_tokens"] > 0


def response_tools() -> list[dict]:
    return [{"type": "function", **tool["function"]} for tool in TOOLS]


def message_tools() -> list[dict]:
    return [{"name": n, "input_schema": p or {"type": "object"}} for n, p in FUNCTIONS.items()]


def test_responses_go_on_from_items_and_from_what_is_stored(http):
    first = post(http, "responses", {"input": "Weather?", "tools": response_tools(), "tool_choice": "required"})
    (call,) = first["output"]
    assert call["type"] == "function_call" and fits(call["name"], call["arguments"])
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    rest = {"tools": response_tools(), "max_output_tokens": 4, "temperature": 0}
    stored = post(http, "responses", rest | {"previous_response_id": first["id"], "input": [result]})
    whole = post(http, "responses", rest | {"input": [{"role": "user", "content": "Weather?"}, call, result]})
    assert stored["output"][0]["content"] == whole["output"][0]["content"]
    assert stored["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert http.get(f"/v1/responses/{first['id']}").json() == first
    assert http.delete(f"/v1/responses/{first['id']}").json()["deleted"]
    gone = http.post("/v1/responses", json={"previous_response_id": first["id"], "input": "x"})
    assert gone.status_code == 404 and gone.json()["error"]["param"] == "previous_response_id"
    kept = post(http, "responses", {"input": "x", "store": False, "max_output_tokens": 1})
    assert http.get(f"/v1/responses/{kept['id']}").status_code == 404


def test_messages_take_results_and_say_why_they_ended(http):
    tools = {"tools": message_tools(), "max_tokens": 200}
    first = post(http, "messages", tools | {"messages": [ASK], "tool_choice": {"type": "tool", "name": "nested"}})
    (block,) = first["content"]
    assert first["stop_reason"] == "tool_use" and fits(block["name"], json.dumps(block["input"]))
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "sunny"}]}
    talk = [ASK, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    more = {"messages": talk, "system": [{"type": "text", "text": "Be brief"}]}
    assert post(http, "messages", tools | more | {"max_tokens": 3})["stop_reason"] in ("max_tokens", "end_turn")
    counted = post(http, "messages/count_tokens", more | {"tools": message_tools()})["input_tokens"]
    usage = post(http, "messages", tools | more | {"max_tokens": 1})["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    stopped = post(http, "messages", {"messages": [ASK], "max_tokens": 50, "stop_sequences": list("abcdefghijklmno")})
    assert stopped["stop_reason"] in ("stop_sequence", "max_tokens", "end_turn")
    wrong = http.post("/v1/messages", json={"messages": [ASK]})
    assert wrong.status_code == 400 and wrong.json()["type"] == "error"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
