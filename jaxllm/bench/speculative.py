"""Speculative decoding against plain decoding: the same prompts on two engines in turn -> tokens per second of both.

Both engines run side by side, so that what else the machine does hits both alike; medians over repeats. Prompts are
those of `speculative_prompts`, or the lines of a file.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.bench.speculative_prompts import WORKLOADS
from jaxllm.config.sampling import SamplingParams

if TYPE_CHECKING:
    from jaxllm.entrypoints.llm import LLM


def measure_speculative(
    plain: LLM,
    speculating: LLM,
    *,
    output_len: int,
    batch_size: int,
    num_iters: int,
    temperature: float = 0.0,
    workloads: Mapping[str, Sequence[str]] = WORKLOADS,
) -> dict[str, Any]:
    """Every workload on both engines, each answer to its full length.

    Args:
        plain, speculating: of one model; the second has a `speculative_config`.
        output_len: tokens generated per prompt.
        batch_size: prompts that run together; a workload's prompts are repeated to fill it.
        num_iters: repeats.
        temperature: 0 is greedy; seeds are the same on both.
        workloads: name -> what the user says.
    """
    for llm in (plain, speculating):
        llm.engine.runner.warm_up(sampling=temperature > 0)
    report = {
        name: _measure(plain, speculating, prompts, output_len, batch_size, num_iters, temperature)
        for name, prompts in workloads.items()
    }
    return {
        "model": plain.config.model,
        "speculative_config": dict(speculating.config.speculative_config or {}),
        "output_len": output_len,
        "batch_size": batch_size,
        "workloads": report,
        "compilations_after_warmup": speculating.engine.runner.num_compilations_after_warmup,
    }


def _measure(
    plain: LLM,
    speculating: LLM,
    prompts: Sequence[str],
    output_len: int,
    batch_size: int,
    num_iters: int,
    temperature: float,
) -> dict[str, float]:
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=output_len, ignore_eos=True)
        for i in range(batch_size)
    ]
    batches = [[plain.chat_prompt([{"role": "user", "content": text}])] * batch_size for text in prompts]
    seconds: dict[int, list[float]] = {0: [], 1: []}
    same = total = 0
    for batch in batches:
        for llm in (plain, speculating):
            llm.generate(batch, params)  # prompts are in the prefix cache from here on
    before = dataclasses.replace(speculating.engine.drafts)
    for _ in range(num_iters):
        tokens = []
        for i, llm in enumerate((plain, speculating)):
            started = time.perf_counter()
            outputs = [output for batch in batches for output in llm.generate(batch, params)]
            seconds[i].append(time.perf_counter() - started)
            tokens.append([output.outputs[0].token_ids for output in outputs])
        same += sum(a == b for a, b in zip(*tokens, strict=True))
        total += len(tokens[0])
    drafts = speculating.engine.drafts
    iterations, verifying = drafts.num_iterations - before.num_iterations, drafts.num_verifying - before.num_verifying
    accepted = drafts.num_accepted_tokens - before.num_accepted_tokens
    drafted, num_drafts = drafts.num_draft_tokens - before.num_draft_tokens, drafts.num_drafts - before.num_drafts
    num_tokens = len(prompts) * batch_size * output_len
    one, other = (statistics.median(seconds[i]) for i in (0, 1))
    return {
        "plain_tokens_per_s": num_tokens / one,
        "speculative_tokens_per_s": num_tokens / other,
        "speedup": one / other,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
        "mean_acceptance_length": 1 + accepted / num_drafts if num_drafts else 1.0,
        "tokens_per_iteration": num_tokens * num_iters / batch_size / iterations if iterations else 1.0,
        "verifying_share": verifying / iterations if iterations else 0.0,
        "accepted_share": accepted / (num_tokens * num_iters),
        "same_answers": same / total,
    }


def format_report(report: Mapping[str, Any]) -> str:
    """A row per workload.

    `per iter` is what does not depend on how quiet the machine is: tokens of a request per iteration; `verify` is the
    share of the iterations that verified drafts, and cost more than the others.
    """
    rows = [
        f"{'workload':<12} {'plain':>9} {'spec':>9} {'speedup':>8} {'per iter':>9} {'verify':>7} {'accepted':>9} "
        f"{'length':>7} {'same':>6}"
    ]
    for name, row in report["workloads"].items():
        rows.append(
            f"{name:<12} {row['plain_tokens_per_s']:>9.1f} {row['speculative_tokens_per_s']:>9.1f} "
            f"{row['speedup']:>7.2f}x {row['tokens_per_iteration']:>9.2f} {row['verifying_share']:>7.0%} "
            f"{row['acceptance_rate']:>9.1%} {row['mean_acceptance_length']:>7.2f} {row['same_answers']:>6.0%}"
        )
    return "\n".join([*rows, f"compilations after warm-up {report['compilations_after_warmup']}"])
