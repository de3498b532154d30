"""Latency of batches: requests that arrive together -> distributions of TTFT, TPOT, ITL and end-to-end time.

A batch is sent when the one before has ended. Times are taken where tokens reach the host, so several tokens of one
dispatch count as one gap and zeros. Knows nothing of where the lengths come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.bench.decode_phase import decode_phase
from jaxllm.config.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxllm.bench.workload import Planned
    from jaxllm.entrypoints.llm import LLM

PERCENTILES = (50, 90, 99)


def measure_latency(
    llm: LLM, workload: Callable[[int], Sequence[Planned]], *, batch_size: int, num_iters: int
) -> dict[str, Any]:
    """Run the workload `num_iters` times after a warm-up.

    Args:
        llm: the engine.
        workload: seed -> requests. No two seeds may share tokens: nothing may come out of the prefix cache.
        batch_size: requests that arrive together, in the workload's order; the last batch may have fewer.
        num_iters: repeats; the percentiles are over all requests of all of them (ITL: over all gaps).

    Returns:
        Milliseconds, the sizes of one repeat, and how many programs were compiled after the warm-up. `tpot_ms` has what
        decodes wait for the prompts of others; `decode_ms` is the time per token while every request of a batch
        decodes, over batches.
    """
    runner = llm.engine.runner
    runner.warm_up(sampling=False, tiers=llm.engine.tiers is not None)
    requests = workload(0)
    arrivals(llm, requests[:batch_size], max_tokens=2)
    batches = [batch for i in range(num_iters) for batch in _run(llm, workload(1 + i), batch_size)]
    tokens = [times for batch in batches for times in batch]
    decoding = [seconds for batch in batches if (seconds := decode_phase(batch)) is not None]
    return {
        "model": llm.config.model,
        "batch_size": batch_size,
        "num_prompts": len(requests),
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "output_tokens": sum(request.output_len for request in requests),
        "ttft_ms": percentiles([t[0] for t in tokens]),
        "tpot_ms": percentiles([(t[-1] - t[0]) / (len(t) - 1) for t in tokens if len(t) > 1]),
        "decode_ms": percentiles(decoding),
        "itl_ms": percentiles([gap for t in tokens for gap in np.diff(t)]),
        "e2e_ms": percentiles([t[-1] for t in tokens]),
        "compilations_after_warmup": runner.num_compilations_after_warmup,
    }


def _run(llm: LLM, requests: Sequence[Planned], batch_size: int) -> list[list[list[float]]]:
    return [arrivals(llm, requests[i : i + batch_size]) for i in range(0, len(requests), batch_size)]


def arrivals(llm: LLM, requests: Sequence[Planned], max_tokens: int | None = None) -> list[list[float]]:
    """For each request, when each of its tokens arrived, in seconds after all were sent."""
    engine, times = llm.engine, {}
    started = time.perf_counter()
    for request in requests:
        limit = min(request.output_len, max_tokens or request.output_len)
        params = SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True)
        times[engine.add_request(request.prompt, params).request_id] = []
    while engine.has_work:
        for news in engine.step():
            times[news.request.request_id] += [time.perf_counter() - started] * len(news.tokens)
    return list(times.values())


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """`{"p50": ..., "p90": ..., "p99": ...}` in milliseconds; empty for no values."""
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 for p in PERCENTILES} if len(seconds) else {}


def format_report(report: dict[str, Any]) -> str:
    """A row of percentiles per metric, and what was run."""
    lines = [
        f"{report['num_prompts']} prompts in batches of {report['batch_size']}: "
        f"{report['prompt_tokens']} prompt tokens, {report['output_tokens']} output tokens"
    ]
    for name in ("ttft_ms", "tpot_ms", "decode_ms", "itl_ms", "e2e_ms"):
        lines.append(f"{name:<9} " + "  ".join(f"{p} {value:9.2f}" for p, value in report[name].items()))
    return "\n".join([*lines, f"compilations after warm-up {report['compilations_after_warmup']}"])
