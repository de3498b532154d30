"""Drafts made on the host: what must come, what came before, and no more than is allowed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.guesses import Guess, guess, look_up
from jaxllm.scheduling.request import Request
from tests.runner.test_prompt_lookup import naive


class Only:
    """Allows one sequence, of which it says the first `num_forced` tokens, and ends after it."""

    is_fixed, error = False, None

    def __init__(self, sequence: Sequence[int], num_forced: int = 0):
        self._left, self._num_forced = list(sequence), num_forced
        self.finished = not self._left

    def accept(self, token: int) -> None:
        if token != self._left.pop(0):
            self.error = "not this one"
        self.finished = not self._left

    def fill_mask(self, words: Any) -> None:
        raise AssertionError("nobody samples here")

    def forced(self) -> Sequence[int]:
        return self._left[: self._num_forced]

    def copy(self) -> Only:
        return Only(self._left, self._num_forced)

    def rewind(self, tokens: Sequence[int]) -> None:
        raise AssertionError("nobody goes back here")


def asked(tokens: list[int], constraint: Only, stop_ids: frozenset[int] = frozenset()) -> Request:
    return Request("one", tokens, SamplingParams(), limit=99, constraint=constraint, stop_ids=stop_ids)


def test_look_up_finds_what_the_plain_search_finds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        # Ids whose bytes look alike at other offsets.
        tokens = [rng.choice([0, 1, 256, 65536]) for _ in range(rng.randrange(1, 40))]
        for shortest, longest in ((1, 1), (1, 4), (3, 5)):
            assert look_up(tokens, 5, shortest, longest) == naive(tokens, 5, shortest, longest)


def test_what_must_come_is_guessed_first_then_what_came_before_as_far_as_it_is_allowed() -> None:
    sizes = {"shortest": 1, "longest": 3}
    known = [1, 2, 3, 4, 5, 9]
    assert guess(asked(known, Only([1, 2, 3, 4, 5, 6], 2)), 4, **sizes) == Guess((1, 2, 3, 4), 2)
    assert guess(asked(known, Only([1, 2, 3, 7], 2)), 4, **sizes) == Guess((1, 2, 3), 2)
    assert guess(asked(known, Only([1, 2, 3], 3)), 2, **sizes) == Guess((1, 2), 2)
    assert guess(asked(known, Only([1, 2], 2)), 4, **sizes) == Guess((1,), 1), "the second ends the answer"
    assert guess(asked([*known, 1], Only([7, 8])), 4, **sizes) == Guess(), "what came before is not allowed"


def test_no_stop_token_is_guessed() -> None:
    known = [1, 2, 3, 0, 1]
    assert guess(asked(known, Only([2, 3, 0, 1]), frozenset({0})), 4, shortest=1, longest=3) == Guess((2, 3), 0)
