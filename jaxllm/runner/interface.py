"""What an engine's loop asks of whoever computes: a model on devices, a model of devices, or a test's stand-in.

Plans in, tokens out, and the clock by which that happens. Knows nothing of how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from jaxllm.scheduling.plan import Chunk, IterationPlan

if TYPE_CHECKING:
    from jaxllm.config import ModelConfig
    from jaxllm.kv.mover import Mover
    from jaxllm.runner.sampler import Sampled
    from jaxllm.runner.shapes import RunnerShapes
    from jaxllm.scheduling.page_pool import PagePool
    from jaxllm.scheduling.tiers import Tiers
    from jaxllm.telemetry.drafts import LoopDrafts


class Work(Protocol):
    """A plan that was dispatched and not yet read."""

    @property
    def plan(self) -> IterationPlan: ...

    @property
    def dispatched(self) -> float:
        """When, in seconds of the runner's clock."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether `read` need not wait."""
        ...

    def read(self) -> Sequence[tuple[Chunk, Sampled]]:
        """Wait for it, and return each sampling chunk with what it sampled."""
        ...

    def drafts(self) -> LoopDrafts | None:
        """Of a decode loop that may have drafted: what became of that. After `read`."""
        ...


class Memory(Protocol):
    """The KV cache as a loop sees it: see `KVMemory`."""

    @property
    def pools(self) -> list[PagePool]: ...
    @property
    def tiers(self) -> Tiers | None: ...
    @property
    def mover(self) -> Mover | None: ...
    @property
    def page_bytes(self) -> int: ...


class Model(Protocol):
    """Of the model a loop knows the configuration."""

    @property
    def cfg(self) -> ModelConfig: ...


class Runner(Protocol):
    """See `ModelRunner`, which computes. `jaxllm.simulation` has one that only says how long it would take."""

    @property
    def model(self) -> Model: ...
    @property
    def shapes(self) -> RunnerShapes: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def num_compilations(self) -> int: ...
    @property
    def num_compilations_after_warmup(self) -> int: ...

    def now(self) -> float:
        """Seconds, by the clock that iterations are timed with."""
        ...

    def dispatch(self, plan: IterationPlan) -> Work:
        """Put one plan's work on the device queue; wait for nothing."""
        ...

    def reset(self) -> None:
        """Forget what the device holds, weights excepted."""
        ...
