"""Schemathesis over `/openapi.json`: whatever fits the document, or does not, is answered in the documented shape."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.server.live import KEY

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra 'test'")
EXAMPLES = int(os.environ.get("JAXLLM_SCHEMA_EXAMPLES", "16"))  # per operation


@pytest.fixture
def api(live):
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"})


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_has_a_documented_shape(case):
    answer = case.call(headers={"authorization": f"Bearer {KEY}"}, timeout=20)
    assert answer.status_code < 500, f"{answer.status_code} {answer.text[:300]}"
    assert answer.status_code != 422
    if answer.status_code >= 400:
        assert set(answer.json()) == {"error"}, answer.text[:300]
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
