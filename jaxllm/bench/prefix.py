"""What a lower tier is worth: time to first token of prompts whose pages were pushed off the device, against computing.

Every round uses new random prompts: a batch that must be computed, then, after everything idle was evicted into the
tier, the same batch again. Medians over rounds of the batch's mean TTFT.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from jaxllm.bench.workload import random_prompts
from jaxllm.config.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxllm.entrypoints.llm import LLM


def measure_prefix(llm: LLM, *, num_prompts: int, input_len: int, num_iters: int, from_disk: bool) -> dict[str, Any]:
    """Measure `num_iters` rounds after one to warm up."""
    engine = llm.engine
    assert engine.tiers is not None and engine.mover is not None, "an engine without tiers"
    engine.runner.warm_up(sampling=False, tiers=True)
    computed, loaded, found = [], [], []
    for i in range(num_iters + 1):
        planned = random_prompts(num_prompts, input_len, 1, llm.model_config.vocab_size, seed=i)
        prompts = [request.prompt for request in planned]
        computed.append(_ttft(llm, prompts)[0])
        engine.evict_idle()
        engine.mover.wait()
        if from_disk:
            engine.mover.flush()
            engine.tiers.host.clear()
        seconds, cached = _ttft(llm, prompts)
        loaded.append(seconds)
        found.append(cached)
        engine.pool.reset_prefix_cache()
        engine.tiers.host.clear()
    compute_s, load_s = statistics.median(computed[1:]), statistics.median(loaded[1:])
    return {
        "model": llm.config.model,
        "tier": "disk" if from_disk else "host",
        "num_prompts": num_prompts,
        "input_len": input_len,
        "ttft_computed_ms": compute_s * 1e3,
        "ttft_loaded_ms": load_s * 1e3,
        "speedup": compute_s / load_s,
        "cached_tokens": found[-1],
        "page_bytes": engine.tiers.page_bytes,
        "copy_bytes_per_s": engine.tiers.copy_rate,
        "compilations_after_warmup": engine.runner.num_compilations_after_warmup,
    }


def _ttft(llm: LLM, prompts: list[list[int]]) -> tuple[float, int]:
    """Mean seconds to the first token of a batch that arrives together, and the tokens found in a cache."""
    started = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    requests = [llm.engine.add_request(ids, params) for ids in prompts]
    first: dict[str, float] = {}
    while len(first) < len(requests):
        for news in llm.engine.step():
            first.setdefault(news.request.request_id, time.perf_counter() - started)
    while llm.engine.has_work:
        llm.engine.step()
    return statistics.mean(first.values()), sum(request.num_cached or 0 for request in requests)


def format_report(report: dict[str, Any]) -> str:
    """Two lines for a person."""
    return (
        f"TTFT {report['ttft_computed_ms']:.1f} ms computed, {report['ttft_loaded_ms']:.1f} ms loaded from "
        f"{report['tier']}: {report['speedup']:.1f} times faster ({report['num_prompts']} prompts of "
        f"{report['input_len']} tokens, {report['cached_tokens']} found)\n"
        f"{report['page_bytes']:,} bytes per page, {report['copy_bytes_per_s'] / 1e9:.2f} GB/s into the device, "
        f"compilations after warm-up {report['compilations_after_warmup']}"
    )
