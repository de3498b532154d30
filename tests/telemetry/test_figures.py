"""One list of figures behind `get_metrics`, `/metrics` and `/stats`, with one definition of each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.families.presets import model_config
from jaxllm.roofline.cost_model import model_cost
from jaxllm.server.prometheus import Families
from jaxllm.telemetry.accounting import Accounting, Ceilings, IterationRecord


def record(seconds: float, share: float, *, compiled: bool = False) -> IterationRecord:
    """An iteration that did `share` of what 1 FLOP/s and 1 byte/s allow."""
    return IterationRecord(1, 1, 1, (), 0, 1, share * seconds, share * seconds, seconds, compiled, share, share)


def test_utilisation_is_a_sum_over_a_sum_of_time() -> None:
    books = Accounting(model_cost(model_config("llama-2-7b")), Ceilings(1.0, 1.0, "test"))
    books.add(record(0.4, 0.4))  # one prefill
    for _ in range(63):
        books.add(record(0.01, 0.02))  # and decodes: the mean of the ratios would be 2.6%
    books.add(record(9.0, 0.001, compiled=True))  # somebody else's time
    assert (
        books.recent()["mfu"] == pytest.approx((0.4 * 0.4 + 63 * 0.01 * 0.02) / (0.4 + 0.63)) == books.recent()["mbu"]
    )


def test_everybody_reads_the_same_figures(tiny_llama) -> None:
    llm = LLM(str(tiny_llama), max_model_len=64, max_num_seqs=4)
    llm.generate(["a prompt", "another"], SamplingParams(max_tokens=8), use_tqdm=False)
    metrics = llm.get_metrics()
    llm.generate(["one prompt more"], SamplingParams(max_tokens=8), use_tqdm=False)
    metrics = llm.get_metrics()
    assert metrics["generation_tokens_total"] == 24
    server = SimpleNamespace(engine=llm.engine, thread=SimpleNamespace(num_queued=3, num_failures=0), admission=None)
    families = Families()
    stats, page = families.of(server, "tiny").snapshot(), families.exposition().decode()
    for name, value in metrics.items():
        if name in ("ceilings", "num_requests_waiting") or name.endswith("_per_s"):
            continue
        assert stats[name.removesuffix("_total")] == value, name
        (line,) = [line for line in page.splitlines() if line.startswith(f"jaxllm:{name}{{")]
        assert float(line.rpartition(" ")[2]) == pytest.approx(value), name
    assert metrics["mfu"] > 0 and stats["num_requests_waiting"] == 3
