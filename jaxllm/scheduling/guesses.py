"""Drafts made on the host, for requests whose next token depends on the tokens before it (a grammar).

What such a request may sample at a position is known only where the tokens before it are, so its drafts are chosen
where the constraint lives: first what must come, then what followed the same tokens before, as far as it is allowed.
Requests in, token ids out; plain Python.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.scheduling.request import Constraint, Request


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may come next, one after the other; the first `num_sure` of them must."""

    tokens: tuple[int, ...] = ()
    num_sure: int = 0


def guess(request: Request, most: int, *, shortest: int, longest: int) -> Guess:
    """Up to `most` drafts that the request's constraint allows; `shortest`, `longest`: see `look_up`.

    For a request of which all is read but what is being planned.
    """
    assert request.constraint is not None
    forced = request.constraint.forced()[:most]
    tokens = [*forced, *look_up([*request.token_ids, *forced], most - len(forced), shortest, longest)]
    allowed = _allowed(request.constraint, tokens, request.stop_ids)
    return Guess(tuple(tokens[:allowed]), min(allowed, len(forced)))


def look_up(token_ids: Sequence[int], most: int, shortest: int, longest: int) -> list[int]:
    """What followed the last tokens where they stood before, as `jaxllm.runner.prompt_lookup` finds it.

    The longest match of `shortest` to `longest` tokens, among equals the latest; its period goes on.
    """
    known = array("q", token_ids)
    width, data = known.itemsize, known.tobytes()
    for size in range(min(longest, len(known) - 1), shortest - 1, -1) if most > 0 else ():
        suffix, end = data[-size * width :], len(data) - width
        while (at := data.rfind(suffix, 0, end)) >= 0:
            if at % width == 0:
                after = known[at // width + size :]
                return [after[i % len(after)] for i in range(most)]
            end = at + len(suffix) - 1  # bytes of two tokens that look like these
    return []


def _allowed(constraint: Constraint, tokens: Sequence[int], stop_ids: frozenset[int]) -> int:
    """How many of these the constraint takes, one after the other; none that ends the answer.

    Nothing may be sampled after the end: what ends it is sampled after the last draft.
    """
    ahead = constraint.copy()
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return i
        ahead.accept(token)
        if ahead.error is not None or ahead.finished:
            return i
    return len(tokens)
