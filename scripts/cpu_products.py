"""Products of the processor's own kernels alone, in bfloat16 and quantised: `python scripts/cpu_products.py`.

Many matrices of one shape, more than the caches hold, one after the other in one program; least seconds of some runs.
One line a number of rows: milliseconds, GB/s of weights as they are kept, GFLOP/s, and the ratio to bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.quantization import Activations, Scheme
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.rounding import Pieces
from jaxllm.weights.stored import Panels, choose_storage

BY_GROUP = Activations(codes="int8", by_group=True)
SCHEMES = {
    "bfloat16": None,
    "q4_1": Scheme(codes="uint4", group=32, has_minima=True, scale_dtype="float16"),
    "q4_1, int8 rows": Scheme(codes="uint4", group=32, has_minima=True, scale_dtype="float16", activations=BY_GROUP),
    "int4 of 128": Scheme(codes="uint4", group=128, offset=8, scale_dtype="bfloat16"),
    "q8_0": Scheme(codes="int8", group=32, scale_dtype="float16"),
    "q8_0, int8 rows": Scheme(codes="int8", group=32, scale_dtype="float16", activations=BY_GROUP),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 512])
    parser.add_argument("--inputs", type=int, default=640)
    parser.add_argument("--outputs", type=int, default=3072)
    parser.add_argument("--matrices", type=int, default=76)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    placement = Placement(make_mesh("tp=1"), load_rules("megatron"))
    for rows in args.rows:
        x = jax.random.normal(jax.random.key(rows), (rows, args.inputs), jnp.bfloat16)
        count = args.matrices if rows < 128 else max(1, args.matrices // 4)
        flops, base = 2 * rows * args.inputs * args.outputs * count, 0.0
        for name, scheme in SCHEMES.items():
            matrices = [matrix(scheme, args.inputs, args.outputs, placement, seed) for seed in range(count)]
            seconds = least(jax.jit(all_of), x, matrices, args.runs)
            size = sum(array.nbytes for array in jax.tree.leaves(matrices))
            base = base or seconds
            print(
                f"{rows:4} rows, {name:16} {1e3 * seconds:8.2f} ms {size / seconds / 1e9:6.1f} GB/s "
                f"{flops / seconds / 1e9:6.0f} GFLOP/s {base / seconds:5.2f}x",
                flush=True,
            )


def all_of(x: jax.Array, matrices: list[Any]) -> jax.Array:
    """A sum that needs every product."""
    return functools.reduce(jnp.add, [w.product("TD,DF->TF", x) for w in matrices])


def matrix(scheme: Scheme | None, k: int, n: int, placement: Placement, seed: int) -> Any:
    """Random numbers as they are kept on this processor."""
    rng, want = np.random.default_rng(seed), jax.ShapeDtypeStruct((k, n), jnp.dtype(jnp.bfloat16))
    storage = choose_storage(want, (0,), matmul="llvm", scheme=scheme, inputs=(0,))
    sharding = placement.sharding("model_in", "ffn", parameter=True)
    if scheme is None:
        assert isinstance(storage, Panels), "this processor has no bfloat16 products"
        return storage.from_pieces(
            want, sharding, lambda box: rng.standard_normal((k, n), np.float32)[box].astype(jnp.bfloat16)
        )

    def read(box: tuple[slice, ...]) -> Pieces:
        width = len(range(n)[box[1]])
        low, high, kind = (0, 16, np.uint8) if scheme.bits == 4 else (-127, 128, np.int8)
        parts = [rng.random((k // (scheme.group or k), width), np.float32) * 0.01 for _ in range(2)]
        return Pieces(rng.integers(low, high, (k, width), kind), parts[0], parts[1])

    return storage.from_pieces(want, sharding, read)


def least(run: Callable[..., jax.Array], x: jax.Array, matrices: list[Any], runs: int) -> float:
    """Seconds of the fastest of several runs."""
    run(x, matrices).block_until_ready()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        run(x, matrices).block_until_ready()
        taken.append(time.perf_counter() - started)
    return min(taken)


if __name__ == "__main__":
    main()
