"""The same work in transformers: static cache, `torch.compile`."""

from __future__ import annotations

import time
from typing import Any

from gpu.plan import Plan, Rows


def peer(plan: Plan) -> Rows:
    """`transformers` as its users run it: `generate` with a static cache, whose decode step it compiles."""
    import torch
    import transformers

    m, device = plan.model, "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=m["vocab_size"],
        hidden_size=m["hidden_size"],
        intermediate_size=m["intermediate_size"],
        num_hidden_layers=m["num_layers"],
        num_attention_heads=m["num_heads"],
        num_key_value_heads=m["num_kv_heads"],
        max_position_embeddings=m["max_position_embeddings"],
        tie_word_embeddings=False,
        rope_theta=m["rope_theta"],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)

    def seconds(rows: int, context: int, new: int) -> float:
        ids = torch.randint(1, m["vocab_size"], (rows, context), device=device)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                cache_implementation="static",
            )
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def best_of(rows: int, context: int, new: int) -> float:
        seconds(rows, context, new)
        return min(seconds(rows, context, new) for _ in range(2))

    def decode(rows: int, context: int) -> dict[str, Any]:
        new = 33 if device == "cuda" else 3
        step = (best_of(rows, context, new) - best_of(rows, context, 1)) / (new - 1)
        return {"phase": "decode", "rows": rows, "context": context, "ms": 1e3 * step, "tokens_per_s": rows / step}

    yield decode(*plan.peer_decode[0])  # compiling takes most of the time: the point that matters most comes first
    for tokens in plan.prefill:
        best = best_of(1, tokens, 1)
        yield {"phase": "prefill", "tokens": tokens, "ms": 1e3 * best, "tokens_per_s": tokens / best}
    for rows, context in plan.peer_decode[1:]:
        yield decode(rows, context)
