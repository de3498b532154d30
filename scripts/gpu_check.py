"""Check and measure jaxllm on a GPU box, in one command and under twelve minutes: `python scripts/gpu_check.py`.

Parts, each a process of its own with a time budget; what does not fit is skipped and said so:
  ceilings   copy bandwidth and matrix product rate of this very device
  kernels    the attention kernel against the XLA oracle, random shapes
  attention  the kernel alone: bytes/s of decodes, FLOP/s of prefills, for several tile sizes
  engine     a Llama-3.1-8B-shaped model with random weights: decode and prefill through the engine's compiled programs
  engine8    the same decodes with an int8 KV cache
  engine4    the same decodes with int4 weights in groups of 128
  products   a decode's matrix products alone: bfloat16, and quantised by the kernel, for several tile sizes
  offline    the whole engine: how long it takes to start, and requests through `LLM.generate`
  peer       the same work in transformers, static cache and torch.compile

-> gpu_check.json and gpu_check.md. Needs jax, flax and numpy; torch and transformers for the peer. `--tiny` runs all of
it on small shapes, on a CPU too (kernels interpreted): what it measures there means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

BUDGETS_S = {
    "ceilings": 35,
    "kernels": 60,
    "attention": 75,
    "engine": 150,
    "engine8": 45,
    "engine4": 90,
    "products": 75,
    "offline": 120,
    "peer": 120,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
Rows = Iterator[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: sizes of the model and of its batches. Points stand in the order of their worth."""

    model: dict[str, Any]
    decode: list[tuple[int, int]]  # rows, context
    prefill: list[int]
    peer_decode: list[tuple[int, int]]
    num_kernel_shapes: int
    page_size: int
    steps: int


FULL = Plan(
    model=LLAMA_8B,
    decode=[(b, c) for c in (2048, 128, 8192) for b in (1, 8, 32, 128)],
    prefill=[2048, 512, 8192],
    peer_decode=[(8, 2048), (1, 128), (32, 2048), (32, 128), (1, 2048), (1, 8192)],
    num_kernel_shapes=64,
    page_size=16,
    steps=8,
)
SMALL = Plan(
    model=TINY,
    decode=[(1, 32), (2, 64)],
    prefill=[32],
    peer_decode=[(2, 16)],
    num_kernel_shapes=1,
    page_size=16,
    steps=2,
)


# -- parts: each yields rows of results as soon as it has them ---------------------------------------------------


def ceilings(plan: Plan) -> Rows:
    """Copy of 2 GiB (read and written), and square bfloat16 products of random numbers; best of several runs."""
    import jax
    import jax.numpy as jnp

    big = jax.default_backend() != "cpu"
    length, width = (1 << 29, 8192) if big else (1 << 20, 256)
    flip = jax.jit(lambda x: x + 1, donate_argnums=0)
    copy_s = best_seconds(flip, jnp.zeros(length, jnp.float32))
    a, b = (jax.random.normal(key, (width, width), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(lambda x: (x @ b).astype(jnp.bfloat16) * (width**-0.5))
    gemm_s = best_seconds(product, a)
    yield {"bytes_per_s": 2 * 4 * length / copy_s, "flops_per_s": 2 * width**3 / gemm_s}


def kernels(plan: Plan) -> Rows:
    """Largest difference from the oracle, which computes float32 products exactly."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxllm.bench.attention_cases import random_case, random_shape
    from jaxllm.ops.attention import pallas_gpu, xla

    interpret = jax.default_backend() == "cpu"
    for seed in range(plan.num_kernel_shapes):
        shape = random_shape(seed)
        if interpret:
            shape = dataclasses.replace(shape, longest=70)
        kernel = jax.jit(functools.partial(pallas_gpu.attention, spec=shape.spec, interpret=interpret))
        oracle = jax.jit(functools.partial(xla.ragged_paged_attention, spec=shape.spec))
        limit = 1e-4 if shape.dtype == jnp.float32 else 0.03
        error = 0.0
        for number in range(4):
            case = random_case(shape, 1000 * seed + number)
            got = kernel(case.q, case.pages, case.rows, sinks_KG=case.sinks)
            with jax.default_matmul_precision("highest"):
                want = oracle(case.q, case.pages, case.rows, sinks_KG=case.sinks)
            error = max(error, float(np.abs(np.asarray(got) - np.asarray(want)).max(initial=0)))
        yield {"shape": str(shape), "cases": 4, "error": error, "ok": bool(error <= limit)}


def attention(plan: Plan) -> Rows:
    """One layer of the model's attention: what its keys and values take to read, and what its products take."""
    import jax
    import jax.numpy as jnp

    from jaxllm.ops.attention import AttentionSpec, RaggedRows, SingleRows, pallas_gpu
    from jaxllm.ops.attention.pallas_gpu import Tiling

    interpret = jax.default_backend() == "cpu"
    k, h = plan.model["num_kv_heads"], plan.model["head_dim"]
    g, spec = plan.model["num_heads"] // k, AttentionSpec(scale=h**-0.5)
    rows, context = (2, 64) if interpret else (32, 8192)
    decodes = [
        None,
        *(
            Tiling(pairs=16, keys=s, warps=w, stages=n)
            for s, w, n in [(32, 4, 6), (64, 4, 6), (64, 8, 3), (128, 4, 2), (128, 8, 3)]
        ),
    ]
    sizes = [(64, 64, 4, 3), (128, 32, 8, 4), (128, 64, 8, 5), (64, 64, 4, 2), (128, 64, 8, 2)]
    prefills = [None, *(Tiling(pairs=m, keys=s, warps=w, stages=n) for m, s, w, n in sizes)]
    yield from contexts(plan)
    for page_size in (16, 64):
        per_row = context // page_size
        shape = (rows * per_row + 1, 2, page_size, k, h)
        pages = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        table = jax.random.permutation(jax.random.key(1), rows * per_row).reshape(rows, per_row).astype(jnp.int32) + 1
        q = jax.random.normal(jax.random.key(2), (rows, k, g, h), jnp.bfloat16)
        single = SingleRows(jnp.full(rows, context, jnp.int32), table)
        for tiling in decodes[: 2 if interpret else None]:
            run = repeated(
                lambda q, pages, single=single, tiling=tiling: pallas_gpu.attention(
                    q, pages, single, spec=spec, decode=tiling, interpret=interpret
                ),
                interpret,
            )
            num_bytes = 2 * rows * context * k * h * 2
            yield measured(
                {
                    "phase": "decode",
                    "rows": rows,
                    "context": context,
                    "page_size": page_size,
                    "tiling": str(tiling or "default"),
                },
                run,
                (q, pages),
                bytes=num_bytes,
            )
        tokens = 32 if interpret else 4096
        if page_size == 64 and not interpret:
            continue
        q = jax.random.normal(jax.random.key(3), (tokens, k, g, h), jnp.bfloat16)
        chunk = RaggedRows(*(jnp.asarray(x, jnp.int32) for x in ([0], [tokens], [tokens], 0, table[:1])))
        for tiling in prefills[: 2 if interpret else None]:
            run = repeated(
                lambda q, pages, chunk=chunk, tiling=tiling: pallas_gpu.attention(
                    q, pages, chunk, spec=spec, prefill=tiling, interpret=interpret
                ),
                interpret,
            )
            flops = 4 * k * g * h * tokens * (tokens + 1) / 2
            yield measured(
                {"phase": "prefill", "tokens": tokens, "page_size": page_size, "tiling": str(tiling or "default")},
                run,
                (q, pages),
                flops=flops,
            )


def contexts(plan: Plan) -> Rows:
    """One layer's decode attention from few rows to many, from short contexts to long ones."""
    import jax
    import jax.numpy as jnp

    from jaxllm.ops.attention import AttentionSpec, SingleRows, pallas_gpu

    interpret = jax.default_backend() == "cpu"
    k, h, page_size = plan.model["num_kv_heads"], plan.model["head_dim"], plan.page_size
    g, spec = plan.model["num_heads"] // k, AttentionSpec(scale=h**-0.5)
    num_pages = (64 if interpret else 1 << 20) // page_size  # rows share pages, each in an order of its own
    pages = jax.random.normal(jax.random.key(0), (num_pages, 2, page_size, k, h), jnp.bfloat16)

    def attend(q: Any, arguments: Any) -> Any:
        single = SingleRows(arguments["kv_len"], arguments["table"])
        return pallas_gpu.attention(q, arguments["pages"], single, spec=spec, interpret=interpret)

    for context in (32,) if interpret else (1024, 8192, 32768, 131072):
        for rows in (1, 8, 32)[: 1 if interpret else None]:
            keys = jax.random.split(jax.random.key(rows), rows)
            orders = jax.vmap(lambda key: jax.random.permutation(key, num_pages))(keys)
            table = orders[:, : context // page_size].astype(jnp.int32)
            q = jax.random.normal(jax.random.key(2), (rows, k, g, h), jnp.bfloat16)
            arguments = {"pages": pages, "kv_len": jnp.full(rows, context, jnp.int32), "table": table}
            point = {"phase": "decode", "rows": rows, "context": context, "page_size": page_size, "tiling": "default"}
            yield measured(point, repeated(attend, interpret), (q, arguments), bytes=2 * rows * context * k * h * 2)


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


def products(plan: Plan) -> Rows:
    """A feed-forward's two products in turn: bytes/s of what is read, in bfloat16 and quantised."""
    import functools

    import jax
    import jax.numpy as jnp

    from jaxllm.config.quantization import Scheme
    from jaxllm.ops import quantized_gpu
    from jaxllm.ops.quantized_columns import QuantizedColumns, lay_columns
    from jaxllm.ops.quantized_gpu import Tiling, decode_tiling
    from jaxllm.sharding.mesh import make_mesh
    from jaxllm.weights.quantized import Quantized

    interpret = jax.default_backend() == "cpu"
    d, f = plan.model["hidden_size"], plan.model["intermediate_size"]
    copies = 1 if interpret else 8  # beyond the caches
    group = 32 if interpret else 128
    schemes = {
        "int4": Scheme(codes="uint4", group=group, offset=8, scale_dtype="bfloat16"),
        "int8": Scheme(codes="int8"),
        "fp8": Scheme(codes="float8_e4m3fn"),
    }
    normal = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    shapes = [(d, f), (f, d)] * copies
    dense = [normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    here = jax.sharding.NamedSharding(make_mesh("tp=1"), jax.sharding.PartitionSpec())

    def chain(multiply: Callable[[Any, Any], Any]) -> Any:
        def run(x: Any, matrices: list[Any]) -> Any:
            for matrix in matrices:
                x = multiply(x, matrix).astype(jnp.bfloat16) * 0.01
            return x

        return repeated(run, interpret)

    def kernel(x: Any, m: QuantizedColumns, tiling: Any = None) -> Any:
        return quantized_gpu.quantized_matmul(
            x, m.codes, m.scales, m.minima, m.scheme, tiling=tiling, interpret=interpret
        )

    def tilings(rows: int, name: str) -> list[Tiling]:
        """Neighbours of the default."""
        first = decode_tiling(rows, d, schemes[name])
        wide = {"columns": 2 * first.columns, "programs": first.programs // 2}
        near = [{"stages": 3}, {"warps": 2}, wide, wide | {"stages": 3}, {"warps": 2, "stages": 3}]
        near += [{"columns": first.columns // 2}, {"columns": first.columns // 2, "programs": 1056}]
        return [dataclasses.replace(first, **change) for change in near]

    for rows in (1, 32, 8, 128)[: 1 if interpret else None]:
        x = normal(jax.random.key(0), (rows, d))
        point, size = {"rows": rows}, sum(w.nbytes for w in dense)
        yield measured(point | {"weights": "bfloat16", "by": "xla"}, chain(lambda x, w: x @ w), (x, dense), bytes=size)
        for name, scheme in schemes.items():
            kept = jax.jit(lambda w, scheme=scheme: lay_columns(Quantized(scheme, (0,)).from_array(w, here)))
            stored = [kept(w) for w in dense]
            size = sum(array.nbytes for array in jax.tree.leaves(stored))
            got, want = jax.jit(kernel)(x, stored[0]), jax.jit(quantized_columns_oracle)(x, stored[0])
            error = float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))
            ways: list[tuple[str, Any]] = [("kernel", kernel)]
            if not interpret and rows in (1, 32) and name != "fp8":
                ways += [(str(t), functools.partial(kernel, tiling=t)) for t in tilings(rows, name)]
            for way, multiply in ways:
                row = point | {"weights": name, "by": way} | ({"error": error} if way == "kernel" else {})
                yield measured(row, chain(multiply), (x, stored), bytes=size)


def quantized_columns_oracle(x: Any, matrix: Any) -> Any:
    """A product in float32."""
    import jax.numpy as jnp

    from jaxllm.ops.quantized_columns import by_blocks

    return by_blocks(x.astype(jnp.float32), dataclasses.replace(matrix, dtype="float32"))


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


PARTS: dict[str, Callable[[Plan], Rows]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "attention": attention,
    "engine": engine,
    "engine8": engine8,
    "engine4": engine4,
    "products": products,
    "offline": offline,
    "peer": peer,
}


# -- the engine's own programs -----------------------------------------------------------------------------------


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


# -- timing ------------------------------------------------------------------------------------------------------


def best_seconds(step: Callable[[Any], Any], value: Any, runs: int = 5, chain: int = 10) -> float:
    """Least seconds of one call, over several chains of calls, each fed what the one before gave."""
    best = math.inf
    for _ in range(runs + 1):  # the first compiles
        started = time.perf_counter()
        for _ in range(chain):
            value = step(value)
        value.block_until_ready()
        best = min(best, (time.perf_counter() - started) / chain)
    return best


def repeated(attend: Callable[[Any, Any], Any], interpret: bool) -> Callable[[Any, Any], Any]:
    """A chain of calls in one program, so that launching does not count. The last argument says how many."""
    import jax

    count = 2 if interpret else 20
    chain = jax.jit(lambda q, pages: jax.lax.fori_loop(0, count, lambda _, x: attend(x, pages), q))
    chain.count = count  # type: ignore[attr-defined]
    return chain


def measured(point: dict[str, Any], run: Any, args: tuple[Any, ...], **work: float) -> dict[str, Any]:
    """A point with its time and rates; a failure is a result too."""
    try:
        run(*args).block_until_ready()
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            run(*args).block_until_ready()
            best = min(best, (time.perf_counter() - started) / run.count)
    except Exception as error:  # one tile size that does not fit must not end the others
        return point | {"failed": str(error).splitlines()[0][:200]}
    return point | {"us": 1e6 * best} | {f"{name}_per_s": amount / best for name, amount in work.items()}


# -- the parent: processes, budgets, report ------------------------------------------------------------------------


def run_part(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a process of its own; rows that came before the budget ended are kept."""
    budget = args.budget or BUDGETS_S[name]
    command = [sys.executable, __file__, "--part", name, *(["--tiny"] if args.tiny else [])]
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "JAX_COMPILATION_CACHE_DIR": str(args.out / "xla")}
    started, rows, log = time.perf_counter(), [], args.out / f"gpu_check.{name}.log"
    print(f"{name} (at most {budget} s)", file=sys.stderr, flush=True)
    results = args.out / f"gpu_check.{name}.jsonl"
    with log.open("w") as errors, results.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=errors, env=environment | os.environ)
        try:
            code: int | str = process.wait(timeout=budget)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "out of time"
    for line in results.read_text().splitlines():
        if line.startswith("{"):
            rows.append(json.loads(line))
    result: dict[str, Any] = {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}
    if code == "out of time":
        result["note"] = f"stopped after its {budget} s; rows that are missing were skipped"
    elif code != 0:
        result["note"] = "failed: " + " | ".join(log.read_text().splitlines()[-3:])
    return result


def describe_device() -> dict[str, Any]:
    """Names and versions, and the data sheet, if there is one."""
    code = (
        "import jax, json; d = jax.devices()[0]; "
        "print(json.dumps({'kind': d.device_kind, 'platform': d.platform, 'jax': jax.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    device = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"kind": "unknown"}
    from jaxllm.roofline.chips import chip_of_device

    chip = chip_of_device(device["kind"])
    sheet = chip and {"bytes_per_s": chip.bandwidth, "flops_per_s": chip.flops}
    return device | {"sheet": sheet}


def add_fractions(report: dict[str, Any]) -> None:
    """MBU and MFU of every row that has rates, of what this device was seen to do and of its data sheet."""
    ceilings_rows = report["parts"].get("ceilings", {}).get("rows", [])
    bases = {"measured": ceilings_rows[0] if ceilings_rows else None, "sheet": report["device"].get("sheet")}
    for name in ("attention", "engine", "engine8", "engine4", "products"):
        for row in report["parts"].get(name, {}).get("rows", []):
            for base, ceiling in bases.items():
                for fraction, rate in (("mbu", "bytes_per_s"), ("mfu", "flops_per_s")):
                    if ceiling and rate in row:
                        row[f"{fraction}_of_{base}"] = round(row[rate] / ceiling[rate], 4)


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    device, parts = report["device"], report["parts"]
    lines = [f"# {device['kind']}, JAX {device.get('jax')}, {report['seconds']:.0f} s in all\n"]
    for row in parts.get("ceilings", {}).get("rows", []):
        lines.append(f"Copy {row['bytes_per_s'] / 1e12:.2f} TB/s, bf16 GEMM {row['flops_per_s'] / 1e12:.0f} TFLOP/s.")
    checked = parts.get("kernels", {}).get("rows", [])
    if checked:
        bad = [row["shape"] for row in checked if not row["ok"]]
        lines.append(
            f"Kernel against oracle: {sum(r['cases'] for r in checked)} cases of {len(checked)} shapes, worst error "
            f"{max(r['error'] for r in checked):.1e}, {len(bad)} shapes beyond tolerance {bad[:5]}."
        )
    for name in ("engine", "engine8", "engine4", "products", "offline", "peer", "attention"):
        if rows := parts.get(name, {}).get("rows"):
            lines += ["", f"## {name}", *table(rows)]
    notes = [f"* {name}: {part['note']}" for name, part in parts.items() if "note" in part]
    return "\n".join([*lines, "", *notes, ""])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a Markdown table over all their keys."""
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.3e}"
        return str(value)

    body = ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]
    return ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys), *body]


def main() -> int:
    """Run the parts asked for and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--budget", type=float, help="seconds for every part, in place of its own budget")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        for row in PARTS[args.part](SMALL if args.tiny else FULL):
            print(json.dumps(row), flush=True)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    report: dict[str, Any] = {"device": describe_device(), "parts": {}}
    for name in args.parts:
        report["parts"][name] = run_part(name, args)
        report["seconds"] = time.perf_counter() - started
        add_fractions(report)  # after every part: whatever ends this run, what is known is written
        (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1))
        (args.out / "gpu_check.md").write_text(markdown(report))
    print((args.out / "gpu_check.md").read_text())
    failed = any(str(part.get("note", "")).startswith("failed") for part in report["parts"].values())
    wrong = any(not row["ok"] for row in report["parts"].get("kernels", {}).get("rows", []))
    return int(failed or wrong)


if __name__ == "__main__":
    sys.exit(main())
