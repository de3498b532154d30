"""Latency of one batch: all requests arrive together -> distributions of TTFT, TPOT, ITL and end-to-end time.

Times are taken where tokens reach the host, so several tokens of one dispatch count as one gap and zeros.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.bench.workload import random_prompts
from jaxllm.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine.llm import LLM

PERCENTILES = (50, 90, 99)


def measure_latency(llm: LLM, *, batch_size: int, input_len: int, output_len: int, num_iters: int) -> dict[str, Any]:
    """Run `num_iters` batches after a warm-up; milliseconds, percentiles over all requests (ITL: all gaps)."""
    llm.engine.runner.warm_up(sampling=False, tiers=llm.engine.tiers is not None)
    _arrivals(llm, batch_size, input_len, 2, seed=0)
    runs = [_arrivals(llm, batch_size, input_len, output_len, seed=1 + i) for i in range(num_iters)]
    tokens = [times for run in runs for times in run]
    return {
        "model": llm.config.model,
        "batch_size": batch_size,
        "ttft_ms": percentiles([t[0] for t in tokens]),
        "tpot_ms": percentiles([(t[-1] - t[0]) / (len(t) - 1) for t in tokens if len(t) > 1]),
        "itl_ms": percentiles([gap for t in tokens for gap in np.diff(t)]),
        "e2e_ms": percentiles([t[-1] for t in tokens]),
    }


def _arrivals(llm: LLM, batch_size: int, input_len: int, output_len: int, seed: int) -> list[list[float]]:
    """For each request, when each of its tokens arrived, in seconds after all were sent."""
    engine = llm.engine
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    started = time.perf_counter()
    planned = random_prompts(batch_size, input_len, output_len, llm.model_config.vocab_size, seed)
    times: dict[str, list[float]] = {engine.add_request(p.prompt, params).request_id: [] for p in planned}
    while engine.has_work:
        for news in engine.step():
            times[news.request.request_id] += [time.perf_counter() - started] * len(news.tokens)
    return list(times.values())


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """`{"p50": ..., "p90": ..., "p99": ...}` in milliseconds; empty for no values."""
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 for p in PERCENTILES} if len(seconds) else {}
