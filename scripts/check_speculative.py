#!/usr/bin/env python3
"""Greedy answers with and without speculation over many prompts: they must be the same tokens.

`python scripts/check_speculative.py --model smollm2-135m-instruct --num-prompts 200` (about 3 minutes on two cores, in
float32). Prompts are cut from the bench's texts at random places, so that drafts are often right and often wrong; every
iteration with a draft verifies. Prints one JSON object; exit code 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from typing import Any

from jaxllm import LLM, SamplingParams
from jaxllm.bench.speculative_prompts import WORKLOADS


def prompts(count: int, seed: int) -> list[str]:
    """Pieces of the bench's prompts."""
    rng, texts = random.Random(seed), [text for texts in WORKLOADS.values() for text in texts]
    found = []
    while len(found) < count:
        words = rng.choice(texts).split(" ")
        start = rng.randrange(max(1, len(words) - 8))
        found.append(" ".join(words[start : start + rng.randrange(8, 80)]))
    return found


def main() -> int:
    """Both engines, all prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--draft-model", metavar="NAME", help="instead of prompt lookup")
    args = parser.parse_args()
    config: dict[str, Any] = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 4}
    if args.draft_model:
        config = {"method": "draft_model", "model": args.draft_model}
    config["num_speculative_tokens"] = args.num_speculative_tokens
    sizes: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": args.max_num_seqs}
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    asked = prompts(args.num_prompts, seed=0)
    plain = LLM(args.model, **sizes).generate(asked, params)
    llm = LLM(args.model, **sizes, speculative_config=config)
    llm.engine.runner.draft_price = lambda rows: -1.0
    answers = llm.generate(asked, params)
    different = [
        i
        for i, (a, b) in enumerate(zip(plain, answers, strict=True))
        if a.outputs[0].token_ids != b.outputs[0].token_ids
    ]
    drafts = llm.engine.drafts
    report = {
        "model": args.model,
        "speculative_config": config,
        "num_prompts": len(asked),
        "different": different,
        "num_draft_tokens": drafts.num_draft_tokens,
        "acceptance_rate": drafts.acceptance_rate,
        "mean_acceptance_length": drafts.mean_acceptance_length,
    }
    print(json.dumps(report))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
