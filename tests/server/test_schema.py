"""Schemathesis over `/openapi.json`: whatever fits the document, or does not, is answered in the documented shape."""

from __future__ import annotations

import pytest

from tests.server.live import KEY


def test_no_5xx_no_hang_and_every_error_in_shape(live):
    pytest.importorskip("schemathesis", reason="needs the extra 'test'")
    from scripts.fuzz_api import fuzz

    report = fuzz(live.url, KEY, 200)
    assert not report["problems"], report
    assert report["cases"] >= 150 and report["statuses"].get("200") and report["statuses"].get("400"), report
