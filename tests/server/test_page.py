"""The built-in page in a real browser: an answer streams in, charts move, nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path

import pytest

from tests.server.browser import browser, find_chromium
from tests.server.live import KEY

ASK = "document.getElementById('text').value = {}; document.querySelector('#form').requestSubmit()"


def test_page_refers_to_nothing_outside():
    html = files("jaxllm.server").joinpath("page.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|//cdn|@import|innerHTML", html)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
def test_answer_streams_and_charts_move(live, tmp_path):
    # Point these at a real server for a picture worth looking at.
    url = os.environ.get("JAXLLM_PAGE_URL", live.url)
    picture = Path(os.environ.get("JAXLLM_PAGE_PNG", tmp_path / "page.png"))
    with browser(tmp_path / "profile") as tab:
        tab.open(url + "/", {"authorization": f"Bearer {KEY}"})
        tab.wait("document.querySelectorAll('canvas').length >= 5")
        tab.run("document.getElementById('max').value = 300; document.getElementById('temperature').value = 0")
        tab.run(ASK.format('"Why is the sky blue?"'))
        tab.wait("document.querySelector('.assistant')?.textContent.length > 3")
        partial = tab.run("document.querySelector('.assistant').textContent")
        tab.wait("document.getElementById('send').textContent === 'Send'", 60)
        whole = tab.run("document.querySelector('.assistant').textContent")
        assert whole.startswith(partial.rstrip("…")) and len(whole) > 10
        tab.wait("before.generation_tokens_total > 5 && CHARTS[0].points.some((v) => v > 0)")
        tab.wait("document.querySelectorAll('canvas').length >= 7")  # latencies have figures now
        assert "healthy" in tab.run("document.getElementById('state').textContent")
        assert tab.run("getComputedStyle(document.querySelector('canvas')).width") != "0px"
        tab.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
        assert not tab.console, tab.console
