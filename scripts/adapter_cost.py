"""What adapters cost a decode: output tokens/s of a batch without adapters, and with as many as there are slots.

    python scripts/adapter_cost.py --model FOLDER --max-loras 8 --rank 16 --batch-size 32

Random adapters of all matrices are made in a temporary folder. Base and adapters take turns on one engine (whose slots
exist either way), and the base runs once more on an engine without slots; the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxllm import LLM, LoRARequest, SamplingParams
from jaxllm.adapters.peft import LoraConfig, write_peft


def main() -> None:
    """Measure and print one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    sizes = {"max_num_seqs": args.batch_size, "max_model_len": 256, "use_tqdm": False}
    base = rate(LLM(args.model, **sizes), args, [None])
    print(f"no slots: {base:.0f} tokens/s")
    llm = LLM(args.model, enable_lora=True, max_loras=args.max_loras, max_lora_rank=args.rank, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        adapters = [random_adapter(llm, Path(folder) / str(i), i, args.rank) for i in range(args.max_loras)]
        for name, requests in (("slots, base only", [None]), (f"{args.max_loras} adapters", adapters)):
            tokens = rate(llm, args, requests)
            print(f"{name}: {tokens:.0f} tokens/s, {100 * (base / tokens - 1):+.1f}% time")


def random_adapter(llm: LLM, folder: Path, seed: int, rank: int) -> LoRARequest:
    """An adapter of every matrix that takes one."""
    rng, modules = np.random.default_rng(seed), {}
    for target in llm.engine.runner.model.targets.values():
        a, b = (rng.normal(0, 0.01, shape).astype(np.float32) for shape in target.shapes(rank))
        modules |= target.to_modules(a, b)
    write_peft(folder, modules, LoraConfig(r=rank))
    return LoRARequest(f"adapter{seed}", seed + 1, str(folder))


def rate(llm: LLM, args: argparse.Namespace, requests: list[LoRARequest | None]) -> float:
    """Output tokens per second, the best of the rounds."""
    params = SamplingParams(temperature=0.0, max_tokens=args.output_len, ignore_eos=True)
    prompts = [{"prompt_token_ids": [i + 5, 7, 9, 11]} for i in range(args.batch_size)]
    chosen = [requests[i % len(requests)] for i in range(args.batch_size)]
    best = float("inf")
    for _ in range(args.rounds + 1):  # the first compiles
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False, lora_request=chosen)
        best = min(best, time.perf_counter() - started)
    return args.batch_size * args.output_len / best


if __name__ == "__main__":
    main()
