"""What drafts brought, and what verifying them costs: plain numbers about speculative decoding.

Counts of drafted and accepted tokens come from iterations that were read; the price of an iteration that verifies comes
from the cost model at first, and from the iterations' own times once there are some. Knows nothing of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxllm.roofline.cost_model import ModelCost
from jaxllm.scheduling.plan import Chunk, IterationPlan

_USUAL_RIDGE = 10.0  # FLOPs per byte at which a processor without a data sheet is taken to be as slow by either
_REACHED = 0.5  # share of a data sheet's ridge that matrix products of few rows reach
_LEAST, _MOST = 0.4, 2.0  # of the model's price, between which measured times may move it
_LEARNING = 0.3
_PATIENCE, _LONGEST_PAUSE = 8, 256  # iterations without any draft that was worth verifying; left out then, at most


@dataclass(frozen=True, slots=True)
class LoopDrafts:
    """What became of the drafts of one decode loop.

    Attributes:
        by_chunk: each sampling chunk with how many drafts were verified in each iteration, and how many accepted.
        num_rows: of the program, padding included.
        num_passes, num_verifying: iterations that ran; those of them that verified drafts.
    """

    by_chunk: Sequence[tuple[Chunk, list[int], list[int]]]
    num_rows: int
    num_passes: int
    num_verifying: int


@dataclass(slots=True)
class DraftTotals:
    """Sums since the engine started, under vLLM's names.

    Attributes:
        num_drafts: times that a request had drafts verified.
        num_draft_tokens, num_accepted_tokens: how many tokens these had, and how many of them were right.
        accepted_at: how often the first, second ... draft was right.
        num_iterations, num_verifying: of loops that may draft; those of them that verified drafts.
    """

    num_drafts: int = 0
    num_iterations: int = 0
    num_verifying: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def add(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Count what one request had in each iteration of a loop."""
        for num_drafted, num_accepted in zip(drafted, accepted, strict=True):
            self.num_drafts += num_drafted > 0
            self.num_draft_tokens += num_drafted
            self.num_accepted_tokens += num_accepted
            for position in range(num_accepted):
                self.accepted_at[position] += 1

    @property
    def acceptance_rate(self) -> float:
        """Share of drafted tokens that were right."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that an iteration with drafts yields per request, the one that is sampled in any case included."""
        return 1 + (self.num_accepted_tokens / self.num_drafts if self.num_drafts else 0.0)


def verifying_ratio(cost: ModelCost, rows: int, num_drafts: int, ridge: float | None) -> float:
    """What an iteration with drafts in every row costs, in plain iterations of as many rows.

    Memory and arithmetic are taken to add up: at these sizes neither hides the other well.
    """
    reached = _REACHED * ridge if ridge else _USUAL_RIDGE

    def weight(tokens: int) -> float:
        work = cost.cost(tokens=tokens, samples=tokens, pairs=0, keys=0)
        return work.bytes + work.flops / reached

    return weight(rows * (1 + num_drafts)) / weight(rows)


class DraftPrice:
    """What it costs to verify, per number of rows: `price(rows)` is the excess over a plain iteration, in plain ones.

    Args:
        cost: of the model.
        num_drafts: of each row.
        ridge: FLOPs per byte of the device, None where there is no data sheet.
    """

    def __init__(self, cost: ModelCost, num_drafts: int, ridge: float | None):
        self._cost, self._num_drafts, self._ridge = cost, num_drafts, ridge
        self._seconds: dict[int, tuple[float, float]] = {}  # of a plain iteration, of a verifying one

    def __call__(self, rows: int) -> float:
        """Of an iteration with so many rows."""
        model = verifying_ratio(self._cost, rows, self._num_drafts, self._ridge)
        if rows not in self._seconds:
            return model - 1
        plain, verifying = self._seconds[rows]
        return min(max(verifying / plain - 1, _LEAST * (model - 1)), _MOST * (model - 1))

    def observe(self, rows: int, num_plain: int, num_verifying: int, seconds: float) -> None:
        """A loop of these iterations took so long: move both times towards what explains it (normalised LMS)."""
        if not num_plain + num_verifying or seconds <= 0:
            return
        if rows not in self._seconds:
            ratio = 1 + self(rows)
            plain = seconds / (num_plain + num_verifying * ratio)
            self._seconds[rows] = plain, plain * ratio
            return
        plain, verifying = self._seconds[rows]
        error = seconds - num_plain * plain - num_verifying * verifying
        step = _LEARNING * error / (num_plain**2 + num_verifying**2)
        floor = 0.1 * min(plain, verifying)
        self._seconds[rows] = max(floor, plain + step * num_plain), max(floor, verifying + step * num_verifying)


class DraftPauses:
    """Leaves a draft model out for a while where nothing that it says is worth verifying: it costs by looking already.

    Each pause is twice as long as the one before, until drafts are verified again or somebody new comes. Drafts that
    cost nothing (prompt lookup: an iteration that only looks takes as long as one of the plain program) never pause.
    """

    def __init__(self, *, looking_costs: bool = True) -> None:
        self._looking_costs = looking_costs
        self._idle, self._left, self._next = 0, 0, _PATIENCE

    def begin(self, plan: IterationPlan) -> bool:
        """Whether what is dispatched now runs without drafts; those that a grammar allows are worth it in any case."""
        if plan.admitted:
            self._idle, self._left, self._next = 0, 0, _PATIENCE
        if (
            not self._looking_costs
            or not plan.is_decode_loop
            or self._left <= 0
            or any(chunk.guess for chunk in plan.chunks)
        ):
            return False
        self._left -= plan.num_steps
        return True

    def observe(self, drafts: LoopDrafts) -> None:
        """What became of a loop that might draft."""
        self._idle = 0 if drafts.num_verifying else self._idle + drafts.num_passes
        if drafts.num_verifying:
            self._next = _PATIENCE
        elif self._idle >= _PATIENCE:
            self._idle, self._left, self._next = 0, self._next, min(2 * self._next, _LONGEST_PAUSE)
