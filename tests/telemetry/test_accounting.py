"""The books of the engine: what iterations cost, whose time is whose, and the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.bench.throughput import format_report, measure_throughput
from jaxllm.bench.workload import random_prompts
from jaxllm.cli import main
from jaxllm.commands import bench as bench_cli
from jaxllm.families.presets import model_config
from jaxllm.roofline.cost_model import iteration_cost, model_cost
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Request
from jaxllm.telemetry.accounting import Accounting, Ceilings, summed
from jaxllm.telemetry.device_peaks import engine_cost

MODEL = model_cost(model_config("llama-2-7b"))
CEILINGS = Ceilings(1e15, 3e12, "test")


def request(num_prompt: int) -> Request:
    return Request(
        request_id=f"r{num_prompt}", token_ids=[1] * num_prompt, params=SamplingParams(), limit=num_prompt + 100
    )


def sampled(count: int) -> Any:
    return SimpleNamespace(tokens=[0] * count)


def arrive(books: Accounting, plan: IterationPlan, results: list, dispatched: float, now: float, compiled: int = 0):
    return books.arrived(plan, results, dispatched=dispatched, now=now, num_compilations=compiled)


def test_a_mixed_step_costs_what_the_cost_model_says() -> None:
    chunks = [Chunk(request(10), 15, 1, 1), Chunk(request(300), 100, 200, 1), Chunk(request(500), 0, 50, 0)]
    books = Accounting(MODEL, CEILINGS)
    record = arrive(books, IterationPlan(chunks), [(c, sampled(1)) for c in chunks[:2]], 1.0, 1.5)
    expected = iteration_cost(MODEL, [(1, 16), (200, 300), (50, 50)], samples=2)
    assert (record.flops, record.bytes) == (expected.flops, expected.bytes)
    assert (record.num_tokens, record.num_decodes, record.num_prefill_tokens, record.num_sampled) == (251, 1, 250, 2)
    assert record.seconds == pytest.approx(0.5)
    assert record.mfu == pytest.approx(expected.flops / 0.5 / 1e15)
    assert record.mbu == pytest.approx(expected.bytes / 0.5 / 3e12)
    assert record.line().startswith("iteration of 251 tokens x 1 (1 decodes): 500.0 ms, MFU 0.")


def test_a_decode_loop_costs_its_steps_and_idle_rows_nothing() -> None:
    chunks = [Chunk(request(10), 15, 1, 4), Chunk(request(20), 30, 1, 4)]
    plan = IterationPlan(chunks, is_decode_loop=True, num_steps=4)
    books = Accounting(MODEL)
    record = arrive(books, plan, [(chunks[0], sampled(3)), (chunks[1], sampled(1))], 1.0, 2.0)
    steps = [[(1, 16), (1, 31)], [(1, 17)], [(1, 18)]]  # the fourth step never ran
    costs = [iteration_cost(MODEL, rows) for rows in steps]
    assert record.flops == pytest.approx(sum(c.flops for c in costs))
    assert record.bytes == pytest.approx(sum(c.bytes for c in costs))
    assert record.num_sampled == 4
    assert record.mfu is None, "nothing is known about the device"


def test_seconds_are_between_arrivals_and_not_from_dispatch() -> None:
    chunk = Chunk(request(10), 15, 1, 1)
    plan, results = IterationPlan([chunk]), [(chunk, sampled(1))]
    books = Accounting(MODEL, CEILINGS)
    first = arrive(books, plan, results, 1.0, 2.0)
    second = arrive(books, plan, results, 1.1, 2.25)  # dispatched while the first ran
    third = arrive(books, plan, results, 10.0, 10.5)  # after a pause
    assert [r.seconds for r in (first, second, third)] == pytest.approx([1.0, 0.25, 0.5])
    assert books.totals.seconds == pytest.approx(1.75)


def test_an_iteration_that_samples_nothing_has_its_own_time() -> None:
    prompt = request(400)
    books = Accounting(MODEL, CEILINGS)
    first = arrive(books, IterationPlan([Chunk(prompt, 0, 100, 0)]), [], 1.0, 1.5)
    second = arrive(books, IterationPlan([Chunk(prompt, 100, 100, 0)]), [], 1.1, 2.25)
    assert (first.seconds, second.seconds) == pytest.approx((0.5, 0.75))
    assert (first.num_prefill_tokens, first.num_sampled) == (100, 0)


def test_an_iteration_behind_a_compilation_does_not_count_as_slow() -> None:
    chunk = Chunk(request(10), 15, 1, 1)
    plan, results = IterationPlan([chunk]), [(chunk, sampled(1))]
    books = Accounting(MODEL, CEILINGS)
    slow = arrive(books, plan, results, 0.0, 9.0, compiled=3)
    fast = arrive(books, plan, results, 8.9, 9.1, compiled=3)
    assert slow.compiled and slow.mfu is None
    assert books.recent()["mfu"] == pytest.approx(fast.mfu)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "page_size": 8,
        "kv_cache_memory_bytes": 8 << 20,
    }
    return LLM(str(tiny_llama), **settings)


def test_metrics_of_a_run_add_up(llm: LLM) -> None:
    lengths = (1, 40, 90, 33)
    prompts = [{"prompt_token_ids": [i + 1, *range(n - 1)]} for i, n in enumerate(lengths)]
    before = llm.engine.accounting.totals.num_iterations
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    metrics = llm.get_metrics()
    records = list(llm.engine.records)[before:]
    assert metrics["prefill_tokens_total"] == sum(lengths) == sum(r.num_prefill_tokens for r in records)
    assert metrics["generation_tokens_total"] == 12 * len(lengths) == sum(r.num_sampled for r in records)
    for key, name in (("flops_total", "flops"), ("bytes_total", "bytes"), ("device_seconds_total", "seconds")):
        assert metrics[key] == pytest.approx(sum(getattr(r, name) for r in records))
    # FLOPs do not depend on how requests met in iterations.
    model = engine_cost(llm.engine.runner.model, llm.engine.runner.shapes.kv_dtype)
    steps = [iteration_cost(model, [(n, n)]) for n in lengths]
    steps += [iteration_cost(model, [(1, n + i)]) for n in lengths for i in range(1, 12)]
    assert metrics["flops_total"] == pytest.approx(sum(cost.flops for cost in steps))
    assert 0 < metrics["bytes_total"] < sum(cost.bytes for cost in steps), "requests share the weights"
    assert (metrics["num_requests_running"], metrics["num_requests_waiting"]) == (0, 0)
    assert metrics["kv_cache_usage_perc"] == 0
    assert metrics["prefix_cache_queries_total"] == sum(lengths)
    assert metrics["compilations_total"] > 0
    assert metrics["ceilings"]["source"] == "host CPU (measured)"


def test_metrics_in_the_middle_of_a_run_show_it(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5] * 64}
    pieces = llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    next(pieces)
    metrics = llm.get_metrics()
    assert metrics["num_requests_running"] == 1
    assert 0 < metrics["kv_cache_usage_perc"] < 1
    list(pieces)
    llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    metrics = llm.get_metrics()
    assert 0 < metrics["prefix_cache_hit_rate"] < 1
    assert metrics["generation_tokens_per_s"] > 0
    assert 0 < metrics["mfu"] < 2 and 0 < metrics["mbu"] < 2


def test_weights_are_counted_as_they_lie_on_the_mesh(tiny_llama: Path) -> None:
    from jaxllm.config import EngineConfig
    from jaxllm.engine.build import build_engine

    def model(**kwargs: Any) -> Any:
        config = EngineConfig(model=str(tiny_llama), dtype="float32", kv_cache_memory_bytes=8 << 20, **kwargs)
        return build_engine(config, progress=False).engine.accounting.model

    one, four = model(max_model_len=64), model(max_model_len=64, mesh="tp=4")
    assert four.kv_bytes == 2 * one.kv_bytes, "two key/value heads on four devices are stored twice"
    assert one.block_bytes < four.block_bytes < 2 * one.block_bytes, "norms and copied heads"
    assert four.token_flops == one.token_flops
    whole = model(max_model_len=64, mesh="tp=2", sharding_rules="replicated")
    assert whole.block_bytes == 2 * one.block_bytes
    assert whole.kv_bytes == 2 * one.kv_bytes


def test_throughput_reports_utilisation(llm: LLM) -> None:
    report = measure_throughput(llm, lambda seed: random_prompts(4, 8, 8, 256, seed), 1)
    assert 0 < report["mfu"] < 2 and 0 < report["mbu"] < 2
    assert "MFU" in format_report(report) and "host CPU (measured)" in format_report(report)


@pytest.fixture
def trace(tmp_path: Path) -> tuple[Path, list[tuple[int, int]]]:
    """A file of 60 requests, and their prompt and output tokens shrunk so that the longest is 512."""
    path, lengths = tmp_path / "trace.csv", [(37 * i % 900 + 1, 13 * i % 40 + 1) for i in range(60)]
    rows = "".join(f"{prompt},{output}\n" for prompt, output in lengths)
    path.write_text("num_prefill_tokens,num_decode_tokens\n" + rows)
    factor = 512 / max(prompt + output for prompt, output in lengths)
    return path, [(max(1, int(prompt * factor)), max(1, int(output * factor))) for prompt, output in lengths]


def test_replaying_a_trace_compiles_nothing_after_warm_up(
    llm: LLM, trace: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lengths = trace
    monkeypatch.setattr(bench_cli, "load_llm", lambda args: llm)
    flags = ["--num-prompts=60", f"--trace={path}", "--scale-lengths", "--num-iters=1", "--json"]
    assert main(["bench", "throughput", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompt_tokens"] == sum(prompt for prompt, _ in lengths)
    assert report["compilations_after_warmup"] == 0


def test_latency_of_a_trace_is_that_of_its_lengths_in_batches_that_arrive_together(
    llm: LLM, trace: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lengths = trace
    monkeypatch.setattr(bench_cli, "load_llm", lambda args: llm)
    sent, add_request = [], llm.engine.add_request

    def add(prompt: list[int], params: SamplingParams) -> Request:
        sent.append((len(prompt), params.max_tokens, len(llm.engine.unfinished)))
        return add_request(prompt, params)

    monkeypatch.setattr(llm.engine, "add_request", add)
    flags = ["--batch-size=3", f"--trace={path}", "--scale-lengths"]
    assert main(["bench", "latency", *flags, "--num-prompts=60", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sent[3:] == [(*length, i % 3) for i, length in enumerate(lengths)], "after three to warm up"
    assert report["num_prompts"] == 60
    assert report["output_tokens"] == sum(output for _, output in lengths)
    assert report["compilations_after_warmup"] == 0
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert set(report[name]) == {"p50", "p90", "p99"}
    assert 0 < report["ttft_ms"]["p50"] < report["e2e_ms"]["p50"]
    assert main(["bench", "latency", *flags, "--num-prompts=4"]) == 0
    assert "4 prompts in batches of 3" in capsys.readouterr().out


def test_records_can_be_summed() -> None:
    assert summed([]).rates(CEILINGS) == {
        "prefill_tokens_per_s": 0.0,
        "generation_tokens_per_s": 0.0,
        "mfu": None,
        "mbu": None,
    }
