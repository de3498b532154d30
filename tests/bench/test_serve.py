"""The serving bench against a real server, and its arithmetic on known numbers."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from jaxllm import cli
from jaxllm.bench.serve import Outcome, percentiles, summarise
from jaxllm.bench.workload import at_rate, random_prompts, read_trace, stretched


def test_latencies_follow_their_definitions():
    outcome = Outcome(5, arrivals=[0.1, 0.2, 0.4], latency=0.4)
    assert outcome.values == pytest.approx({"ttft": 100, "tpot": 150, "e2e": 400})
    assert outcome.gaps == pytest.approx([100, 200])


def test_goodput_counts_requests_that_met_every_objective():
    fast, slow = Outcome(5, [0.1, 0.2], 0.2), Outcome(5, [0.1, 0.9], 0.9)
    failed = Outcome(5, error="unavailable")
    report = summarise([fast, slow, failed], 2.0, ["ttft", "itl"], {"ttft": 150.0, "tpot": 200.0})
    assert report["goodput"] == 0.5 and report["completed"] == 2 and report["errors"] == {"unavailable": 1}
    assert report["output_tokens"] == 4 and report["itl_ms"]["p50"] == pytest.approx(450)
    assert percentiles([]) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_arrivals_have_the_rate_asked_for():
    planned = random_prompts(2000, 1, 1, 10, seed=0)
    times = [p.at for p in at_rate(planned, 10.0, 1.0, seed=0)]
    assert times == sorted(times) and times[0] == 0.0
    assert times[-1] == pytest.approx(200, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps))
    assert spread == pytest.approx(mean, rel=0.1)  # exponential
    assert all(p.at == 0 for p in at_rate(planned, math.inf, 1.0, seed=0))


def test_traces_are_replayed_at_their_own_times(tmp_path):
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,3,2\n"
        "2023-11-16 18:15:47.6805900,900,2\n2023-11-16 18:15:49.1805900,4,5\n"
    )
    first, second = stretched(read_trace(azure, 10, 50, max_len=100, seed=0), 2.0)
    assert (first.at, len(first.prompt), first.output_len) == (0.0, 3, 2)
    assert second.at == pytest.approx(5.0) and len(second.prompt) == 4
    scaled = read_trace(azure, 10, 50, max_len=451, seed=0, scale=True)
    assert [(len(p.prompt), p.output_len) for p in scaled] == [(1, 1), (450, 1), (2, 2)], "half of everything"
    mooncake = tmp_path / "m.jsonl"
    rows = [{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [7, i]} for i in (8, 9)]
    mooncake.write_text("\n".join(map(json.dumps, rows)))
    a, b = read_trace(mooncake, 10, 50, max_len=1000, seed=0)
    assert a.prompt[:512] == b.prompt[:512] and a.prompt[512:] != b.prompt[512:]
    with pytest.raises(ValueError, match="columns"):
        azure.write_text("a,b\n1,2\n")
        read_trace(azure, 1, 50, max_len=10, seed=0)


def test_bench_measures_a_running_server(tmp_path, capsys):
    pytest.importorskip("fastapi", reason="needs the extra 'server'")
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from tests.helpers.tiny_llama import write_tiny_llama
    from tests.server.live import KEY, serving

    picture = tmp_path / "load.png"
    with serving(write_tiny_llama(tmp_path / "model")) as live:
        flags = ["--base-url", live.url, "--api-key", KEY, "--num-prompts", "8", "--output-len", "5", "--json"]
        load = [
            "--request-rate",
            "50,inf",
            "--max-concurrency",
            "4",
            "--background-clients",
            "1",
            "--background-len",
            "90",
        ]
        code = cli.main(["bench", "serve", *flags, *load, "--goodput", "e2e:60000", "--plot", str(picture)])
        wrong = cli.main(["bench", "serve", "--base-url", live.url, "--api-key", "wrong"])
    reports = json.loads(capsys.readouterr().out)["sweep"]
    assert code == 0 and wrong == 1
    for report in reports:
        assert report["completed"] == 8 and report["output_tokens"] == 40
        assert 0 < report["server_iteration_ms"] < report["duration_s"] * 1e3
        assert report["goodput"] == pytest.approx(report["request_throughput"])
        assert 0 < report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags", [["--request-rate", "0"], ["--goodput", "itl:5"], ["--percentile-metrics", "x"], ["--base-url", "nowhere"]]
)
def test_bad_flags_are_refused_in_one_line(flags, capsys):
    assert cli.main(["bench", "serve", *flags]) == 1
    assert capsys.readouterr().err.startswith("jaxllm: error: ")
