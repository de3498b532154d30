"""`jaxllm simulate`: its JSON, its flags, and what it says of bad input."""

from __future__ import annotations

import dataclasses
import json

import pytest

from jaxllm.cli import main
from jaxllm.roofline.chips import CHIPS
from jaxllm.simulation.config import SimulationConfig, parse_slo, parse_sweep
from jaxllm.simulation.run import run_once, set_up

FLAGS = "simulate --model llama-3.1-8b --chip h100 --max-num-seqs 16".split()
KEYS = {
    "requests",
    "duration_s",
    "output_tokens_per_s",
    "goodput_per_device",
    "slo_attainment",
    "ttft_ms",
    "tpot_ms",
    "itl_ms",
    "prefix_hit_tokens",
    "iterations",
    "utilization",
}


def simulate(capsys, *flags: str) -> dict:
    assert main([*FLAGS, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_the_agreed_keys(capsys):
    report = simulate(capsys, *"--num-prompts 20 --request-rate 5 --slo ttft:2s,tpot:50ms --price 2".split())
    assert report.keys() >= KEYS
    assert report["requests"] == 20 and report["slo_attainment"] == 1.0 and 0 < report["utilization"] <= 1
    assert report["output_tokens_per_s"] == pytest.approx(20 * 128 / report["duration_s"])
    assert report["goodput_per_device"] == pytest.approx(20 / report["duration_s"])
    assert all({"mean", "p50", "p90", "p99", "max"} == report[name].keys() for name in ("queue", "running"))
    assert all({"p50", "p90", "p99"} <= report[f"{metric}_ms"].keys() for metric in ("ttft", "tpot", "itl"))
    assert report["cost"] == pytest.approx(2 * report["duration_s"] / 3600)
    assert report["cost_per_million_output_tokens"] == pytest.approx(1e6 * report["cost"] / (20 * 128))


def test_text_is_for_a_person(capsys):
    assert main([*FLAGS, "--num-prompts", "5"]) == 0
    assert "5 of 5 requests" in capsys.readouterr().out


def test_a_sweep_finds_the_highest_rate_that_holds(capsys, tmp_path):
    flags = "--num-prompts 40 --input-len 2000 --output-len 8 --slo ttft:300ms --sweep request-rate=1..60".split()
    report = simulate(capsys, *flags, "--plot", str(tmp_path / "sweep.png"))
    rates = [one["request_rate"] for one in report["sweep"]]
    held = [one["request_rate"] for one in report["sweep"] if one["slo_attainment"] >= 0.9]
    assert rates == sorted(rates) and len(rates) == 7
    assert 1 < report["highest_rate"] == report["request_rate"] == max(held) < 60
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n1,2\n", "row 1: it has columns TIMESTAMP, ContextTokens; known ones are"),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n5,5\n5,-1\n", "row 2: lengths 5 and -1"),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n5,5\n0,7\n", "row 2: lengths 0 and 7"),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n5,5\n5,\n", "row 2: num_decode_tokens is ''"),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n5,nan\n", "row 1: num_decode_tokens is 'nan'"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2,5,5\n1,5,5\n", "row 2: arrives at 1 s, before the row"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,5\n", "row 1: "),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n5,5\n5,5\n9000,5\n", "row 3: 9000 + 5 tokens exceed the 8192"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 5, "output_length": 5}\n{"input', "row 2: "),
        ("a.jsonl", "[1, 2]\n", "row 1: it is no object"),
        ("a.csv", "num_prefill_tokens,num_decode_tokens\n", "the workload has no requests"),
        ("none.csv", None, "cannot read --trace"),
    ],
)
def test_a_bad_trace_is_one_line_with_its_row(capsys, tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main([*FLAGS, "--max-model-len", "8192", "--trace", str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_long_requests_are_skipped_or_shrunk_where_that_is_asked_for(capsys, tmp_path):
    trace = tmp_path / "a.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n100,10\n9000,1000\n")
    flags = ["--max-model-len", "1000", "--trace", str(trace)]
    assert simulate(capsys, *flags, "--skip-longer")["prompt_tokens"] == 100
    report = simulate(capsys, *flags, "--scale-lengths")
    assert report["prompt_tokens"] == 910 and report["output_tokens"] == 101


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--slo ttft:2", "slo 'ttft:2' is not understood"),
        ("--slo tft:2s", "is not understood at 'tft:2s'"),
        ("--slo ttft:0s", "a limit must be above 0"),
        ("--sweep request-rate=5..1 --slo ttft:1s", "sweep 'request-rate=5..1' is not understood"),
        ("--sweep request-rate=1..5", "set --slo"),
        ("--request-rate 0", "request_rate=0.0; it must be above 0"),
        ("--num-prompts 0", "num_prompts=0; it must be at least 1"),
        ("--chip h1000", "no chip 'h1000'"),
        ("--chip none.json", "cannot read the profile none.json"),
        ("--prefill-mesh tp=1", "prefill_mesh and decode_mesh belong together"),
        ("--search", "set num_devices"),
        ("--input-len 200000", "exceed the 131072 that a request may have"),
        ("--mesh tp=3", "do not divide by mesh axis tp=3"),
        ("--arrivals gamma", "needs a rate"),
        ("--scale-lengths", "are for a trace"),
        ("--plot a.pdf", "must end in .png"),
        ("--host-link 0", "host_link='0'; use pcie4"),
        ("--acceptance-rate 0.5", "speculative_config and acceptance_rate belong together"),
        ('--speculative-config {"num_speculative_tokens":4}', "speculative_config and acceptance_rate belong together"),
        ("--disk-kv-bytes 100000000", "disk_kv_bytes needs host_kv_bytes"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, said):
    assert main([*FLAGS, *flags.split()]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_limits_and_sweeps_are_read():
    assert parse_slo("ttft:2s, tpot:50ms") == {"ttft": 2.0, "tpot": 0.05} and parse_slo(None) == {}
    assert parse_sweep("request-rate=1..20") == ([1.0, 20.0], True)
    assert parse_sweep("request_rate=1,2,4") == ([1.0, 2.0, 4.0], False)
    assert SimulationConfig(slo="itl:80ms").limits == {"itl": 0.08}


def test_a_search_ranks_deployments_that_use_every_device(capsys, tmp_path):
    flags = "--search --num-devices 2 --num-prompts 12 --request-rate 20 --slo ttft:1s,tpot:30ms".split()
    report = simulate(capsys, *flags, "--plot", str(tmp_path / "search.png"))
    rows = report["search"]
    assert [row["goodput_per_device"] for row in rows] == sorted((r["goodput_per_device"] for r in rows), reverse=True)
    layouts = {(row.get("mesh"), row.get("prefill_mesh")) for row in rows}
    assert layouts == {("tp=1", None), ("tp=2", None), (None, "tp=1")} and len(rows) == 6
    assert report["goodput_per_device"] == rows[0]["goodput_per_device"] and report["num_devices"] == 2
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_a_pool_takes_what_serve_takes(capsys, tmp_path):
    (tmp_path / "pool.toml").write_text('[models]\na = "llama-3.1-8b"\nb = "qwen3-8b"\n')
    flags = "--num-prompts 10 --request-rate 2 --output-len 20 --max-model-len 4000 --slo ttft:5s,tpot:100ms".split()
    report = simulate(capsys, "--models", str(tmp_path / "pool.toml"), *flags)
    assert report["completed"] == 10 and report["switches"] >= 1 and report["token_attainment"] == 1.0
    assert main([*FLAGS, "--models", "a"]) == 1
    assert "give NAME=PATH pairs" in capsys.readouterr().err


def test_pools_hand_over_and_report_both_meshes(capsys):
    flags = "--prefill-mesh tp=2 --decode-mesh tp=1 --decode-replicas 2 --num-prompts 8 --request-rate 4".split()
    report = simulate(capsys, *flags)
    assert report["num_devices"] == 4 and report["completed"] == 8 and report["prefix_cache_hit_rate"] == 0.0
    assert report["transfers"] == 8 and report["transferred_bytes"] == 8 * 1024 * 131072
    assert (report["prefill_mesh"], report["decode_mesh"]) == ("tp=2", "tp=1")


def test_a_search_follows_only_what_may_win_and_says_so(capsys):
    flags = "--search --num-devices 2 --num-prompts 40 --input-len 12000 --output-len 20 --no-stream".split()
    flags += ["--slo", "ttft:3s,tpot:20ms"]
    rows = simulate(capsys, *flags)["search"]
    best = {kind: max(r["goodput_per_device"] for r in rows if ("mesh" in r) == kind) for kind in (True, False)}
    assert all(row["goodput_per_device"] < best["mesh" in row] for row in rows if row.get("at_most"))
    sure = [row for row in rows if not row.get("at_most")]
    assert all(row["slo_attainment"] >= 0.9 for row in sure) and 2 <= len(sure) < len(rows)
    rate = str(2 * rows[0]["goodput_per_device"])
    layout = {name: str(rows[0][name]) for name in rows[0] if "mesh" in name or "replicas" in name or "batched" in name}
    given = [part for name, value in layout.items() for part in (f"--{name.replace('_', '-')}", value)]
    count = str(rows[0]["requests"])  # what was asked for would all be served within the limit, however soon it came
    assert int(count) >= 10 * float(rate) and float(rate) * 12020 * 2 * 8e9 < 2 * CHIPS["h100"].flops
    flags = [*flags[5:], "--num-prompts", count, "--request-rate", rate, *given]
    assert simulate(capsys, *flags)["slo_attainment"] == rows[0]["slo_attainment"]
    lost = simulate(capsys, *flags[: -len(given) - 1], str(4 * float(rate)), *given)
    assert lost["slo_attainment"] < 0.9


def test_what_is_lost_is_not_simulated_to_its_end():
    sim = SimulationConfig(num_prompts=400, request_rate=500.0, input_len=4000, slo="ttft:200ms")
    setup = set_up({"model": "llama-3.1-8b", "max_num_seqs": 16}, sim, progress=False)
    report = run_once(setup, most_missed=40)
    assert report["gave_up"] and report["requests"] < 300 and report["slo_attainment"] < 0.9
    whole = run_once(dataclasses.replace(setup, sim=sim.with_rate(1.0)), most_missed=40)
    assert "gave_up" not in whole and whole["requests"] == 400 and whole["slo_attainment"] > 0.9


def test_chunks_beside_streams_shrink_to_the_limit_as_a_server_has_them(capsys):
    flags = "--num-prompts 60 --request-rate 4 --input-len 6000 --output-len 60 --max-num-batched-tokens 8192".split()
    gaps = {
        name: simulate(capsys, *flags, *more)["itl_ms"]["p99"]
        for name, more in (("default", []), ("tight", ["--slo", "tpot:30ms"]), ("never", ["--no-stream"]))
    }
    assert gaps["tight"] <= 45 < gaps["default"] <= 130 < gaps["never"], gaps


@pytest.mark.parametrize("fit", ["--skip-longer", "--scale-lengths"])
def test_a_search_leaves_out_who_cannot_hold_the_longest_request(capsys, tmp_path, fit):
    """A small cache would leave the long requests out, or shrink all, and win; `--num-prompts` does not hide them."""
    lines = [f"{120_000 if i == 157 else 2000},20" for i in range(160)]
    (tmp_path / "trace.csv").write_text("num_prefill_tokens,num_decode_tokens\n" + "\n".join(lines) + "\n")
    flags = ["--search", "--num-devices", "2", "--trace", str(tmp_path / "trace.csv"), fit]
    flags += ["--slo", "ttft:20s,tpot:50ms", "--request-rate", "2", "--gpu-memory-utilization", "0.35"]
    rows = simulate(capsys, *flags)["search"]
    assert {row.get("mesh") for row in rows} == {"tp=2"} and {row["requests"] for row in rows} == {160}
    rows = simulate(capsys, *flags, "--num-prompts", "40")["search"]
    assert {row.get("mesh") for row in rows} == {"tp=2"} and {row["requests"] for row in rows} == {40}
