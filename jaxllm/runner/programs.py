"""The compiled programs of an engine, as one table: whatever lowers, runs, sends or warms up programs loops over it.

A program is a pure function `(steps, *what it reads, *host inputs) -> (*what it writes, output)`. What it reads and
writes are fields of `DeviceState`; a field that is both is donated. To add one, write its function (in `steps`, say)
and its entry here. Knows nothing of weights' values, threads or requests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.adapters.product import Slots
from jaxllm.adapters.slots import no_adapter, stacked_slots
from jaxllm.kv.memory import KVMemory
from jaxllm.kv.page_programs import MOVE_BATCH, copy_pages, put_pages, take_pages
from jaxllm.runner import batch as batches
from jaxllm.runner.shapes import RunnerShapes, make_memory
from jaxllm.runner.speculation import speculating_loop
from jaxllm.runner.steps import Pages, SlotState, Steps, Weights
from jaxllm.weights.abstract import AbstractModel

Key = tuple[str, int]  # program, bucket
Inputs = tuple[Any, ...]
START, ALWAYS, SAMPLING, SCORING, TIERS = "start", "always", "sampling", "scoring", "tiers"


@dataclass(slots=True)
class DeviceState:
    """All that lies on the devices between two programs.

    Attributes:
        memory: has the pages, per layer an array or a pytree of page-major arrays.
        params: leaves of the parameters. Flattening the module at every dispatch would cost more than the dispatch.
        adapters: matrices of the adapters in their slots, by product; none where adapters are off.
        slots: what is remembered of each running request.
        hidden: `[Z * R, D]`, hidden states of the sampling rows of the last ragged step.
        scored: `[T, D]`, hidden states of every token of the last scoring pass.
    """

    memory: KVMemory
    params: Any = None
    adapters: Any = None
    slots: Any = None
    hidden: Any = None
    scored: Any = None

    @property
    def weights(self) -> Weights:
        """All that a forward pass multiplies with."""
        return Weights(self.params, self.adapters)

    @property
    def pages(self) -> list[Any]:
        """See `KVMemory`."""
        return self.memory.pages

    @property
    def draft_pages(self) -> list[Any]:
        """See `KVMemory`."""
        return self.memory.draft_pages

    @draft_pages.setter
    def draft_pages(self, pages: list[Any]) -> None:
        self.memory.draft_pages = pages

    @pages.setter
    def pages(self, pages: list[Any]) -> None:
        self.memory.pages = pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One entry of the table.

    Attributes:
        name: also in messages between processes and in logs.
        run: the function.
        reads, writes: fields of `DeviceState`.
        inputs: what the host gives it, empty, for a bucket; arrays of device memory as shapes with shardings.
        buckets: the sizes that it is compiled for; none: this engine does not use it.
        output: shardings of what it gives back beside `writes`, or None where it gives nothing.
        warm_up: for whom it is compiled ahead of time; `START` is what the first short request needs.
    """

    name: str
    run: Callable[..., tuple[Any, ...]]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    inputs: Callable[[AbstractModel, RunnerShapes, int], Inputs]
    buckets: Callable[[RunnerShapes], Sequence[int]]
    output: Callable[[AbstractModel, RunnerShapes], Any] | None = None
    warm_up: str = ALWAYS


def make_steps(model: AbstractModel, shapes: RunnerShapes) -> Steps:
    """The step functions of one model."""
    return Steps(
        cfg=model.cfg,
        graph=model.graph,
        params_tree=jax.tree.structure(model.parameters),
        placement=model.placement,
        residual_dtype=shapes.residual_dtype,
        max_steps=shapes.max_decode_steps,
        longest=shapes.max_model_len,
        backend=shapes.attention,
        speculation=shapes.speculation,
        draft=make_steps(model.draft, shapes) if model.draft else None,
    )


def abstract_state(model: AbstractModel, shapes: RunnerShapes, bucket: int = 1) -> DeviceState:
    """Shapes with shardings, enough to compile without any weights; `bucket` is that of the scoring pass."""
    whole = model.placement.replicated

    def hidden(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, model.cfg.hidden_size), shapes.residual_dtype, sharding=whole)

    slots = jax.eval_shape(functools.partial(zero_slots, shapes))
    memory = make_memory(model, shapes)
    memory.pages, memory.draft_pages = memory.abstract(), memory.abstract_draft()
    return DeviceState(
        memory,
        params=model.leaves(),
        adapters=abstract_adapters(model, shapes),
        slots=jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), slots),
        hidden=hidden(shapes.num_replicas * shapes.row_buckets[-1]),
        scored=hidden(bucket),
    )


def abstract_adapters(model: AbstractModel, shapes: RunnerShapes) -> dict[str, Slots]:
    """The matrices of every slot of adapters, as shapes: cut as the activations that they multiply."""
    if not shapes.max_loras:
        return {}
    return stacked_slots(model.targets, model.placement, shapes.max_loras, shapes.max_lora_rank)


def empty_adapters(model: AbstractModel, shapes: RunnerShapes) -> dict[str, Slots]:
    """No slot of adapters taken."""
    return jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract_adapters(model, shapes)
    )


def zero_slots(shapes: RunnerShapes) -> SlotState:
    """No slot taken, the spare one included."""
    slots = shapes.spare_slot + 1
    return SlotState(
        history=jnp.zeros((slots, shapes.max_model_len), jnp.int32),
        length=jnp.zeros(slots, jnp.int32),
        done=jnp.zeros(slots, jnp.bool),
        adapter=jnp.zeros(slots, jnp.int32),
        allowed=jnp.zeros((slots, 1 + shapes.num_drafts, shapes.mask_words), jnp.int32),
        hit_rate=jnp.zeros((slots, 2), jnp.float32),
    )


def lower(model: AbstractModel, shapes: RunnerShapes, key: Key) -> jax.stages.Lowered:
    """Lower one program; `.compile()` what comes back, with any compiler: this machine's or a TPU slice's."""
    name, bucket = key
    program, state, whole = PROGRAMS[name], abstract_state(model, shapes, bucket), model.placement.replicated

    def given(leaf: Any) -> Any:
        """What comes from the host comes whole to every device; else the compiler would choose a cut."""
        if isinstance(leaf, jax.ShapeDtypeStruct) or whole.mesh.size == 1:
            return leaf
        return jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype, sharding=whole)

    written = tuple(jax.tree.map(lambda leaf: leaf.sharding, getattr(state, field)) for field in program.writes)
    output = () if program.output is None else (program.output(model, shapes),)
    jitted = jax.jit(
        functools.partial(program.run, make_steps(model, shapes)),
        donate_argnums=[i for i, field in enumerate(program.reads) if field in program.writes],
        out_shardings=(*written, *output),
    )
    inputs = jax.tree.map(given, program.inputs(model, shapes, bucket))
    return jitted.lower(*(getattr(state, field) for field in program.reads), *inputs)


def all_keys(shapes: RunnerShapes, groups: Sequence[str]) -> list[Key]:
    """Every program of these groups in every size, smallest first."""
    wanted = {*groups} if shapes.separate_greedy else {*groups, SAMPLING}
    chosen = [program for program in PROGRAMS.values() if program.warm_up in wanted]
    return [(program.name, bucket) for program in chosen for bucket in program.buckets(shapes)]


def first_keys(shapes: RunnerShapes) -> list[Key]:
    """What the first short request needs."""
    return list({name: (name, bucket) for name, bucket in reversed(all_keys(shapes, [START]))}.values())[::-1]


def soonest_first(keys: Sequence[Key]) -> list[Key]:
    """Keys in the order in which they are likely to be needed: those of requests that come alone first.

    Then those of more and more requests; what moves pages and what scores comes last.
    """
    sizes: dict[str, list[int]] = {}
    for name, bucket in keys:
        sizes.setdefault(name, []).append(bucket)
    last = (TIERS, SCORING)

    def rank(key: Key) -> tuple[int, int]:
        group = PROGRAMS[key[0]].warm_up
        return last.index(group) + 1 if group in last else 0, sizes[key[0]].index(key[1])

    return sorted(keys, key=rank)


# What programs are given by the host, and their sizes.


def _admission(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    return np.int32(0), np.zeros(shapes.max_model_len, np.int32), np.int32(0), np.int32(0)


def _adapter(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    return np.int32(1), no_adapter(model.targets, shapes.max_lora_rank)


def _masks(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    return np.zeros(bucket, np.int32), np.zeros((bucket, 1 + shapes.num_drafts, shapes.mask_words), np.int32)


def _ragged(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    return (batches.ragged_batch(batches.by_replica([], shapes), bucket, shapes),)


def _whole_pass(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    (batch,) = _ragged(model, shapes, bucket)
    return (dataclasses.replace(batch, sample_at=np.zeros(bucket, np.int32)),)


def _greedy_rows(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    (batch,) = _rows(model, shapes, bucket)
    return (dataclasses.replace(batch, sampling=None),)


def _rows(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    size = shapes.num_replicas * bucket
    sampling = batches.sampling_rows([], [], size, shapes.vocab_size)
    return (dataclasses.replace(batches.row_batch([], [], size, shapes), sampling=sampling),)


def _decoding(
    rows: Callable[[AbstractModel, RunnerShapes, int], Inputs],
) -> Callable[[AbstractModel, RunnerShapes, int], Inputs]:
    def inputs(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
        table = np.zeros((shapes.num_replicas * bucket, shapes.pages_per_row), np.int32)
        return *rows(model, shapes, bucket), table, np.int32(1)

    return inputs


def _speculating(
    rows: Callable[[AbstractModel, RunnerShapes, int], Inputs],
) -> Callable[[AbstractModel, RunnerShapes, int], Inputs]:
    def inputs(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
        drafts = batches.drafting([], [], shapes.num_replicas * bucket, shapes, 0.0)
        return *_decoding(rows)(model, shapes, bucket), drafts

    return inputs


def _page_numbers(count: int) -> Callable[[AbstractModel, RunnerShapes, int], Inputs]:
    return lambda model, shapes, bucket: (np.zeros(bucket, np.int32),) * count


def _slabs_to_put(model: AbstractModel, shapes: RunnerShapes, bucket: int) -> Inputs:
    return np.zeros(bucket, np.int32), [make_memory(model, shapes).slab()] * bucket


def _of_every_token(dtype: type) -> Callable[[AbstractModel, RunnerShapes, int], Inputs]:
    return lambda model, shapes, bucket: (np.zeros(bucket, dtype),)


def _one(size: int) -> Callable[[RunnerShapes], Sequence[int]]:
    return lambda shapes: (size,)


def _adapter_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return (1,) if shapes.max_loras else ()


def _token_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return shapes.token_buckets


def _scoring_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return shapes.scoring_buckets


def _row_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return shapes.row_buckets


def _greedy_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return shapes.row_buckets if shapes.separate_greedy else ()


def _loop_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return shapes.row_buckets if shapes.max_decode_steps else ()


def _speculating_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return [bucket for bucket in shapes.row_buckets if shapes.speculates(bucket)]


def _greedy_speculating_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return _speculating_buckets(shapes) if shapes.separate_greedy else ()


def _greedy_loop_buckets(shapes: RunnerShapes) -> Sequence[int]:
    return _loop_buckets(shapes) if shapes.separate_greedy else ()


# What programs give back.


def _whole(model: AbstractModel, shapes: RunnerShapes) -> Any:
    return model.placement.replicated


def _slabs(model: AbstractModel, shapes: RunnerShapes) -> Any:
    slab = make_memory(model, shapes).slab()
    return [jax.tree.map(lambda leaf: leaf.sharding, slab)] * MOVE_BATCH


# Functions that are not steps of a model.


def _copy(_: Steps, pages: Pages, draft_pages: Pages, source_G: jax.Array, target_G: jax.Array) -> tuple[Pages, Pages]:
    return copy_pages(pages, source_G, target_G), copy_pages(draft_pages, source_G, target_G)


def _take(_: Steps, pages: Pages, index_G: jax.Array) -> tuple[list[Any]]:
    return (take_pages(pages, index_G),)


def _load_adapter(_: Steps, adapters: Any, slot: jax.Array, matrices: Any) -> tuple[Any]:
    return ({name: all_slots.with_slot(slot - 1, matrices[name]) for name, all_slots in adapters.items()},)


def _put(_: Steps, pages: Pages, index_G: jax.Array, slabs: Sequence[Any]) -> tuple[Pages]:
    return (put_pages(pages, index_G, slabs),)


_ENTRIES = (
    Program(
        name="admit",
        run=Steps.admit,
        reads=("slots",),
        writes=("slots",),
        inputs=_admission,
        buckets=_one(1),
        warm_up=START,
    ),
    Program(
        name="load_adapter",
        run=_load_adapter,
        reads=("adapters",),
        writes=("adapters",),
        inputs=_adapter,
        buckets=_adapter_buckets,
    ),
    Program(
        name="ragged",
        run=Steps.ragged_step,
        reads=("weights", "pages", "slots", "draft_pages"),
        writes=("hidden", "pages", "draft_pages"),
        inputs=_ragged,
        buckets=_token_buckets,
        warm_up=START,
    ),
    Program(
        name="sample_greedy",
        run=Steps.sample_step,
        reads=("params", "hidden", "slots"),
        writes=("slots",),
        inputs=_greedy_rows,
        buckets=_greedy_buckets,
        output=_whole,
        warm_up=START,
    ),
    Program(
        name="decode_greedy",
        run=Steps.decode_loop,
        reads=("weights", "pages", "slots"),
        writes=("pages", "slots"),
        inputs=_decoding(_greedy_rows),
        buckets=_greedy_loop_buckets,
        output=_whole,
        warm_up=START,
    ),
    Program(
        name="sample",
        run=Steps.sample_step,
        reads=("params", "hidden", "slots"),
        writes=("slots",),
        inputs=_rows,
        buckets=_row_buckets,
        output=_whole,
        warm_up=SAMPLING,
    ),
    Program(
        name="decode",
        run=Steps.decode_loop,
        reads=("weights", "pages", "slots"),
        writes=("pages", "slots"),
        inputs=_decoding(_rows),
        buckets=_loop_buckets,
        output=_whole,
        warm_up=SAMPLING,
    ),
    Program(
        name="speculate_greedy",
        run=speculating_loop,
        reads=("weights", "pages", "slots", "draft_pages"),
        writes=("pages", "slots", "draft_pages"),
        inputs=_speculating(_greedy_rows),
        buckets=_greedy_speculating_buckets,
        output=_whole,
        warm_up=START,
    ),
    Program(
        name="speculate",
        run=speculating_loop,
        reads=("weights", "pages", "slots", "draft_pages"),
        writes=("pages", "slots", "draft_pages"),
        inputs=_speculating(_rows),
        buckets=_speculating_buckets,
        output=_whole,
        warm_up=SAMPLING,
    ),
    Program(
        name="mask",
        run=Steps.set_masks,
        reads=("slots",),
        writes=("slots",),
        inputs=_masks,
        buckets=_one(batches.MASK_BATCH),
    ),
    Program(
        name="hidden",
        run=Steps.ragged_step,
        reads=("weights", "pages", "slots", "draft_pages"),
        writes=("scored", "pages", "draft_pages"),
        inputs=_whole_pass,
        buckets=_scoring_buckets,
        warm_up=SCORING,
    ),
    Program(
        name="score",
        run=Steps.score,
        reads=("params", "scored"),
        inputs=_of_every_token(np.int32),
        buckets=_scoring_buckets,
        output=_whole,
        warm_up=SCORING,
    ),
    Program(
        name="pool",
        run=Steps.pool,
        reads=("params", "scored"),
        inputs=_of_every_token(np.float32),
        buckets=_scoring_buckets,
        output=_whole,
        warm_up=SCORING,
    ),
    Program(
        name="copy",
        run=_copy,
        reads=("pages", "draft_pages"),
        writes=("pages", "draft_pages"),
        inputs=_page_numbers(2),
        buckets=_one(MOVE_BATCH),
    ),
    Program(
        name="take",
        run=_take,
        reads=("pages",),
        inputs=_page_numbers(1),
        buckets=_one(MOVE_BATCH),
        output=_slabs,
        warm_up=TIERS,
    ),
    Program(
        name="put",
        run=_put,
        reads=("pages",),
        writes=("pages",),
        inputs=_slabs_to_put,
        buckets=_one(MOVE_BATCH),
        warm_up=TIERS,
    ),
)
PROGRAMS = {program.name: program for program in _ENTRIES}
