"""Offline throughput: a workload whose requests all arrive at once -> tokens per second of prefill and of decode.

The two phases are timed apart: prefill as a run that generates one token, decode as the full run. Medians over
repeats, after a warm-up that compiles every program. MFU and MBU are those of the full runs, against the data sheet
or, where there is none, against what the device itself reached just before.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.config.sampling import SamplingParams
from jaxllm.telemetry.device_peaks import measured_ceilings

if TYPE_CHECKING:
    from jaxllm.bench.workload import Planned
    from jaxllm.entrypoints.llm import LLM


def measure_throughput(llm: LLM, workload: Callable[[int], Sequence[Planned]], num_iters: int) -> dict[str, Any]:
    """Run the workload to its end `num_iters` times.

    Args:
        llm: the engine.
        workload: seed -> requests. No two seeds may share tokens: nothing may come out of the prefix cache.
        num_iters: repeats; medians are reported.
    """
    llm.engine.runner.warm_up(sampling=False, tiers=llm.engine.tiers is not None)
    requests = workload(0)
    num_prompts, prompt_tokens = len(requests), sum(len(r.prompt) for r in requests)
    output_tokens = sum(r.output_len for r in requests)
    _run(llm, requests[: 2 * llm.config.max_num_seqs], max_tokens=2)
    accounting = llm.engine.accounting
    accounting.ceilings = accounting.ceilings or measured_ceilings(llm.engine.runner.model)
    prefills = [_run(llm, workload(1 + i), max_tokens=1) for i in range(num_iters)]
    before = dataclasses.replace(accounting.totals)
    totals = [_run(llm, workload(1001 + i)) for i in range(num_iters)]
    rates = accounting.totals.since(before).rates(accounting.ceilings)
    prefill_s, elapsed_s = statistics.median(prefills), statistics.median(totals)
    return {
        "model": llm.config.model,
        "num_prompts": num_prompts,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "elapsed_s": elapsed_s,
        "output_tokens_per_s": output_tokens / elapsed_s,
        "prefill_tokens_per_s": prompt_tokens / prefill_s,
        "compilations_after_warmup": llm.engine.runner.num_compilations_after_warmup,
        "mfu": rates["mfu"],
        "mbu": rates["mbu"],
        "ceilings": dataclasses.asdict(accounting.ceilings),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _run(llm: LLM, requests: Sequence[Planned], max_tokens: int | None = None) -> float:
    """Seconds to run the requests to their full length, or to `max_tokens`."""
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    lengths = [min(request.output_len, max_tokens or request.output_len) for request in requests]
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False) for length in lengths
    ]
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - started
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths, "a request ended early"
    return elapsed


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_report(report: dict[str, Any]) -> str:
    """Three lines for a person."""
    ceilings = report["ceilings"]
    return (
        f"prefill {report['prefill_tokens_per_s']:,.0f} tokens/s, output {report['output_tokens_per_s']:,.0f} tokens/s "
        f"({report['num_prompts']} prompts, {report['output_tokens']} tokens in {report['elapsed_s']:.2f} s)\n"
        f"MFU {report['mfu']:.1%}, MBU {report['mbu']:.1%} of {ceilings['source']}: "
        f"{ceilings['flops_per_s'] / 1e12:,.3g} TFLOP/s, {ceilings['bytes_per_s'] / 1e9:,.3g} GB/s\n"
        f"compilations after warm-up {report['compilations_after_warmup']}, "
        f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
