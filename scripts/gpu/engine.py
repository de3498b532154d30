"""The engine's compiled programs with random weights, and the whole engine through `LLM.generate`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from gpu.plan import Plan, Rows


def engine(plan: Plan, kv_dtype: str = "auto", quantization: str = "auto") -> Rows:
    """Time of one iteration, by the programs that the engine runs, several dispatches in a row."""
    import jax

    runner, cost = make_runner(plan, kv_dtype, quantization)
    token_bytes = cost.kv_bytes * plan.model["num_layers"]
    keys = [("decode_greedy", bucket(runner, b)) for b, _ in plan.decode]
    prefills = plan.prefill if kv_dtype == quantization == "auto" else []
    compile_all(runner, keys)
    for rows, context in plan.decode:
        point = {
            "phase": "decode",
            "rows": rows,
            "context": context,
            "kv_dtype": runner.shapes.kv_dtype.name,
            "weights": "bfloat16" if quantization == "auto" else quantization,
        }
        if rows * (context + 8 * plan.steps + 64) > (runner.shapes.num_pages - 1) * plan.page_size:
            yield point | {"skipped": f"the cache would take {rows * context * token_bytes / 1e9:.0f} GB"}
            continue
        seconds = decode_seconds(runner, rows, context, plan)
        pairs, keys = cost.attended([(1, context)] * rows)
        work = cost.cost(tokens=rows, samples=rows, pairs=pairs, keys=keys)
        yield point | {
            "ms": 1e3 * seconds,
            "tokens_per_s": rows / seconds,
            "bytes_per_s": work.bytes / seconds,
            "flops_per_s": work.flops / seconds,
        }
    compile_all(runner, [("ragged", tokens) for tokens in prefills])
    for tokens in prefills:
        seconds = prefill_seconds(runner, tokens)
        pairs, keys = cost.attended([(tokens, tokens)])
        work = cost.cost(tokens=tokens, samples=0, pairs=pairs, keys=keys)
        yield {
            "phase": "prefill",
            "tokens": tokens,
            "ms": 1e3 * seconds,
            "tokens_per_s": tokens / seconds,
            "bytes_per_s": work.bytes / seconds,
            "flops_per_s": work.flops / seconds,
        }
    jax.clear_caches()


def engine8(plan: Plan) -> Rows:
    """Decodes with an int8 cache: the points where the cache weighs most."""
    points = sorted(plan.decode, key=lambda p: -p[0] * p[1])[:4]
    yield from engine(dataclasses.replace(plan, decode=points), "int8")


def engine4(plan: Plan) -> Rows:
    """Decodes with int4 weights: the points where the weights weigh most."""
    points = sorted(plan.decode, key=lambda p: p[0] * p[1])[:6]
    yield from engine(dataclasses.replace(plan, decode=points), quantization="int4")


def offline(plan: Plan) -> Rows:
    """The whole engine: from nothing to a first answer, and a batch of requests through `LLM.generate`."""
    import tempfile

    import jax
    import numpy as np

    from jaxllm import LLM, SamplingParams

    big = jax.default_backend() != "cpu"
    m = plan.model
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": m["num_layers"],
        "num_attention_heads": m["num_heads"],
        "num_key_value_heads": m["num_kv_heads"],
        **{name: value for name, value in m.items() if name not in ("num_layers", "num_heads", "num_kv_heads")},
    }
    num_prompts, prompt, answer = (256, 512, 128) if big else (3, 8, 4)
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": ids} for ids in rng.integers(1, m["vocab_size"], (num_prompts, prompt)).tolist()]
    sampling = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        started = time.perf_counter()
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=2048 if big else 64,
            max_num_seqs=128 if big else 4,
            max_num_batched_tokens=2048 if big else 64,
            kv_cache_memory_bytes=None if big else 1 << 22,
            use_tqdm=False,
        )
        loaded = time.perf_counter()
        llm.generate(prompts[0], sampling, use_tqdm=False)
        answered = time.perf_counter()
    yield {"load_s": loaded - started, "first_answer_s": answered - loaded}
    for _ in range(2):  # the first compiles
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        yield {
            "requests": num_prompts,
            "prompt": prompt,
            "answer": answer,
            "seconds": seconds,
            "output_tokens_per_s": tokens / seconds,
            "tokens_per_s": (tokens + num_prompts * prompt) / seconds,
        }
    started = time.perf_counter()
    llm.engine.runner.warm_up()
    yield {"other_programs_s": time.perf_counter() - started}


def make_runner(plan: Plan, kv_dtype: str, quantization: str) -> tuple[Any, Any]:
    """A runner with random weights and a random cache, and what its iterations cost."""
    import jax
    import jax.numpy as jnp

    from jaxllm.config import EngineConfig, ModelConfig
    from jaxllm.runner.compiler import Compiler
    from jaxllm.runner.runner import ModelRunner
    from jaxllm.runner.shapes import runner_shapes
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules
    from jaxllm.telemetry.device_peaks import engine_cost
    from jaxllm.weights.abstract import make_model
    from jaxllm.weights.loader import random_parameters

    most = max(plan.prefill)
    config = EngineConfig(
        max_model_len=max(most, max(c for _, c in plan.decode) + 64 * plan.steps),
        kv_dtype=kv_dtype,
        max_num_seqs=max(b for b, _ in plan.decode),
        max_num_batched_tokens=most,
        page_size=plan.page_size,
        max_decode_steps=plan.steps,
        load_format="dummy",
        quantization=quantization,
        gpu_memory_utilization=0.85,
        kv_cache_memory_bytes=(64 << 20) if jax.default_backend() == "cpu" else None,
    )
    model = make_model(config, ModelConfig(**plan.model), Placement(make_mesh("tp=1"), load_rules("megatron")))
    runner = ModelRunner(model, runner_shapes(config, model))
    runner.compiler = Compiler(model, runner.shapes, num_threads=8)
    runner.start(random_parameters(model))

    @jax.jit
    def noise(like: jax.Array) -> jax.Array:  # zeros would draw less power than real numbers do
        if like.dtype == jnp.int8:
            return jax.random.randint(jax.random.key(0), like.shape, -127, 128, jnp.int8)
        return jax.random.normal(jax.random.key(0), like.shape, jnp.bfloat16).astype(like.dtype)

    for i, page in enumerate(runner.state.pages):
        runner.state.pages[i] = jax.tree.map(noise, page)
    return runner, engine_cost(model, runner.shapes.kv_dtype)


def compile_all(runner: Any, keys: list[tuple[str, int]]) -> None:
    """Compile at once, and to the end: the compiler tries its kernels out on the device that is measured next."""
    started = time.perf_counter()
    for future in [runner.compiler.submit(key) for key in keys]:
        future.result()
    print(f"compiled {len(set(keys))} programs in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def bucket(runner: Any, rows: int) -> int:
    """The decode loop's bucket for so many rows."""
    from jaxllm.runner.shapes import bucket_for

    return bucket_for(rows, runner.shapes.row_buckets)


def decode_seconds(runner: Any, rows: int, context: int, plan: Plan) -> float:
    """Least seconds per iteration of several dispatches; every row has pages of its own."""
    import jax
    import numpy as np

    from jaxllm.runner.batch import Dispatch, row_batch

    size, shapes = bucket(runner, rows), runner.shapes
    table = np.zeros((size, shapes.pages_per_row), np.int32)
    per_row = -(-(context + 8 * plan.steps) // plan.page_size)
    order = 1 + np.random.default_rng(0).permutation(rows * per_row)
    table[:rows, :per_row] = order.reshape(rows, per_row)
    empty = row_batch([], [], size, shapes)
    slot, limit = np.array(empty.slot), np.zeros_like(empty.slot)
    slot[:rows] = np.arange(rows)
    tokens = np.zeros(shapes.max_model_len, np.int32)
    best = math.inf
    for i in range(6):
        for row in range(rows):
            runner.execute(
                Dispatch("admit", 1, (np.int32(row), tokens, np.int32(context + i * plan.steps), np.int32(0)))
            )
        limit[:rows] = shapes.max_model_len
        batch = dataclasses.replace(empty, slot=slot.copy(), limit=limit)
        started = time.perf_counter()
        out = runner.execute(Dispatch("decode_greedy", size, (batch, table, np.int32(plan.steps))))
        sampled = np.asarray(out.tokens)
        best = min(best, (time.perf_counter() - started) / plan.steps)
        assert (sampled[:, :rows] >= 0).all(), "a row stopped"
    jax.block_until_ready(runner.state.pages)
    return best


def prefill_seconds(runner: Any, tokens: int) -> float:
    """Least seconds of a forward pass over one prompt."""
    import numpy as np

    from jaxllm.config.sampling import SamplingParams
    from jaxllm.runner.batch import Dispatch, by_replica, ragged_batch
    from jaxllm.scheduling.plan import Chunk
    from jaxllm.scheduling.request import Held, Request

    request = Request("prefill", [1] * tokens, SamplingParams(), limit=tokens)
    request.held = Held(slot=0, pages=list(range(1, 1 + -(-tokens // runner.shapes.page_size))))
    batch = ragged_batch(by_replica([Chunk(request, 0, tokens, 0)], runner.shapes), tokens, runner.shapes)
    ids = np.random.default_rng(0).integers(0, runner.model.cfg.vocab_size, runner.shapes.max_model_len)
    runner.execute(Dispatch("admit", 1, (np.int32(0), ids.astype(np.int32), np.int32(tokens), np.int32(0))))
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        runner.execute(Dispatch("ragged", tokens, (batch,)))
        runner.state.hidden.block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best
