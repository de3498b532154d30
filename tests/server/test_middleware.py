"""Errors, limits and keys: what a client that does wrong gets to see."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tests.helpers.patience import patience
from tests.server.live import KEY

ROUTES = ["/", "/metrics", "/stats", "/version", "/v1/models", "/openapi.json", "/nowhere"]


def assert_error(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_but_health_needs_the_key(live, route):
    error = assert_error(httpx.get(live.url + route), 401)
    assert error["code"] == "invalid_api_key"
    assert_error(httpx.get(live.url + route, headers={"authorization": f"Bearer {KEY}x"}), 401)
    assert_error(httpx.get(live.url + route, headers={"authorization": "Basic !"}), 401)


def test_health_is_open_and_a_browser_may_send_the_key_as_password(live):
    assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
    page = httpx.get(f"{live.url}/", auth=("anyone", KEY))
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]


BAD = [
    ("{", None),
    ("[]", None),
    ('{"prompt": 5}', "prompt"),
    ('{"prompt": "x", "n": 129}', "n"),
    ('{"prompt": "x", "n": 1.5}', "n"),
    ('{"prompt": "x", "logprobs": 21}', "logprobs"),
    ('{"prompt": "x", "temperature": NaN}', "temperature"),
    ('{"prompt": "x", "temperature": 1e400}', "temperature"),
    ('{"prompt": "x", "top_p": 0}', "top_p"),
    ('{"prompt": "x", "stop": ["' + '","'.join("abcdefghijklmnopq") + '"]}', "stop"),
    ('{"prompt": "x", "logit_bias": {"a": 1}}', None),
    ('{"prompt": "x", "logit_bias": {"258": 1}}', None),
    ('{"prompt": [258]}', None),
    ('{"prompt": ""}', None),
    ('{"prompt": []}', "prompt"),
    ('{"prompt": "\\ud800"}', None),
    ('{"prompt": "x", "suffix": "y"}', "suffix"),
    ('{"prompt": "x", "best_of": 2}', "best_of"),
    ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
    ('{"prompt": "x", "structured_outputs": {"regex": "((("}}', None),
    ('{"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}}', None),
    ('{"prompt": "x", "response_format": {"type": "json_schema"}}', "response_format"),
    ('{"prompt": "x", "cache_salt": ""}', None),
    ('{"prompt": ' + "[" * 5000 + "]" * 5000 + "}", None),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_invalid_requests_get_400_and_a_reason(http, body, param):
    error = assert_error(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"].split(".")[0] == param


HOSTILE_FORMS = [
    {"regex": "(((a{1,999}){1,999}){1,999}){1,999}b"},
    {"regex": "(a|a)*(a|aa)+" * 500},
    {"regex": "(" * 20000 + ")" * 20000},
    {"grammar": "start: a\na: a a a | b\nb: /(x+x+)+y/ a?"},
    {"grammar": "start: start start |"},
    {"json": {"$ref": "#"}},
    {"json": {"type": "array", "items": {"$ref": "#"}, "minItems": 100000}},
    {"json": {"enum": [str(i) * 5 for i in range(5000)]}},
    {"choice": ["x" * 256] * 200},
]


@pytest.mark.parametrize("form", HOSTILE_FORMS)
def test_hostile_grammars_end_soon_and_alone(http, form):
    """Refused, or answered: but never a 5xx, a stall or harm to the next request."""
    started = time.monotonic()
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 30, "structured_outputs": form})
    assert answer.status_code in (200, 400), answer.text
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert time.monotonic() - started < patience(10)


BAD_CHATS = [
    {"messages": []},
    {"messages": [{"role": "wizard", "content": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
    {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"},
    {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}},
    {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"bos_token": "!"}},
    {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "a b"}}]},
]


@pytest.mark.parametrize("body", BAD_CHATS)
def test_invalid_chats_get_400(http, body):
    assert_error(http.post("/v1/chat/completions", json=body), 400)


def test_wrong_places_methods_and_types(http):
    assert_error(http.get("/nowhere"), 404)
    assert_error(http.get("/v1/models/none"), 404)
    assert "POST" in http.get("/v1/completions").headers["allow"]
    assert_error(http.get("/v1/completions"), 405)
    assert_error(http.post("/v1/completions", content="prompt=x"), 400)


def test_body_above_the_limit_is_refused_before_it_is_read(http):
    body = json.dumps({"prompt": "x" * (9 << 20)})
    assert_error(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 413)

    def parts():
        for _ in range(9):
            yield b" " * (1 << 20)

    assert_error(http.post("/v1/completions", content=parts(), headers={"content-type": "application/json"}), 413)


def test_too_many_completions_at_once_are_refused(http):
    error = assert_error(http.post("/v1/completions", json={"prompt": ["x"] * 1000, "n": 2}), 400)
    assert "at most" in error["message"]


def test_request_ids_come_back_and_harmful_ones_are_replaced(http):
    assert http.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/version", headers={"x-request-id": 'a"b{}'}).headers["x-request-id"] != 'a"b{}'
    answer = http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "abc-2"})
    assert answer.json()["id"] == "cmpl-abc-2"


def test_tokenize_and_detokenize_are_inverse(http):
    ids = http.post("/tokenize", json={"prompt": "hä"}).json()
    assert ids["tokens"] == list("hä".encode()) and ids["count"] == 3 and ids["max_model_len"] == 512
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "hä"}
    assert http.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()["tokens"][0] == 256
    assert_error(http.post("/tokenize", json={}), 400)
    assert_error(http.post("/detokenize", json={"tokens": [999]}), 400)


def test_metrics_have_the_names_dashboards_read(http):
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
    text = http.get("/metrics").text
    names = (
        "num_requests_running num_requests_waiting kv_cache_usage_perc time_to_first_token_seconds_bucket "
        "inter_token_latency_seconds_sum e2e_request_latency_seconds_count prompt_tokens_total "
        "generation_tokens_total prefix_cache_queries_total prefix_cache_hits_total num_preemptions_total "
        "compilations_total kv_device_bytes kv_device_capacity_bytes kv_device_evictions_total "
        "prefix_cache_device_hits_total kv_page_copies_total kv_slot_utilization".split()
    )
    for name in names:
        assert f"\njaxllm:{name}{{" in text, name
    assert 'jaxllm:request_success_total{finished_reason="length",model_name="tiny"}' in text
