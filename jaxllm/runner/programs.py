"""One program of the engine, lowered from shapes alone: enough for any compiler, this machine's or a TPU slice's.

A model, its `RunnerShapes` and a `Key` -> what `jax.jit(...).lower` returns. Knows nothing of weights, threads or
requests.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.kv.page_programs import MOVES, lower_move
from jaxllm.runner import batch as batches
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.runner.steps import Programs, SlotState
from jaxllm.scheduling.scheduler import IterationPlan
from jaxllm.weights.loader import AbstractModel

Key = tuple[str, int, bool]  # program, bucket, plainly greedy


def make_programs(model: AbstractModel, shapes: RunnerShapes) -> Programs:
    """The step functions of one model."""
    return Programs(
        cfg=model.cfg,
        graph=model.graph,
        params_tree=jax.tree.structure(model.parameters),
        placement=model.placement,
        residual_dtype=shapes.residual_dtype,
        max_steps=shapes.max_decode_steps,
        longest=shapes.max_model_len,
        # Deterministic iterations have a tile for every decode.
        backend=dataclasses.replace(shapes.attention, query_tile=16) if shapes.deterministic else shapes.attention,
    )


def abstract_arrays(model: AbstractModel, shapes: RunnerShapes) -> tuple[Any, Any, Any]:
    """Parameter leaves, pages and state as shapes with shardings: enough to compile without any weights."""

    def shaped(variable: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    state = jax.eval_shape(functools.partial(zero_state, shapes))
    whole = model.placement.replicated
    return (
        jax.tree.leaves(model.parameters),
        abstract_pages(model, shapes),
        jax.tree.map(lambda s: shaped(s, whole), state),
    )


def abstract_pages(model: AbstractModel, shapes: RunnerShapes) -> list[Any]:
    """Per layer the pages of all replicas, as shapes with shardings."""
    return [shapes.page_layout(model.cfg.cache_row, model.kv_copies).abstract(model.placement)] * model.cfg.num_layers


def zero_state(shapes: RunnerShapes) -> SlotState:
    """No slot taken, the spare one included."""
    slots = shapes.spare_slot + 1
    return SlotState(jnp.zeros((slots, shapes.max_model_len), jnp.int32), jnp.zeros(slots, jnp.bool))


def lower(model: AbstractModel, shapes: RunnerShapes, key: Key) -> Any:
    """Lower one program; `.compile()` what comes back."""
    name, bucket, _ = key
    params, pages, state = abstract_arrays(model, shapes)
    if name in MOVES:
        return lower_move(name, pages)
    programs, whole = make_programs(model, shapes), model.placement.replicated
    paged = jax.tree.map(lambda leaf: leaf.sharding, pages)
    inputs = _whole(host_inputs(shapes, model.cfg.vocab_size, key), whole)

    def hidden(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, model.cfg.hidden_size), shapes.residual_dtype, sharding=whole)

    if name == "admit":
        return jax.jit(programs.admit, donate_argnums=0, out_shardings=whole).lower(state, *inputs)
    if name in ("ragged", "hidden"):
        jitted = jax.jit(programs.ragged_step, donate_argnums=1, out_shardings=(whole, paged))
        return jitted.lower(params, pages, state, *inputs)
    if name in ("score", "pool"):
        function = programs.score if name == "score" else programs.pool
        return jax.jit(function, out_shardings=whole).lower(params, hidden(bucket), *inputs)
    if name == "sample":
        jitted = jax.jit(programs.sample_step, donate_argnums=2, out_shardings=whole)
        return jitted.lower(params, hidden(shapes.num_replicas * shapes.row_buckets[-1]), state, *inputs)
    jitted = jax.jit(programs.decode_loop, donate_argnums=(1, 2), out_shardings=(whole, paged, whole))
    return jitted.lower(params, pages, state, *inputs)


def host_inputs(shapes: RunnerShapes, vocab_size: int, key: Key) -> tuple[Any, ...]:
    """What one program takes from the host beside the device's arrays: the empty one of each."""
    name, bucket, greedy = key
    replicas, width = shapes.num_replicas, shapes.pages_per_row
    if name == "admit":
        return np.int32(0), np.zeros(shapes.max_model_len, np.int32)
    if name in ("ragged", "hidden"):
        batch = batches.ragged_batch(IterationPlan([]), bucket, shapes.row_buckets[-1], width, replicas)
        if name == "hidden":
            batch = dataclasses.replace(batch, sample_at=np.zeros(bucket, np.int32))
        return (batch,)
    if name in ("score", "pool"):
        return (np.zeros(bucket, np.int32 if name == "score" else np.float32),)
    rows = batches.row_batch([], bucket, shapes.spare_slot, vocab_size, replicas)
    if not greedy:
        rows = dataclasses.replace(rows, sampling=batches.sampling_rows([], replicas * bucket, vocab_size))
    if name == "sample":
        return (rows,)
    assert name == "decode", name
    return rows, np.zeros((replicas * bucket, width), np.int32), np.int32(1)


def _whole(inputs: tuple[Any, ...], whole: NamedSharding) -> tuple[Any, ...]:
    """What comes from the host comes whole to every device; else the compiler would choose a cut."""
    if whole.mesh.size == 1:
        return inputs
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype, sharding=whole), inputs)
