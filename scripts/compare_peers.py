"""Run jaxllm, vLLM and transformers over one model on one machine, in turn, and print a table of ratios.

    python scripts/compare_peers.py --model FOLDER --vllm-python OTHER_ENV/bin/python --json-file peers.json
    python scripts/compare_peers.py --model FOLDER --gguf FILE --llama-python OTHER_ENV/bin/python --no-startup

FOLDER is a Hugging Face folder that all can read; FILE the same model as GGUF, which jaxllm keeps quantised, with
activations of 16 bits and of 8, beside llama.cpp (`pip install llama-cpp-python`) on the same file. Every engine loads
once, in a process of its own, and waits; then each measurement goes round all engines, several times, so that a slow
minute of the machine hits all of them. Every request has its own random prompt, greedy, nothing cached. Decode is
output tokens over the whole time, prefill included. Start-up is from the command to the first token, once with empty
compilation caches and once with warm ones. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_process import PeerProcess

WORKLOADS = {
    "decode, 1 request": (1, 16, 64),
    "decode, 8 requests": (8, 16, 64),
    "decode, 32 requests": (32, 16, 64),
    "prefill, 8 x 512": (8, 512, 1),
}
FIRST_TOKEN = (1, 16, 1)
CONTEXT = 2048
Generate = Callable[[list[list[int]], int], Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--vllm-python", metavar="PATH", help="an interpreter that has vllm; without it vLLM is left out"
    )
    parser.add_argument("--transformers-python", metavar="PATH", default=sys.executable)
    parser.add_argument("--gguf", metavar="FILE", help="compare how this file is run, and FOLDER in bfloat16")
    parser.add_argument("--llama-python", metavar="PATH", help="an interpreter that has llama_cpp")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--startup", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json-file", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--worker", choices=tuple(ENGINES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(ENGINES[args.worker](args.model, args.dtype))
    ours, pythons = "jaxllm", {"jaxllm": sys.executable, "vllm": args.vllm_python}
    if args.gguf:
        ours = "jaxllm-gguf"
        pythons |= {ours: sys.executable, "jaxllm-gguf-int8": sys.executable, "llama.cpp": args.llama_python}
    else:
        pythons["transformers"] = args.transformers_python
    report = compare({name: path for name, path in pythons.items() if path}, args)
    print(table(report, ours))
    if args.json_file:
        args.json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def compare(pythons: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures by engine: tokens per second, seconds to the first token, peak memory."""
    report: dict[str, dict[str, float]] = {name: {} for name in pythons}
    with tempfile.TemporaryDirectory() as cache:
        for name, python in pythons.items() if args.startup else ():
            for state in ("cold", "warm"):
                started = time.perf_counter()
                with Worker(name, python, args, cache) as worker:
                    worker.run(FIRST_TOKEN)
                    report[name][f"first token, {state} (s)"] = time.perf_counter() - started
                print(f"{name}: first token, {state}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(name, python, args, cache)) for name, python in pythons.items()}
            for label, (num, prompt, output) in WORKLOADS.items():
                seconds = in_turn(workers, (num, prompt, output), args.rounds)
                for name, values in seconds.items():
                    rate = num * (output if output > 1 else prompt) / statistics.median(values)
                    report[name][f"{label} (tokens/s)"] = rate
                    print(f"{name}: {label}: {rate:.0f} tokens/s", file=sys.stderr)
            for name, worker in workers.items():
                report[name]["peak memory (GB)"] = worker.peak_bytes() / 1e9
    return report


def in_turn(workers: dict[str, Worker], workload: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; one round more, the first, is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds + 1):
        for name, worker in workers.items():
            took = worker.run(workload)
            if number:
                seconds[name].append(took)
    return seconds


class Worker(PeerProcess):
    """One engine: a workload is (requests, prompt tokens, output tokens)."""

    def __init__(self, name: str, python: str, args: argparse.Namespace, cache: str):
        model = args.gguf if name in OF_GGUF else args.model
        command = [python, __file__, "--worker", name, "--model", model, "--dtype", args.dtype]
        caches = {"JAX_COMPILATION_CACHE_DIR": "jax", "VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        # Of these caches only our own is small enough to be written always.
        settings = {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        super().__init__(name, command, settings | {key: f"{cache}/{folder}" for key, folder in caches.items()})

    def peak_bytes(self) -> int:
        """Largest resident size, summed over the process and its children."""
        return sum(_peak(pid) for pid in _tree(self.child.pid))


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in children for p in _tree(int(child)))]


def table(report: dict[str, dict[str, float]], engine: str) -> str:
    """Markdown: one row per figure, an engine's ratio to each other (above 1 is better for it, whatever the unit)."""
    peers = [name for name in report if name != engine]
    head = ["", *report, *(f"against {peer}" for peer in peers)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for label, ours in report[engine].items():
        ratios = [
            f"{report[p][label] / ours if '(tokens/s)' not in label else ours / report[p][label]:.2f}x" for p in peers
        ]
        cells = [label, *(f"{figures[label]:.4g}" for figures in report.values()), *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The workers' side. Each engine is imported where it is used: the environments differ.


def serve(generate: Generate) -> int:
    """Answer workloads from standard input until it ends."""
    rng = random.Random(0)
    for line in sys.stdin:
        num, prompt, output = json.loads(line)
        prompts = [[rng.randrange(100, 40000) for _ in range(prompt)] for _ in range(num)]
        started = time.perf_counter()
        generate(prompts, output)
        print(f"seconds {time.perf_counter() - started}", flush=True)
    return 0


def jaxllm_engine(model: str, dtype: str, **options: Any) -> Generate:
    from jaxllm import LLM, SamplingParams

    llm = LLM(model, dtype=dtype, max_model_len=CONTEXT, enable_prefix_caching=False, **options)

    def generate(prompts: list[list[int]], output: int) -> Any:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    return generate


def vllm_engine(model: str, dtype: str) -> Generate:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=CONTEXT,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], output: int) -> Any:
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        return llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)

    return generate


def transformers_engine(model: str, dtype: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], output: int) -> Any:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
            )

    return generate


def llama_cpp_engine(model: str, dtype: str) -> Generate:
    """All requests in one batch of sequences, each token chosen from its logits: what its server does."""
    import llama_cpp
    import numpy as np

    most = max(num for num, _, _ in WORKLOADS.values())
    tokens = max(num * (prompt + output) for num, prompt, output in WORKLOADS.values())
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = max(tokens, CONTEXT), 2048, 512, most
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    params.kv_unified = True
    context = llama_cpp.llama_init_from_model(loaded, params)
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def run(rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Rows of (sequence, position, token, is last) -> what follows the last ones."""
        for i, (sequence, position, token, is_last) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, is_last
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("compare_peers: llama_decode failed")
        lasts = [(i, row[0]) for i, row in enumerate(rows) if row[3]]
        logits = {sequence: llama_cpp.llama_get_logits_ith(context, i) for i, sequence in lasts}
        return {s: int(np.argmax(np.ctypeslib.as_array(pointer, (width,)))) for s, pointer in logits.items()}

    def generate(prompts: list[list[int]], output: int) -> Any:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [(s, i, token, i == len(ids) - 1) for s, ids in enumerate(prompts) for i, token in enumerate(ids)]
        found: dict[int, int] = {}
        for first in range(0, len(rows), 2048):
            found |= run(rows[first : first + 2048])
        answers = {s: [token] for s, token in found.items()}
        for _ in range(output - 1):
            rows = [(s, len(prompts[s]) + len(a) - 1, a[-1], True) for s, a in answers.items()]
            for s, token in run(rows).items():
                answers[s].append(token)
        return answers

    return generate


OF_GGUF = {"jaxllm-gguf", "jaxllm-gguf-int8", "llama.cpp"}
ENGINES = {
    "jaxllm": jaxllm_engine,
    "vllm": vllm_engine,
    "transformers": transformers_engine,
    "jaxllm-gguf": jaxllm_engine,
    "jaxllm-gguf-int8": functools.partial(jaxllm_engine, activation_dtype="int8"),
    "llama.cpp": llama_cpp_engine,
}

if __name__ == "__main__":
    sys.exit(main())
