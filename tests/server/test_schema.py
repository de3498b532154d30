"""`/openapi.json`: it says what is valid, and whatever fits it, or does not, is answered in the documented shape."""

from __future__ import annotations

import pytest

from tests.server.live import KEY


def test_no_5xx_no_hang_and_every_answer_in_shape(live):
    pytest.importorskip("schemathesis", reason="needs the extra 'test'")
    from scripts.fuzz_api import fuzz

    report = fuzz(live.url, KEY, 200)
    assert not report["problems"], report
    assert report["cases"] >= 150 and report["accepted"] >= 0.3 and report["statuses"].get("400"), report


def test_document_names_the_model_its_vocabulary_and_its_vector_size(http):
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == ["tiny", "alias", None]
    assert schemas["DetokenizeRequest"]["properties"]["tokens"]["items"] == {
        "maximum": 257,
        "minimum": 0,
        "type": "integer",
    }
    assert schemas["EmbeddingRequest"]["properties"]["dimensions"]["enum"] == [32, None]
    assert "x-token" not in str(schemas)


RULES = [
    ("StructuredFields", {"regex": "a"}, {"regex": "a", "json_object": True}),
    ("StructuredFields", {"json": {}, "regex": None}, {}),
    ("ResponseFormat", {"type": "json_object"}, {"type": "json_schema"}),
    ("ChatMessage", {"role": "assistant", "content": None}, {"role": "user", "content": None}),
    ("ChatRequest", {"stream": True, "stream_options": {}}, {"stream_options": {}}),
    ("ChatRequest", {"top_logprobs": 1, "logprobs": True}, {"top_logprobs": 1}),
    ("ChatRequest", {"tool_choice": "auto"}, {"tool_choice": "required", "tools": []}),
    ("CompletionRequest", {"max_tokens": 0, "echo": True}, {"max_tokens": 0, "echo": True, "stream": True}),
    ("CompletionRequest", {"logit_bias": {"1": 1}}, {"logit_bias": {"a": 1}}),
    ("TokenizeRequest", {"prompt": ""}, {"prompt": "", "messages": [{"role": "user", "content": "x"}]}),
]


@pytest.mark.parametrize(("name", "valid", "invalid"), RULES)
def test_document_tells_fields_that_need_or_exclude_each_other(http, name, valid, invalid):
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="comes with schemathesis")
    document = http.get("/openapi.json").json()
    needed = {"ChatRequest": {"messages": [{"role": "user", "content": "x"}]}, "CompletionRequest": {"prompt": "x"}}
    check = jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", **document})
    assert check.is_valid(needed.get(name, {}) | valid)
    assert not check.is_valid(needed.get(name, {}) | invalid)
