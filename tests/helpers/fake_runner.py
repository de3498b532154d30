"""A runner without arrays: the fake device behind the interface of `ModelRunner`, so that an engine costs nothing.

What it samples is a function of the sequence alone (`next_token`, or the first allowed token after it); a sequence that
holds `POISON` gives no finite numbers every fourth token. It can fail on order, and then has lost what it held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config.sampling import MAX_LOGPROBS
from jaxllm.runner.sampler import NOT_FINITE, Sampled
from jaxllm.runner.shapes import RunnerShapes, make_memory
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Request
from tests.helpers.fake_device import FakeDevice, next_token

POISON = 255


def likeliest(tokens: Sequence[int], first: int) -> tuple[list[int], list[float]]:
    """The best tokens after a sequence, and their log-probabilities; `first` leads."""
    ids = [first, *(t for i in range(1, MAX_LOGPROBS + 1) if (t := (first + 7 * i) % 100) != first)][:MAX_LOGPROBS]
    slope = 0.1 + 0.01 * (sum(tokens) % 17)
    return ids, [-0.2 - slope * i for i in range(len(ids))]


class _Device(FakeDevice):
    """Samples with constraints, and breaks down over poison."""

    def _sample(self, request: Request) -> int:
        history = self.history[request.slot]
        if POISON in history and len(history) % 4 == 0:
            self.done.add(request.slot)
            return NOT_FINITE
        token = self._allowed(request, next_token(history))
        self.entries[id(request)].append(likeliest(history, token))
        history.append(token)
        self.chain[request.slot].append(hash((self.chain[request.slot][-1], token)))
        if token in request.stop_ids:
            self.done.add(request.slot)
        return token

    def _allowed(self, request: Request, wanted: int) -> int:
        if request.constraint is None:
            return wanted
        words = np.zeros(9, np.int32)
        request.constraint.fill_mask(words)
        bits = [token for token in range(258) if words[token // 32] >> (token % 32) & 1]
        return next((token for token in bits if token >= wanted), bits[0])


@dataclass(frozen=True)
class _InFlight:
    plan: IterationPlan
    dispatched: float
    result: list[tuple[Chunk, Sampled]]
    trip: Callable[[], None]

    def read(self) -> list[tuple[Chunk, Sampled]]:
        self.trip()
        return self.result

    def drafts(self) -> None:
        return None


class FakeRunner:
    """See the module. `fail_in` counts calls of the device down to the one that raises."""

    def __init__(self, model: Any, shapes: RunnerShapes):
        self.model, self.shapes, self.memory = model, shapes, make_memory(model, shapes)
        self.num_compilations = self.num_compilations_after_warmup = 0
        self.fail_in = self.fail_resets = 0
        self.num_failures = 0
        self.reset()

    def reset(self) -> None:
        """Empty pages and slots."""
        if self.fail_resets:
            self.fail_resets -= 1
            raise RuntimeError("no memory for the pages")
        self._device = _Device(self.shapes.page_size)
        self._device.entries = {}

    def now(self) -> float:
        return time.perf_counter()

    def dispatch(self, plan: IterationPlan) -> _InFlight:
        """Run a plan at once; it is read later."""
        self._trip()
        device = self._device
        device.entries = {id(chunk.request): [] for chunk in plan.chunks}
        results = device.run(plan)
        self._trip()
        sampled = [(chunk, self._sampled(tokens, device.entries[id(chunk.request)])) for chunk, tokens in results]
        return _InFlight(plan, self.now(), sampled, self._trip)

    def _sampled(self, tokens: list[int], entries: list[tuple[list[int], list[float]]]) -> Sampled:
        ids = np.array([ids for ids, _ in entries], np.int32)
        values = np.array([values for _, values in entries], np.float32)
        return Sampled(np.array(tokens, np.int32), values[:, 0] if len(entries) else values, ids, values)  # type: ignore[arg-type]

    def _trip(self) -> None:
        if not self.fail_in:
            return
        self.fail_in -= 1
        if not self.fail_in:
            self.num_failures += 1
            self._device.memory.clear()
            self._device.history.clear()
            raise RuntimeError("the device failed")

    def hidden_states(self, plan: IterationPlan) -> np.ndarray:
        """The chunk's tokens stand for their hidden states."""
        self._trip()
        (chunk,) = plan.chunks
        self._hidden = np.array(chunk.request.token_ids[chunk.start : chunk.start + chunk.count], np.int32)
        return self._hidden

    def score(self, targets_T: np.ndarray) -> Sampled:
        """As if each token's probability depended on itself and the one before."""
        hidden_TD = self._hidden
        values = -np.abs(hidden_TD - targets_T).astype(np.float32)
        values[hidden_TD == POISON] = np.nan
        tops = np.tile(np.arange(MAX_LOGPROBS, dtype=np.int32), (len(values), 1))
        return Sampled(targets_T, values, tops, np.zeros(tops.shape, np.float32))  # type: ignore[arg-type]

    def pool(self, weights_T: np.ndarray) -> np.ndarray:
        """Two numbers per token, weighted."""
        hidden_TD = self._hidden
        vector = np.stack([hidden_TD, hidden_TD**2]).astype(np.float32) @ weights_T[: len(hidden_TD)]
        return vector * np.nan if POISON in hidden_TD else vector
