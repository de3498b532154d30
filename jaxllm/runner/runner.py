"""The model runner: owns the device arrays, and turns plans into dispatched programs.

`IterationPlan` -> `InFlight` at once (nothing is waited for) -> tokens when read. Knows nothing of text, users or
scheduling policy.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.kv.memory import allocate_pages
from jaxllm.kv.page_programs import MOVE_BATCH, device_bytes, slab_struct
from jaxllm.runner import batch as batches
from jaxllm.runner.compiler import Compiler
from jaxllm.runner.in_flight import InFlight
from jaxllm.runner.messages import decode, encode
from jaxllm.runner.programs import Key, abstract_pages, make_programs, zero_state
from jaxllm.runner.sampler import Sampled
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.scheduling.scheduler import Chunk, IterationPlan
from jaxllm.weights.loader import AbstractModel


class ModelRunner:
    """Parameters, pages and slot state on the mesh, and the programs that run on them.

    `compiler` can begin while the weights are still being read; `start` takes the weights and allocates the rest.
    `announce` is given each message to the processes that follow this one, if there are any.
    """

    def __init__(self, model: AbstractModel, shapes: RunnerShapes, announce: Callable[[bytes], None] | None = None):
        self.model = model
        self.shapes = shapes
        self.programs = make_programs(model, shapes)
        self.compiler = Compiler(model, shapes)
        self._params: list[jax.Array] = []
        self._pages: list[Any] = []  # per layer an array, or a pytree of page-major arrays
        self._state: Any = None
        self._hidden: Any = None  # what the last ragged step left
        self._announce = announce
        self._no_masks: dict[int, jax.Array] = {}

    def start(self, params: Any) -> None:
        """Take the parameters and allocate pages and state."""
        self._params = jax.tree.leaves(params)
        self._allocate()

    def reset(self) -> None:
        """Empty pages and slots, after a failed iteration took the donated ones with it."""
        if self._announce is not None:
            self._announce(encode(("reset", 0, True), ()))
        self._allocate()

    def _allocate(self) -> None:
        self._pages, self._state, self._hidden = [], None, None  # free the old ones first
        model = self.model
        self._pages = allocate_pages(
            model.cfg.num_layers, self.shapes.page_layout(model.cfg.cache_row, model.kv_copies), model.placement
        )
        empty_state = functools.partial(zero_state, self.shapes)
        self._state = jax.jit(empty_state, out_shardings=model.placement.replicated)()

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
        bucket = batches.bucket_for(plan.num_tokens, self.shapes.scoring_buckets)
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
        """A copy of each page as it is after what was dispatched so far: slabs, see `jaxllm.kv.page_programs`."""
        slabs: list[Any] = []
        for i in range(0, len(pages), MOVE_BATCH):
            batch = pages[i : i + MOVE_BATCH]
            slabs += self.compiler.program(("take", MOVE_BATCH, True))(self._pages, _padded(batch))[: len(batch)]
        return slabs

    def put_pages(self, pages: Sequence[int], slabs: Sequence[Any]) -> None:
        """Write slabs into pages, before what is dispatched next."""
        for i in range(0, len(pages), MOVE_BATCH):
            batch, index_G = list(slabs[i : i + MOVE_BATCH]), _padded(pages[i : i + MOVE_BATCH])
            batch += batch[:1] * (MOVE_BATCH - len(batch))
            self._pages = self.compiler.program(("put", MOVE_BATCH, True))(self._pages, index_G, batch)

    @functools.cached_property
    def page_bytes(self) -> int:
        """Of one page over all layers and the devices that hold it."""
        pages = abstract_pages(self.model, self.shapes)
        return device_bytes(pages) // (self.shapes.num_pages * self.shapes.num_replicas)

    def slab(self) -> Any:
        """Shapes and shardings of one page over all layers."""
        return slab_struct(abstract_pages(self.model, self.shapes))

    def _decode(self, plan: IterationPlan) -> Sampled:
        bucket, rows = self._rows(plan.chunks)
        table = batches.page_tables(plan.chunks, bucket, self.shapes.pages_per_row, self.shapes.num_replicas)
        return self.execute(("decode", bucket, rows.sampling is None), rows, table, np.int32(plan.num_steps))

    def execute(self, key: Key, *inputs: Any) -> Any:
        """Dispatch one program on what lies on the devices and these host arrays: the same on every process."""
        if self._announce is not None:
            self._announce(encode(key, inputs))
        program, name = self.compiler.program(key), key[0]
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
        """Do what the runner of process 0 did (see `jaxllm.runner.processes`). False: it has stopped."""
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

    def warm_up(self, *, sampling: bool = True, scoring: bool = False, tiers: bool = False) -> None:
        """Compile every program there is, in threads; afterwards a compilation is a defect.

        Args:
            sampling: also the programs of requests that are not plainly greedy.
            scoring: also those of embeddings and prompt logprobs.
            tiers: also those that move pages off the device and back.
        """
        if self._announce is not None:
            self._announce(encode(("warm_up", sampling + 2 * scoring, True), ()))
        self.compiler.warm_up(sampling=sampling, scoring=scoring, tiers=tiers)

    @property
    def num_compilations(self) -> int:
        """See `Compiler`."""
        return self.compiler.num_compilations

    @property
    def num_compilations_after_warmup(self) -> int:
        """See `Compiler`."""
        return self.compiler.num_compilations_after_warmup

    def block_until_ready(self) -> None:
        """Wait for everything dispatched so far."""
        jax.block_until_ready((self._pages, self._state))


def _padded(pages: Sequence[int]) -> np.ndarray:
    return np.array([*pages, *[0] * (MOVE_BATCH - len(pages))], np.int32)
