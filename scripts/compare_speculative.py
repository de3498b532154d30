#!/usr/bin/env python3
"""Prompt lookup in jaxllm and in vLLM, each beside its own plain decoding, on the same prompts in one run.

    python scripts/compare_speculative.py --model FOLDER --vllm-python OTHER_ENV/bin/python

FOLDER is a Hugging Face folder that both can read. The prompts are those of `jaxllm bench speculative` (or `--lines
FILE`, one prompt a line), one request at a time, greedy, each answer to its full length; all engines get the same ids.
Every engine loads once, in a process of its own; a first short round puts prompts into the prefix caches, then each
prompt goes round all engines, so that a slow minute of the machine hits all of them. Prints tokens per second and what
drafts bring: medians over rounds. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_process import PeerProcess

CONTEXT = 2048
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
Generate = Callable[[list[int], int], list[int]]


def main() -> int:
    """All engines, all workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--vllm-python", metavar="PATH", help="an interpreter that has vllm; without it, jaxllm alone")
    parser.add_argument("--speculative-config", type=json.loads, default=DRAFTS, metavar="JSON")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="prompts in place of the bench's")
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json-file", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--worker", choices=tuple(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(ENGINES[args.worker](args.model, args.dtype, None if args.plain else args.speculative_config))
    report = compare(args)
    print(table(report))
    if args.json_file:
        args.json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second: workload -> engine -> figure."""
    pythons = {"jaxllm": sys.executable} | ({"vllm": args.vllm_python} if args.vllm_python else {})
    engines = [(name, plain) for name in pythons for plain in (True, False)]
    asked = prompts(args.model, args.lines)
    with contextlib.ExitStack() as stack:
        workers = {
            f"{name} {'plain' if plain else 'drafting'}": stack.enter_context(Worker(name, pythons[name], plain, args))
            for name, plain in engines
        }
        for worker in workers.values():  # they load side by side
            for ids in (ids for texts in asked.values() for ids in texts):
                worker.run([ids, 8])
        report: dict[str, dict[str, float]] = {}
        for workload, texts in asked.items():
            seconds: dict[str, list[float]] = {name: [0.0] * args.rounds for name in workers}
            for i in range(args.rounds):
                for ids in texts:
                    for name, worker in workers.items():
                        seconds[name][i] += worker.run([ids, args.output_len])
            num = len(texts) * args.output_len
            report[workload] = {name: num / statistics.median(took) for name, took in seconds.items()}
            print(f"{workload}: {report[workload]}", file=sys.stderr)
    return report


def prompts(model: str, lines: Path | None) -> dict[str, list[list[int]]]:
    """Token ids by workload."""
    from jaxllm.bench.speculative_prompts import WORKLOADS
    from jaxllm.tokenizer import load_tokenizer

    texts = {"lines": lines.read_text(encoding="utf-8").splitlines()} if lines else WORKLOADS
    tokenizer = load_tokenizer(Path(model))
    return {
        name: [tokenizer.chat_prompt([{"role": "user", "content": text}])["prompt_token_ids"] for text in some]
        for name, some in texts.items()
    }


class Worker(PeerProcess):
    """One engine: work is a prompt's ids and how many tokens to answer."""

    def __init__(self, name: str, python: str, plain: bool, args: argparse.Namespace):
        command = [python, __file__, "--worker", name, "--model", args.model, "--dtype", args.dtype]
        command += ["--plain"] if plain else ["--speculative-config", json.dumps(args.speculative_config)]
        super().__init__(name, command)


def table(report: dict[str, dict[str, float]]) -> str:
    """Markdown: tokens per second, each engine's gain by drafts, and the two drafting ones against each other."""
    columns = list(next(iter(report.values())))
    names = [column.split()[0] for column in columns[1::2]]
    against = [f"{names[0]} against {name}, drafting" for name in names[1:]]
    head = ["workload", *columns, *(f"{name}: gain" for name in names), *against]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for workload, rates in report.items():
        cells = [f"{rates[column]:.1f}" for column in columns]
        cells += [f"{rates[f'{name} drafting'] / rates[f'{name} plain']:.2f}x" for name in names]
        cells += [f"{rates[f'{names[0]} drafting'] / rates[f'{name} drafting']:.2f}x" for name in names[1:]]
        lines.append("| " + " | ".join([workload, *cells]) + " |")
    return "\n".join(lines)


# The workers' side. Each engine is imported where it is used: the environments differ.


def serve(generate: Generate) -> int:
    """Answer prompts from standard input until it ends."""
    for line in sys.stdin:
        ids, output = json.loads(line)
        started = time.perf_counter()
        answer = generate(ids, output)
        assert len(answer) == output, (len(answer), output)
        print(f"seconds {time.perf_counter() - started}", flush=True)
    return 0


def jaxllm_engine(model: str, dtype: str, drafts: dict[str, Any] | None) -> Generate:
    from jaxllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, max_model_len=CONTEXT, max_num_seqs=4, speculative_config=drafts)
    llm.engine.runner.warm_up(sampling=False)

    def generate(ids: list[int], output: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0].outputs[0].token_ids

    return generate


def vllm_engine(model: str, dtype: str, drafts: dict[str, Any] | None) -> Generate:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=CONTEXT,
        max_num_seqs=4,
        max_num_batched_tokens=2048,
        enable_prefix_caching=True,
        speculative_config=drafts,
    )

    def generate(ids: list[int], output: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        return list(llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)[0].outputs[0].token_ids)

    return generate


ENGINES: dict[str, Callable[[str, str, dict[str, Any] | None], Generate]] = {
    "jaxllm": jaxllm_engine,
    "vllm": vllm_engine,
}

if __name__ == "__main__":
    sys.exit(main())
