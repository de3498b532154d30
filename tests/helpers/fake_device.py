"""A device that only remembers: it runs iteration plans on a dictionary of page slots instead of arrays.

It plays by the rules of the real one (plans run in order, every write of an iteration comes before its reads,
rows that sampled a stop token stay idle) and asserts what the real one cannot: that every token a request attends
to is the request's own.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence

from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Request

NextToken = Callable[[Sequence[int]], int]


def next_token(tokens: Sequence[int]) -> int:
    """A stand-in for the model: one token in 0..99 that depends on the whole sequence."""
    return hashlib.sha256(str(list(tokens)).encode()).digest()[0] % 100


def _link(before: int, token: int) -> int:
    return hash((before, token))


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

    def __init__(self, page_size: int, window: int | None = None):
        self.page_size = page_size
        self.window = window
        self.memory: dict[tuple[int, int], int] = {}
        self.history: dict[int, list[int]] = {}
        self.chain: dict[int, list[int]] = {}  # what a position's keys depend on: its token and all before
        self.done: set[int] = set()
        self.num_computed = 0
        self.rng = random.Random(0)  # how many drafts are right

    def read_page(self, page: int) -> dict[int, int]:
        """What a page holds, by offset."""
        slots = [(page, offset) for offset in range(self.page_size)]
        return {slot[1]: self.memory[slot] for slot in slots if slot in self.memory}

    def write_page(self, page: int, content: dict[int, int]) -> None:
        """Replace what a page holds."""
        for offset in range(self.page_size):
            self.memory.pop((page, offset), None)
        self.memory.update({(page, offset): token for offset, token in content.items()})

    def run(self, plan: IterationPlan) -> list[tuple[Chunk, list[int]]]:
        copied = [(target, self.read_page(source)) for source, target in plan.copies]
        for target, content in copied:
            self.write_page(target, content)
        for request in plan.admitted:
            self.history[request.slot] = list(request.token_ids)
            self.chain[request.slot] = list(itertools.accumulate(request.token_ids, _link, initial=0))[1:]
            self.done.discard(request.slot)
        sampled: dict[int, list[int]] = {id(chunk): [] for chunk in plan.chunks}
        for step in range(plan.num_steps):
            rows = [c for c in plan.chunks if self._is_active(c, step)]
            starts = [self._start(c, step) for c in rows]
            for chunk, start in zip(rows, starts, strict=True):
                self._write(chunk.request, start, chunk.count)
            for chunk, start in zip(rows, starts, strict=True):
                self._read(chunk.request, start, chunk.count)
                if chunk.num_samples:
                    sampled[id(chunk)].append(self._sample(chunk.request))
                if chunk.num_drafts:
                    sampled[id(chunk)] += self._verify(chunk, start + 1)
        return [(chunk, sampled[id(chunk)]) for chunk in plan.chunks if chunk.num_samples]

    def _is_active(self, chunk: Chunk, step: int) -> bool:
        slot = chunk.request.slot
        if chunk.num_samples and len(self.history[slot]) >= chunk.request.limit:
            return False
        return step < max(1, chunk.num_samples) and not (chunk.count == 1 and slot in self.done)

    def _start(self, chunk: Chunk, step: int) -> int:
        """Where the chunk begins: what samples ends where the sequence does, which the host knows only at most."""
        return len(self.history[chunk.request.slot]) - chunk.count if chunk.num_samples else chunk.start + step

    def _verify(self, chunk: Chunk, position: int) -> list[int]:
        """As many drafts as happen to be right; all of them are written, wrong ones too."""
        request, history, right = chunk.request, self.history[chunk.request.slot], []
        num_drafts = min(chunk.num_drafts, request.limit - len(history))
        good = self.rng.randint(0, num_drafts)
        for i in range(num_drafts):
            place = self._place(request, position + i)
            if i < good and request.slot not in self.done:
                self.memory[place] = self.chain[request.slot][position + i]
                self._read(request, position + i, 1)
                right.append(self._sample(request))
            else:
                self.memory[place] = -1
        return right

    def _place(self, request: Request, position: int) -> tuple[int, int]:
        page = request.pages[position // self.page_size]
        assert page != 0, "page 0 is reserved for padding"
        return page, position % self.page_size

    def _write(self, request: Request, start: int, count: int) -> None:
        for position in range(start, start + count):
            self.memory[self._place(request, position)] = self.chain[request.slot][position]
            self.num_computed += 1

    def _read(self, request: Request, start: int, count: int) -> None:
        first = 0 if self.window is None else max(0, start + 1 - self.window)
        seen = [self.memory[self._place(request, position)] for position in range(first, start + count)]
        assert seen == self.chain[request.slot][first : start + count], f"{request.request_id} attends to another's"

    def _sample(self, request: Request) -> int:
        history = self.history[request.slot]
        history.append(next_token(history))
        self.chain[request.slot].append(_link(self.chain[request.slot][-1], history[-1]))
        if history[-1] in request.stop_ids:
            self.done.add(request.slot)
        return history[-1]
