"""What an 8-bit KV cache costs in quality: `python scripts/kv_quality.py` prints a Markdown table.

One engine per cache dtype, on the same weights: perplexity of a text, mean absolute difference of the logits from those
of the first dtype, how far greedy continuations agree with it, and bytes per cached token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
ROOT = Path(__file__).parents[1]
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "List five animals that live in the desert:",
    "To bake bread you need",
    "In 1969, the first humans",
    "The difference between a virus and a bacterium is",
)


def logprobs(llm: Any, ids: list[int]) -> np.ndarray:
    """Log-probability of every token but the first, given those before it."""
    from jaxllm.engine.scoring import Scorer, ScoringPass

    scorer, work = Scorer(llm.engine), ScoringPass(ids)
    scorer.add(work)
    while not work.done:
        scorer.step()
    parts = [sampled.logprobs for sampled in work.scored]
    return np.concatenate([part for part in parts if part is not None])


def last_logits(llm: Any, ids: list[int], count: int) -> np.ndarray:
    """Logits `[count, V]` of the last positions, all keys and values before them read from the cache."""
    import jax

    from jaxllm.config.sampling import SamplingParams
    from jaxllm.scheduling.plan import Chunk, IterationPlan
    from jaxllm.scheduling.request import Held, Request

    runner, start = llm.engine.runner, 0
    request = Request("logits", ids, SamplingParams(), limit=len(ids))
    pages = llm.engine.pool.allocate(llm.engine.pool.pages_for(len(ids)))
    request.held = Held(slot=runner.shapes.spare_slot, pages=pages)
    head = jax.jit(lambda params, x: runner.steps._model(params).logits(x, runner.model.placement.shard))
    while start < len(ids):
        size = min(runner.shapes.scoring_buckets[-1], len(ids) - count - start) or count
        hidden_TD = runner.hidden_states(IterationPlan([Chunk(request, start, size, 0)]))
        start += size
    llm.engine.pool.free(pages)
    return np.asarray(head(runner.state.params, hidden_TD[:count]))


def measure(args: argparse.Namespace, dtype: str, ids: list[int]) -> dict[str, Any]:
    """Everything about one cache dtype."""
    from jaxllm import LLM, SamplingParams
    from jaxllm.kv.layout import token_bytes

    length = len(ids) + 128
    llm = LLM(
        args.model,
        kv_dtype=dtype,
        max_model_len=length,
        max_num_seqs=8,
        page_size=16,
        kv_cache_memory_bytes=args.cache_mb << 20,
    )
    runner = llm.engine.runner
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    return {
        "bytes": token_bytes(runner.model.cfg, runner.shapes.kv_dtype, runner.model.kv_copies),
        "perplexity": float(np.exp(-logprobs(llm, ids).mean())),
        "logits": last_logits(llm, ids[:512], 64),
        "tokens": [o.outputs[0].token_ids for o in llm.generate(list(PROMPTS), params, use_tqdm=False)],
    }


def row(dtype: str, result: dict[str, Any], base: dict[str, Any]) -> str:
    """One line of the table."""
    error = np.abs(result["logits"] - base["logits"]).mean()
    pairs = list(zip(result["tokens"], base["tokens"], strict=True))
    firsts = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(y)) for x, y in pairs]
    total = sum(len(y) for _, y in pairs)
    top = (result["logits"].argmax(-1) == base["logits"].argmax(-1)).mean()
    change = result["perplexity"] / base["perplexity"] - 1
    return (
        f"| {dtype} | {result['bytes']} | {result['perplexity']:.4f} | {change:+.3%} | {error:.4f} | {top:.1%} | "
        f"{sum(firsts)}/{total} | {sum(f == 64 for f in firsts)}/{len(pairs)} |"
    )


def main() -> None:
    """Measure each dtype in turn; the first is what the others are compared with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, nargs="+", default=[ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))])
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--kv-dtypes", nargs="+", default=["float32", "bfloat16", "int8", "fp8"])
    parser.add_argument("--cache-mb", type=int, default=256)
    args = parser.parse_args()
    from jaxllm.checkpoints import resolve_model
    from jaxllm.tokenizer import load_tokenizer

    text = "\n".join(path.read_text(encoding="utf-8") for path in args.text)
    ids = load_tokenizer(resolve_model(args.model)).encode(text)[: args.num_tokens]
    print(f"{len(ids)} tokens of text, {len(PROMPTS)} prompts\n", file=sys.stderr)
    print(
        "| cache | bytes per token | perplexity | change | mean abs logit error | same likeliest token | "
        "greedy tokens before the first difference | whole answers equal |"
    )
    print("|" + " --- |" * 8)
    base: dict[str, Any] = {}
    for dtype in args.kv_dtypes:
        result = measure(args, dtype, ids)
        base = base or result
        print(row(dtype, result, base), flush=True)


if __name__ == "__main__":
    main()
