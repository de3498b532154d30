"""A device that only remembers: it runs iteration plans on a dictionary of page slots instead of arrays.

It plays by the rules of the real one (plans run in order, every write of an iteration comes before its reads,
rows that sampled a stop token stay idle) and asserts what the real one cannot: that every token a request attends
to is the request's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from jaxllm.engine.request import Request
from jaxllm.engine.scheduler import Chunk, IterationPlan

NextToken = Callable[[Sequence[int]], int]


def next_token(tokens: Sequence[int]) -> int:
    """A stand-in for the model: one token in 0..99 that depends on the whole sequence."""
    return hashlib.sha256(str(list(tokens)).encode()).digest()[0] % 100


def naive_generate(prompt: Sequence[int], limit: int, stop_ids: frozenset[int]) -> list[int]:
    """What a request must end up with: append until a stop token or the limit."""
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids:
            break
    return tokens


class FakeDevice:
    """Runs plans; `run` returns what each sampling chunk sampled, as the real runner does when read."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.memory: dict[tuple[int, int], int] = {}
        self.history: dict[int, list[int]] = {}
        self.done: set[int] = set()
        self.num_computed = 0

    def run(self, plan: IterationPlan) -> list[tuple[Chunk, list[int]]]:
        for request in plan.admitted:
            self.history[request.slot] = list(request.token_ids)
            self.done.discard(request.slot)
        sampled: dict[int, list[int]] = {id(chunk): [] for chunk in plan.chunks}
        for step in range(plan.num_steps):
            rows = [c for c in plan.chunks if self._is_active(c, step)]
            for chunk in rows:
                self._write(chunk.request, chunk.start + step, chunk.count)
            for chunk in rows:
                self._read(chunk.request, chunk.start + step + chunk.count)
                if chunk.num_samples:
                    sampled[id(chunk)].append(self._sample(chunk.request))
        return [(chunk, sampled[id(chunk)]) for chunk in plan.chunks if chunk.num_samples]

    def _is_active(self, chunk: Chunk, step: int) -> bool:
        slot = chunk.request.slot
        return step < max(1, chunk.num_samples) and not (chunk.count == 1 and slot in self.done)

    def _place(self, request: Request, position: int) -> tuple[int, int]:
        page = request.pages[position // self.page_size]
        assert page != 0, "page 0 is reserved for padding"
        return page, position % self.page_size

    def _write(self, request: Request, start: int, count: int) -> None:
        for position in range(start, start + count):
            self.memory[self._place(request, position)] = self.history[request.slot][position]
            self.num_computed += 1

    def _read(self, request: Request, length: int) -> None:
        seen = [self.memory[self._place(request, position)] for position in range(length)]
        assert seen == self.history[request.slot][:length], f"{request.request_id} attends to another's tokens"

    def _sample(self, request: Request) -> int:
        history = self.history[request.slot]
        history.append(next_token(history))
        if history[-1] in request.stop_ids:
            self.done.add(request.slot)
        return history[-1]
