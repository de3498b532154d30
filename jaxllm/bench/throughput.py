"""Offline throughput: prompts of one length -> tokens per second of prefill and of decode.

The two phases are timed apart: prefill as a run that generates one token, decode as the full run. Medians over
repeats, after a warm-up that compiles every program.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine.llm import LLM


def measure_throughput(
    llm: LLM, *, num_prompts: int, input_len: int, output_len: int, num_iters: int
) -> dict[str, Any]:
    """Generate `num_prompts * output_len` tokens `num_iters` times; see `conventions` for the keys of the result."""
    llm.engine.runner.warm_up(sampling=False)
    _run(llm, num_prompts, input_len, 2, seed=0)
    prefills = [_run(llm, num_prompts, input_len, 1, seed=1 + i) for i in range(num_iters)]
    totals = [_run(llm, num_prompts, input_len, output_len, seed=1001 + i) for i in range(num_iters)]
    prefill_s, elapsed_s = statistics.median(prefills), statistics.median(totals)
    return {
        "model": llm.config.model,
        "num_prompts": num_prompts,
        "prompt_tokens": num_prompts * input_len,
        "output_tokens": num_prompts * output_len,
        "elapsed_s": elapsed_s,
        "output_tokens_per_s": num_prompts * output_len / elapsed_s,
        "prefill_tokens_per_s": num_prompts * input_len / prefill_s,
        "compilations_after_warmup": llm.engine.runner.num_compilations_after_warmup,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def random_prompts(llm: LLM, num_prompts: int, input_len: int, seed: int) -> list[list[int]]:
    """Token ids that no other seed repeats, so that no run profits from another's cached pages."""
    shape = (num_prompts, input_len)
    return np.random.default_rng(seed).integers(0, llm.model_config.vocab_size, shape).tolist()


def _run(llm: LLM, num_prompts: int, input_len: int, output_len: int, seed: int) -> float:
    """Seconds to run distinct random prompts to their full length; nothing may be reused between runs."""
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(llm, num_prompts, input_len, seed)]
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - started
    assert all(len(o.outputs[0].token_ids) == output_len for o in outputs), "a request ended early"
    return elapsed


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_report(report: dict[str, Any]) -> str:
    """Two lines for a person."""
    return (
        f"prefill {report['prefill_tokens_per_s']:,.0f} tokens/s, output {report['output_tokens_per_s']:,.0f} tokens/s "
        f"({report['num_prompts']} prompts, {report['output_tokens']} tokens in {report['elapsed_s']:.2f} s)\n"
        f"compilations after warm-up {report['compilations_after_warmup']}, "
        f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
