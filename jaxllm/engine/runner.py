"""The model runner: owns the device arrays and the compiled programs, and turns plans into dispatched work.

`IterationPlan` -> `InFlight` at once (nothing is waited for) -> tokens when read. Knows nothing of text, users or
scheduling policy.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.cache.moves import MOVE_BATCH, MOVES, device_bytes, lower_move, slab_struct
from jaxllm.cache.pages import PageLayout, allocate_pages
from jaxllm.engine import batch as batches
from jaxllm.engine.sampling import Sampled
from jaxllm.engine.scheduler import Chunk, IterationPlan
from jaxllm.engine.step import Programs, SlotState
from jaxllm.engine.wire import decode, encode
from jaxllm.models.loader import AbstractModel
from jaxllm.ops.attention import XLA, AttentionBackend

if TYPE_CHECKING:
    from jaxllm.engine.processes import Leader

log = logging.getLogger(__name__)
Key = tuple[str, int, bool]  # program, bucket, plainly greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerShapes:
    """Every static size of the compiled programs; requests, tokens and pages are those of one replica."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int
    max_decode_steps: int
    kv_dtype: jnp.dtype
    residual_dtype: jnp.dtype
    deterministic: bool = False
    attention: AttentionBackend = XLA
    num_replicas: int = 1
    token_multiple: int = 1
    single_row: bool = False  # whether a program for one row pays: XLA's products cost for 1 row what they do for 4

    def page_layout(self, kv_copies: int) -> PageLayout:
        """Of one layer's cache, the pages of all replicas."""
        return PageLayout(
            num_pages=self.num_pages * self.num_replicas, page_size=self.page_size, kv_copies=kv_copies,
            dtype=self.kv_dtype, interleaved=self.attention.interleaved_pages,
        )  # fmt: skip

    @property
    def spare_slot(self) -> int:
        """The slot after all requests' slots: padding rows use it."""
        return self.num_replicas * self.max_num_seqs

    @property
    def pages_per_row(self) -> int:
        """Width of the page table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Sizes of the ragged step, rounded up to what the token cuts of the mesh divide."""
        largest = self.max_num_batched_tokens
        buckets = (largest,) if self.deterministic else batches.make_buckets(min(64, largest), largest, 4)
        return tuple(dict.fromkeys(-(-size // self.token_multiple) * self.token_multiple for size in buckets))

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Sizes of the sampling step and the decode loop."""
        if self.deterministic:
            return (max(4, self.max_num_seqs),)
        buckets = batches.make_buckets(4, max(4, self.max_num_seqs), 2)
        return (1, *buckets) if self.single_row else buckets

    @property
    def sampling_programs(self) -> tuple[str, ...]:
        """Programs that sample; without a decode loop every iteration is a ragged step."""
        return ("sample", "decode") if self.max_decode_steps else ("sample",)


@dataclass(frozen=True, slots=True)
class InFlight:
    """Work on its way: the chunks that sample, their rows, and what they sampled (hidden states where none does)."""

    plan: IterationPlan
    sampling: Sequence[Chunk]
    rows: Sequence[int]
    result: Sampled | jax.Array
    dispatched: float

    def read(self) -> list[tuple[Chunk, Sampled]]:
        """Wait, and return each sampling chunk's tokens (and logprobs) with idle steps dropped.

        It waits for iterations that sample nothing too: else all chunks of a long prompt would be on the device's queue
        at once, before whoever comes next.
        """
        if not isinstance(self.result, Sampled):
            jax.block_until_ready(self.result)
            return []
        arrays = jax.tree.map(np.asarray, self.result)
        if not self.plan.is_decode_loop:
            arrays = jax.tree.map(lambda a: a[None], arrays)
        return [(c, _row(arrays, row, c.num_samples)) for c, row in zip(self.sampling, self.rows, strict=True)]


def _row(arrays: Sampled, row: int, num_samples: int) -> Sampled:
    count = int((arrays.tokens[:num_samples, row] >= 0).sum())
    return jax.tree.map(lambda a: a[:count, row], arrays)


class ModelRunner:
    """Parameters, pages and slot state on the mesh, and one compiled program per bucket.

    Programs are compiled from shapes alone, so `prepare` can run while the weights are still being read; `start`
    takes the weights and allocates the rest.
    """

    def __init__(self, model: AbstractModel, shapes: RunnerShapes):
        self.model = model
        self.shapes = shapes
        self.programs = make_programs(model, shapes)
        self._params: list[jax.Array] = []
        self._pages: list[Any] = []  # per layer an array, or a pytree of page-major arrays
        self._state: Any = None
        self._hidden: Any = None  # what the last ragged step left
        self.leader: Leader | None = None
        self._no_masks: dict[int, jax.Array] = {}
        self._compiled: dict[Key, Future[Any]] = {}
        self._compilers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")
        self._lock = threading.Lock()
        self._warm = False
        self.num_compilations = 0
        self.num_compilations_after_warmup = 0

    def start(self, params: Any) -> None:
        """Take the parameters and allocate pages and state."""
        self._params = jax.tree.leaves(params)
        self.reset()

    def reset(self) -> None:
        """Empty pages and slots: at the start, and after a failed iteration took the donated ones with it."""
        if self.leader is not None:
            self.leader.send(encode(("reset", 0, True), ()))
        self._pages, self._state, self._hidden = [], None, None  # free the old ones first
        model = self.model
        self._pages = allocate_pages(model.cfg, self.shapes.page_layout(model.kv_copies), model.placement)
        self._state = _empty_state(self.shapes, model)

    def dispatch(self, plan: IterationPlan) -> InFlight:
        """Put one plan's work on the device queue."""
        started = time.perf_counter()
        self._copy_pages(plan.copies)
        for request in plan.admitted:
            row = np.zeros(self.shapes.max_model_len, np.int32)
            row[: len(request.token_ids)] = request.token_ids
            self.execute(("admit", 0, True), np.int32(request.slot), row)
        sampling = [chunk for chunk in plan.chunks if chunk.num_samples]
        result = self._decode(plan) if plan.is_decode_loop else self._ragged(plan, sampling)
        if isinstance(result, Sampled):
            for array in jax.tree.leaves(result):
                array.copy_to_host_async()
        replicas = self.shapes.num_replicas
        num_rows = batches.bucket_for(batches.fullest(sampling, replicas), self.shapes.row_buckets)
        return InFlight(plan, sampling, batches.row_numbers(sampling, num_rows, replicas), result, started)

    def _ragged(self, plan: IterationPlan, sampling: Sequence[Chunk]) -> Sampled | jax.Array:
        parts = batches.by_replica(plan.chunks, self.shapes.num_replicas)
        tokens = max(sum(chunk.count for chunk in part) for part in parts)
        bucket = batches.bucket_for(tokens, self.shapes.token_buckets)
        batch = self._batch(plan, bucket)
        hidden_RD = self.execute(("ragged", bucket, True), batch)
        if not sampling:
            return hidden_RD
        bucket, rows = self._rows(sampling)
        return self.execute(("sample", bucket, rows.sampling is None), rows)

    def hidden_states(self, plan: IterationPlan) -> jax.Array:
        """Forward one chunk of a request in the spare slot of the first replica; every token's hidden state `[T, D]`.

        For scoring passes, which sample nothing: T is the token bucket, rows past the chunk mean nothing.
        """
        (chunk,) = plan.chunks
        row = np.zeros(self.shapes.max_model_len, np.int32)
        row[: len(chunk.request.token_ids)] = chunk.request.token_ids
        self.execute(("admit", 0, True), np.int32(chunk.request.slot), row)
        bucket = batches.bucket_for(plan.num_tokens, self.scoring_buckets)
        batch = dataclasses.replace(self._batch(plan, bucket), sample_at=np.arange(bucket, dtype=np.int32))
        return self.execute(("hidden", bucket, True), batch)

    def _batch(self, plan: IterationPlan, bucket: int) -> batches.RaggedBatch:
        shapes = self.shapes
        batch = batches.ragged_batch(plan, bucket, shapes.row_buckets[-1], shapes.pages_per_row, shapes.num_replicas)
        # A token must not know whether it came as a decode or in a chunk: its row is attended in the same way.
        return dataclasses.replace(batch, num_single=batch.num_single * 0) if shapes.deterministic else batch

    def score(self, hidden_TD: jax.Array, targets_T: np.ndarray) -> Sampled:
        """See `Programs.score`."""
        assert hidden_TD is self._hidden, "other work came in between"
        return self.execute(("score", len(targets_T), True), targets_T)

    def pool(self, hidden_TD: jax.Array, weights_T: np.ndarray) -> jax.Array:
        """See `Programs.pool`."""
        assert hidden_TD is self._hidden, "other work came in between"
        return self.execute(("pool", len(weights_T), True), weights_T)

    def _copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        for i in range(0, len(pairs), MOVE_BATCH):
            source_G, target_G = (_padded(side) for side in zip(*pairs[i : i + MOVE_BATCH], strict=True))
            self.execute(("copy", MOVE_BATCH, True), source_G, target_G)

    def take_pages(self, pages: Sequence[int]) -> list[Any]:
        """A copy of each page as it is after what was dispatched so far: slabs, see `jaxllm.cache.moves`."""
        slabs: list[Any] = []
        for i in range(0, len(pages), MOVE_BATCH):
            batch = pages[i : i + MOVE_BATCH]
            slabs += self._program("take", MOVE_BATCH, True)(self._pages, _padded(batch))[: len(batch)]
        return slabs

    def put_pages(self, pages: Sequence[int], slabs: Sequence[Any]) -> None:
        """Write slabs into pages, before what is dispatched next."""
        for i in range(0, len(pages), MOVE_BATCH):
            batch, index_G = list(slabs[i : i + MOVE_BATCH]), _padded(pages[i : i + MOVE_BATCH])
            batch += batch[:1] * (MOVE_BATCH - len(batch))
            self._pages = self._program("put", MOVE_BATCH, True)(self._pages, index_G, batch)

    @functools.cached_property
    def page_bytes(self) -> int:
        """Of one page over all layers and the devices that hold it."""
        pages = _abstract_pages(self.model, self.shapes)
        return device_bytes(pages) // (self.shapes.num_pages * self.shapes.num_replicas)

    def slab(self) -> Any:
        """Shapes and shardings of one page over all layers."""
        return slab_struct(abstract_arrays(self.model, self.shapes)[1])

    @property
    def scoring_buckets(self) -> tuple[int, ...]:
        """Sizes of scoring passes: two, since every size is one more program."""
        buckets = self.shapes.token_buckets
        return tuple(dict.fromkeys((buckets[len(buckets) // 2], buckets[-1])))

    def _decode(self, plan: IterationPlan) -> Sampled:
        bucket, rows = self._rows(plan.chunks)
        table = batches.page_tables(plan.chunks, bucket, self.shapes.pages_per_row, self.shapes.num_replicas)
        return self.execute(("decode", bucket, rows.sampling is None), rows, table, np.int32(plan.num_steps))

    def execute(self, key: Key, *inputs: Any) -> Any:
        """Dispatch one program on what lies on the devices and these host arrays: the same on every process."""
        if self.leader is not None:
            self.leader.send(encode(key, inputs))
        program, name = self._program(*key), key[0]
        if name == "admit":
            self._state = program(self._state, *inputs)
            return None
        if name == "copy":
            self._pages = program(self._pages, *inputs)
            return None
        if name in ("ragged", "hidden"):
            self._hidden, self._pages = program(self._params, self._pages, self._state, *inputs)
            return self._hidden
        if name in ("score", "pool"):
            return program(self._params, self._hidden, *inputs)
        rows = self._without_idle_masks(key[1], inputs[0])
        if name == "sample":
            sampled, self._state = program(self._params, self._hidden, self._state, rows)
        else:
            sampled, self._pages, self._state = program(self._params, self._pages, self._state, rows, *inputs[1:])
        return sampled

    def obey(self, message: bytes) -> bool:
        """Do what the runner of process 0 did (see `jaxllm.engine.processes`). False: it has stopped."""
        key, inputs = decode(message, self.model.cfg.vocab_size)
        if key[0] == "reset":
            self.reset()
        elif key[0] == "warm_up":
            self.warm_up(sampling=bool(key[1] & 1), scoring=bool(key[1] & 2))
        elif key[0] != "stop":
            self.execute(key, *inputs)
        return key[0] != "stop"

    def _rows(self, chunks: Sequence[Chunk]) -> tuple[int, batches.RowBatch]:
        """Rows of each replica's section, and the sections."""
        shapes = self.shapes
        bucket = batches.bucket_for(batches.fullest(chunks, shapes.num_replicas), shapes.row_buckets)
        return bucket, batches.row_batch(
            chunks, bucket, shapes.spare_slot, self.model.cfg.vocab_size, shapes.num_replicas,
            greedy=not shapes.deterministic,
        )  # fmt: skip

    def _without_idle_masks(self, bucket: int, rows: batches.RowBatch) -> batches.RowBatch:
        if rows.sampling is None or rows.sampling.masked.any():
            return rows
        if bucket not in self._no_masks:  # stays on the device: no row looks at it
            self._no_masks[bucket] = jax.device_put(rows.sampling.allowed, self.model.placement.replicated)
        sampling = dataclasses.replace(rows.sampling, allowed=self._no_masks[bucket])
        return dataclasses.replace(rows, sampling=sampling)

    def _program(self, name: str, bucket: int, greedy: bool) -> Any:
        return self._submit((name, bucket, greedy)).result()

    def _submit(self, key: Key) -> Future[Any]:
        """The future of one program: compiled once, whoever asks first."""
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compilers.submit(self._compile, key)
            return self._compiled[key]

    def _compile(self, key: Key) -> Any:
        started = time.perf_counter()
        program = lower(
            self.programs, self.shapes, self.model, key, *abstract_arrays(self.model, self.shapes)
        ).compile()
        seconds = time.perf_counter() - started
        self.num_compilations += 1
        log.debug("compiled %s in %.2f s", key, seconds)
        if self._warm:
            self.num_compilations_after_warmup += 1
            log.warning("compiled %s in %.2f s after warm-up: a defect, please report", key, seconds)
        return program

    def prepare(self) -> None:
        """Begin to compile, in threads, what the first short request needs."""
        tokens, rows = self.shapes.token_buckets[0], self.shapes.row_buckets[0]
        self._submit(("admit", 0, True))
        self._submit(("ragged", tokens, True))
        for name in self.shapes.sampling_programs:
            self._submit((name, rows, not self.shapes.deterministic))

    def warm_up(self, *, sampling: bool = True, scoring: bool = False, tiers: bool = False) -> None:
        """Compile every program there is, in threads; afterwards a compilation is a defect.

        Args:
            sampling: also the programs of requests that are not plainly greedy.
            scoring: also those of embeddings and prompt logprobs.
            tiers: also those that move pages off the device and back.
        """
        if self.leader is not None:
            self.leader.send(encode(("warm_up", sampling + 2 * scoring, True), ()))
        keys: list[Key] = [("admit", 0, True), *(("ragged", t, True) for t in self.shapes.token_buckets)]
        variants = (False,) if self.shapes.deterministic else (True, False) if sampling else (True,)
        for greedy in variants:
            keys += [(name, r, greedy) for r in self.shapes.row_buckets for name in self.shapes.sampling_programs]
        if scoring:
            keys += [(name, t, True) for t in self.scoring_buckets for name in ("hidden", "score", "pool")]
        keys += [(name, MOVE_BATCH, True) for name in (MOVES if tiers else ("copy",))]
        for future in [self._submit(key) for key in keys]:
            future.result()
        self._warm = True

    def block_until_ready(self) -> None:
        """Wait for everything dispatched so far."""
        jax.block_until_ready((self._pages, self._state))


def _padded(pages: Sequence[int]) -> np.ndarray:
    return np.array([*pages, *[0] * (MOVE_BATCH - len(pages))], np.int32)


def make_programs(model: AbstractModel, shapes: RunnerShapes) -> Programs:
    """The step functions of one model."""
    return Programs(
        cfg=model.cfg,
        graph=model.graph,
        params_tree=jax.tree.structure(model.state),
        placement=model.placement,
        residual_dtype=shapes.residual_dtype,
        max_steps=shapes.max_decode_steps,
        packed=model.packed_dims(),
        # Deterministic iterations have a tile for every decode.
        backend=dataclasses.replace(shapes.attention, query_tile=16) if shapes.deterministic else shapes.attention,
    )


def lower(
    programs: Programs, shapes: RunnerShapes, model: AbstractModel, key: Key, params: Any, pages: Any, state: Any
) -> Any:
    """Lower one program; `params`, `pages` and `state` may be arrays or shapes with shardings."""
    name, bucket, greedy = key
    if name in MOVES:
        return lower_move(name, pages)
    whole = model.placement.replicated
    paged = jax.tree.map(lambda leaf: leaf.sharding, _abstract_pages(model, shapes))
    replicas, vocab_size = shapes.num_replicas, model.cfg.vocab_size
    rows = batches.row_batch([], bucket, shapes.spare_slot, vocab_size, replicas)
    if not greedy:
        rows = dataclasses.replace(rows, sampling=batches.sampling_rows([], replicas * bucket, vocab_size))

    def host(arguments: Any) -> Any:
        """What comes from the host comes whole to every device; else the compiler would choose a cut."""
        if whole.mesh.size == 1:
            return arguments
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype, sharding=whole), arguments)

    if name == "admit":
        jitted = jax.jit(programs.admit, donate_argnums=0, out_shardings=whole)
        return jitted.lower(state, *host((np.int32(0), np.zeros(shapes.max_model_len, np.int32))))
    if name in ("ragged", "hidden"):
        jitted = jax.jit(programs.ragged_step, donate_argnums=1, out_shardings=(whole, paged))
        empty = batches.ragged_batch(IterationPlan([]), bucket, shapes.row_buckets[-1], shapes.pages_per_row, replicas)
        if name == "hidden":
            empty = dataclasses.replace(empty, sample_at=np.zeros(bucket, np.int32))
        return jitted.lower(params, pages, state, host(empty))
    if name in ("score", "pool"):
        hidden = jax.ShapeDtypeStruct((bucket, model.cfg.hidden_size), shapes.residual_dtype, sharding=whole)
        function, dtype = (programs.score, np.int32) if name == "score" else (programs.pool, np.float32)
        return jax.jit(function, out_shardings=whole).lower(params, hidden, host(np.zeros(bucket, dtype)))
    if name == "sample":
        jitted = jax.jit(programs.sample_step, donate_argnums=2, out_shardings=whole)
        width = model.cfg.hidden_size
        hidden = jax.ShapeDtypeStruct((replicas * shapes.row_buckets[-1], width), shapes.residual_dtype, sharding=whole)
        return jitted.lower(params, hidden, state, host(rows))
    assert name == "decode", name
    jitted = jax.jit(programs.decode_loop, donate_argnums=(1, 2), out_shardings=(whole, paged, whole))
    table = np.zeros((replicas * bucket, shapes.pages_per_row), np.int32)
    return jitted.lower(params, pages, state, *host((rows, table, np.int32(1))))


def abstract_arrays(model: AbstractModel, shapes: RunnerShapes) -> tuple[Any, Any, Any]:
    """Parameter leaves, pages and state as shapes with shardings: enough to compile without any weights."""

    def shaped(variable: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)

    state = jax.eval_shape(functools.partial(_zero_state, shapes))
    whole = model.placement.replicated
    return model.abstract_parameters(), _abstract_pages(model, shapes), jax.tree.map(lambda s: shaped(s, whole), state)


def _abstract_pages(model: AbstractModel, shapes: RunnerShapes) -> list[Any]:
    return [shapes.page_layout(model.kv_copies).abstract(model.cfg, model.placement)] * model.cfg.num_layers


def _zero_state(shapes: RunnerShapes) -> SlotState:
    slots = shapes.spare_slot + 1
    return SlotState(jnp.zeros((slots, shapes.max_model_len), jnp.int32), jnp.zeros(slots, jnp.bool))


def _empty_state(shapes: RunnerShapes, model: AbstractModel) -> SlotState:
    return jax.jit(functools.partial(_zero_state, shapes), out_shardings=model.placement.replicated)()
