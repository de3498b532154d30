"""The model runner: owns the device arrays, and turns plans into dispatched programs.

`IterationPlan` -> `InFlight` at once (nothing is waited for) -> tokens when read. What is dispatched is laid out in
`batch`, what each program is stands in `programs`; here they are executed. Knows nothing of text, users or scheduling
policy.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.kv.host_memory import HostMemory, LocalPages
from jaxllm.kv.memory import KVMemory
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.runner.batch import Dispatch, lay_out, lay_out_pass, padded_pages
from jaxllm.runner.compiler import Compiler
from jaxllm.runner.in_flight import InFlight
from jaxllm.runner.messages import Message, Reset, Stop, Structure, WarmUp, decode, encode
from jaxllm.runner.programs import (
    PROGRAMS,
    SAMPLING,
    SCORING,
    TIERS,
    DeviceState,
    empty_adapters,
    make_steps,
    zero_slots,
)
from jaxllm.runner.sampler import Sampled
from jaxllm.runner.shapes import RunnerShapes, make_memory
from jaxllm.runner.shared_pages import SharedPages, Shelf
from jaxllm.scheduling.plan import IterationPlan
from jaxllm.telemetry.drafts import DraftPauses
from jaxllm.weights.abstract import AbstractModel


class ModelRunner:
    """Parameters, pages (those of `memory`) and slots on the mesh, and the programs that run on them.

    `compiler` can begin while the weights are still being read; `start` takes the weights and allocates the rest.
    `announce` is given each message to the processes that follow this one, if there are any. A `compiler` of another
    runner of the same shapes shares its programs.
    """

    def __init__(
        self,
        model: AbstractModel,
        shapes: RunnerShapes,
        memory: KVMemory | None = None,
        announce: Callable[[bytes], None] | None = None,
        compiler: Compiler | None = None,
    ):
        self.model = model
        self.shapes = shapes
        self.memory = memory or make_memory(model, shapes)
        self.steps = make_steps(model, shapes)
        self.compiler = compiler or Compiler(model, shapes)
        self.state = DeviceState(self.memory)
        self._announce = announce
        self.draft_price: Callable[[int], float] = lambda _: 0.0  # see `Drafting`; for a number of rows
        self.draft_pauses = DraftPauses()

    def start(self, params: Any) -> None:
        """Take the parameters and allocate pages, slots and the adapters' slots."""
        self.state.params = jax.tree.leaves(params)
        self._allocate()

    def reset(self) -> None:
        """Empty pages and all slots, after a failed iteration took the donated ones with it."""
        self._tell(Reset())
        self._allocate()

    def _allocate(self) -> None:
        self.state = DeviceState(self.memory, params=self.state.params)
        self.memory.allocate()
        empty = functools.partial(zero_slots, self.shapes)
        self.state.slots = jax.jit(empty, out_shardings=self.model.placement.replicated)()
        self.state.adapters = empty_adapters(self.model, self.shapes)

    def now(self) -> float:
        """See `Runner`."""
        return time.perf_counter()

    def dispatch(self, plan: IterationPlan) -> InFlight:
        """Put one plan's work on the device queue."""
        started = self.now()
        layout = lay_out(plan, self.shapes, self.draft_price, drafts=not self.draft_pauses.begin(plan))
        sampled = self._execute_all(layout.dispatches)
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        result = self.state.hidden if sampled is None else sampled
        return InFlight(plan, layout.sampling, layout.rows, result, started)

    def hidden_states(self, plan: IterationPlan) -> jax.Array:
        """Forward one chunk of a request in the spare slot of the first replica; every token's hidden state `[T, D]`.

        For scoring passes, which sample nothing: T is the token bucket, rows past the chunk mean nothing. `score` and
        `pool` say more of the last such pass.
        """
        self._execute_all(lay_out_pass(plan, self.shapes))
        return self.state.scored

    def score(self, targets_T: np.ndarray) -> Sampled:
        """See `Steps.score`; of the last `hidden_states`."""
        return self.execute(Dispatch("score", len(targets_T), (targets_T,)))

    def pool(self, weights_T: np.ndarray) -> jax.Array:
        """See `Steps.pool`; of the last `hidden_states`."""
        return self.execute(Dispatch("pool", len(weights_T), (weights_T,)))

    def take_pages(self, pages: Sequence[int]) -> list[Any]:
        """A copy of each page as it is after what was dispatched so far: slabs, see `jaxllm.kv.page_programs`.

        Other processes are not told; neither are they of `put_pages`. `shared_pages` does.
        """
        slabs: list[Any] = []
        for i in range(0, len(pages), MOVE_BATCH):
            batch = pages[i : i + MOVE_BATCH]
            slabs += self._run(Dispatch("take", MOVE_BATCH, (padded_pages(batch),)))[: len(batch)]
        return slabs

    def put_pages(self, pages: Sequence[int], slabs: Sequence[Any]) -> None:
        """Write slabs into pages, before what is dispatched next."""
        for i in range(0, len(pages), MOVE_BATCH):
            batch = list(slabs[i : i + MOVE_BATCH])
            batch += batch[:1] * (MOVE_BATCH - len(batch))
            self._run(Dispatch("put", MOVE_BATCH, (padded_pages(pages[i : i + MOVE_BATCH]), batch)))

    def _execute_all(self, dispatches: Iterable[Dispatch]) -> Any:
        output = None
        for dispatch in dispatches:
            output = self.execute(dispatch)
        return output

    def execute(self, dispatch: Dispatch) -> Any:
        """Run one program on what lies on the devices and these host arrays: the same on every process."""
        self._tell(dispatch)
        return self._run(dispatch)

    def _run(self, dispatch: Dispatch) -> Any:
        program, state = PROGRAMS[dispatch.program], self.state
        compiled = self.compiler.program((dispatch.program, dispatch.bucket))
        results = compiled(*(getattr(state, field) for field in program.reads), *dispatch.inputs)
        for field, value in zip(program.writes, results, strict=False):
            setattr(state, field, value)
        return None if program.output is None else results[-1]

    def _tell(self, message: Message) -> None:
        if self._announce is not None:
            self._announce(encode(message))

    def obey(self, data: bytes) -> bool:
        """Do what the runner of process 0 did (see `jaxllm.runner.processes`). False: it has stopped."""
        message = decode(data, self._structure)
        if isinstance(message, Dispatch):
            self._run(message)
        elif isinstance(message, WarmUp):
            self.compiler.warm_up(message.groups)
        elif isinstance(message, Reset):
            self._allocate()
        elif not isinstance(message, Stop):
            self._shelf.obey(message)
        return not isinstance(message, Stop)

    @functools.cached_property
    def _shelf(self) -> Shelf:
        return Shelf(self, HostMemory(self.memory.slab()))

    def host_pages(self) -> LocalPages | SharedPages:
        """The pages as whoever moves them to the host and back sees them."""
        memory = HostMemory(self.memory.slab())
        return LocalPages(self, memory) if self._announce is None else SharedPages(self, memory, self._announce)

    @functools.cached_property
    def _structure(self) -> Structure:
        @functools.cache
        def structure(name: str) -> Any:
            return jax.tree.structure(PROGRAMS[name].inputs(self.model, self.shapes, 1))

        return structure

    def warm_up(
        self,
        *,
        sampling: bool = True,
        scoring: bool = False,
        tiers: bool = False,
        on_compiled: Callable[[int, int], None] | None = None,
        beside_requests: bool = False,
    ) -> None:
        """Compile every program there is, in threads; afterwards a compilation is a defect.

        Args:
            sampling: also the programs of requests that are not plainly greedy.
            scoring: also those of embeddings and prompt logprobs.
            tiers: also those that move pages off the device and back.
            on_compiled: told how many of how many are done.
            beside_requests: from a thread beside the one that dispatches; where other processes follow, these are told
                nothing.
        """
        wanted = {SAMPLING: sampling, SCORING: scoring, TIERS: tiers}
        groups = tuple(group for group, is_wanted in wanted.items() if is_wanted)
        if not beside_requests:
            self._tell(WarmUp(groups))
        self.compiler.warm_up(groups, on_compiled, beside_requests=beside_requests)

    @property
    def is_alone(self) -> bool:
        """Whether no other process follows this one."""
        return self._announce is None

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
        jax.block_until_ready((self.state.pages, self.state.slots))
