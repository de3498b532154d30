"""Many streaming clients, a fifth of which hang up: no token lost or doubled, no page kept."""

from __future__ import annotations

from scripts.soak import soak
from tests.server.live import KEY, serving


def test_streams_equal_the_offline_answer_while_others_disconnect(tiny_model):
    with serving(tiny_model) as live:
        report = soak(live.url, KEY, seconds=12, num_clients=64, num_prompts=12, output_len=60, seed=1)
    assert report["wrong"] == 0 and report["failed"] == 0, report
    assert report["finished"] > 100 and report["disconnected"] > 20
    assert live.llm.num_open == 0
