"""How long each decode batch of a round runs: Aegaeon's quotas.

A round visits every batch once. While a batch runs it builds up slack, which the others use: a batch with step time `t`
makes `n = TBT / t` tokens in the time of one. Plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TBT_SECONDS = 0.1  # between tokens, as promised to clients
LONGEST_SECONDS = 4.0  # of one turn, where tokens may take as long as that
_LEAST_ALPHA = 0.5


@dataclass(frozen=True, slots=True)
class Quotas:
    """One round.

    Attributes:
        alpha: share of a token's time that the round needs; above 1 the promise cannot be kept.
        seconds: of each batch.
    """

    alpha: float
    seconds: tuple[float, ...]


def longest_turn(tbt: float) -> float:
    """Seconds that a turn may last: the paper's 4 at 100 ms between tokens, fewer where less is promised.

    Who waits for a first token waits for the turns of others. Where tokens are promised ten times as often, first
    tokens are as well; turns that did not shrink would last longer than these may take.
    """
    return LONGEST_SECONDS * min(1.0, tbt / TBT_SECONDS)


def quotas(
    step_seconds: Sequence[float], switch_seconds: float, *, tbt: float = TBT_SECONDS, longest: float | None = None
) -> Quotas:
    """The quotas of a round.

    Source: Aegaeon, section 4.3. With `n_i = TBT / t_i` and c seconds of switching:
    `alpha = max(c / (min n * longest) + sum 1/n_i, 0.5)`, `q_i = c / (n_i (alpha - sum 1/n_i))`.

    Args:
        step_seconds: of one decode step of each batch, above 0.
        switch_seconds: of all switches of the round; 0 where it has one model, and then quotas are as for very short
            switches.
        tbt: seconds between tokens that are promised.
        longest: seconds that a turn may last; default: `longest_turn`.
    """
    if not step_seconds:
        return Quotas(_LEAST_ALPHA, ())
    longest = longest_turn(tbt) if longest is None else longest
    steps = [tbt / seconds for seconds in step_seconds]
    used = sum(1 / n for n in steps)
    spare = _LEAST_ALPHA - used
    tokens = min(steps) * longest  # q_i n_i, as alpha leaves it; a light round of short switches makes do with less
    if switch_seconds and spare > 0:
        tokens = min(tokens, switch_seconds / spare)
    return Quotas(used + max(switch_seconds / (min(steps) * longest), spare), tuple(tokens / n for n in steps))
