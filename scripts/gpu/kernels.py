"""The kernels alone: this device's ceilings, attention against its oracle and the clock, quantised products.

Each part yields rows of results as soon as it has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from gpu.plan import Plan, Rows
from gpu.timing import best_seconds, measured, repeated


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
