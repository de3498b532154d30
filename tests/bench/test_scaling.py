"""Decoding apart from the prompts of others, and a table of points from an engine and from servers."""

from __future__ import annotations

import json

import pytest

from jaxllm.bench import scaling
from jaxllm.bench.decode_phase import decode_phase
from jaxllm.cli import main


def test_only_what_comes_while_all_decode_counts():
    early, late = [1.0, 4.0, 4.5, 5.0, 5.5], [4.0, 4.5, 5.0, 5.5, 6.0]
    assert decode_phase([early, late]) == pytest.approx(0.5), "the gap of 3 s was for the other's prompt"
    assert decode_phase([[1.0, 1.1], [5.0, 5.1]]) is None, "they never decoded together"
    assert decode_phase([[0.0, 0.2, 0.4]]) == pytest.approx(0.2)


def test_points_of_a_server(monkeypatch, capsys, tmp_path):
    sent = []

    def server(url, key):
        def run_batch(requests):
            sent.append(tuple(requests[0].prompt))
            assert {len(r.prompt) for r in requests} <= {16, 32} and {r.output_len for r in requests} == {4}
            first = 0.001 * len(requests[0].prompt)
            return [[first + 0.01 * len(requests) * i for i in range(4)] for _ in requests]

        return url, 100, run_batch, lambda: 3 << 20

    monkeypatch.setattr(scaling, "_server", server)
    urls = ["--base-url", "http://a", "--base-url", "http://b", "--context", "16,32", "--batch-size", "1,2"]
    flags = ["--output-len", "4", "--num-iters", "2", "--plot", str(tmp_path / "scaling.png"), "--json"]
    pytest.importorskip("matplotlib")
    assert main(["bench", "scaling", *urls, *flags]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(p["source"], p["batch"], p["context"]) for p in points[:4]] == [
        ("http://a", 1, 16), ("http://a", 1, 32), ("http://a", 2, 16), ("http://a", 2, 32)
    ]  # fmt: skip
    assert points[3]["ttft_ms"] == pytest.approx(32) and points[3]["tpot_ms"] == pytest.approx(20)
    assert points[3]["decode_tokens_per_s"] == pytest.approx(100) and points[3]["memory_bytes"] == 3 << 20
    assert len(points) == 8 and (tmp_path / "scaling.png").stat().st_size > 1000
    of_one_server = sent[: len(sent) // 2]
    assert len(set(of_one_server)) == len(of_one_server), "no prompt comes out of the prefix cache"
    assert "http://b" in scaling.format_report(points)


@pytest.mark.parametrize("flags", [("--context", "0"), ("--batch-size", "a,1"), ("--output-len", "1")])
def test_bad_sizes_are_refused_before_anything_is_loaded(flags, capsys):
    assert main(["bench", "scaling", *flags]) == 1
    assert flags[0] in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys):
    assert main(["bench", "scaling", "--base-url", "http://127.0.0.1:9"]) == 1
    assert "cannot talk to http://127.0.0.1:9" in capsys.readouterr().err
