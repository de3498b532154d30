"""What a serving bench sends and when: random prompts at a rate, or a trace of real lengths and arrival times.

Inputs: sizes, a seed, a file. Output: a list of `Planned` requests. Knows nothing of servers.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

Row = tuple[float, int, int, list[int]]  # arrival in seconds, prompt and output tokens, hash ids

TRACE_BLOCK = 512  # tokens that one hash id of a Mooncake trace stands for
# Column names of the public traces: arrival, prompt tokens, output tokens.
_COLUMNS = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    (None, "num_prefill_tokens", "num_decode_tokens"),
    ("timestamp", "input_length", "output_length"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One request: when to send it (seconds from the start) and what."""

    at: float
    prompt: list[int]
    output_len: int


def random_prompts(num_prompts: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[Planned]:
    """Prompts of random tokens, the same as `bench throughput` uses for this seed; all due at once."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (num_prompts, input_len))
    return [Planned(at=0.0, prompt=row, output_len=output_len) for row in tokens.tolist()]


def read_trace(
    path: Path, num_prompts: int, vocab_size: int, max_len: int, seed: int, *, scale: bool = False
) -> list[Planned]:
    """The first `num_prompts` requests of a trace that fit into `max_len` tokens, at the trace's own times.

    With `scale` they are simply the first, all lengths shrunk by one factor so that the longest just fits. Prompts are
    random tokens; requests that share hash ids share those blocks.
    """
    rows = (row for row in trace_rows(path) if row[1] > 0 and row[2] > 0)
    if scale:
        rows = _shrunk(list(itertools.islice(rows, num_prompts)), max_len)
    fitting = (row for row in rows if row[1] + row[2] <= max_len)
    planned = [
        Planned(at=at, prompt=_prompt(input_len, hashes, i, vocab_size, seed), output_len=output_len)
        for i, (at, input_len, output_len, hashes) in enumerate(itertools.islice(fitting, num_prompts))
    ]
    if not planned:
        raise ValueError(f"--trace {path} has no request that fits into {max_len} tokens")
    first = planned[0].at
    return [Planned(at=p.at - first, prompt=p.prompt, output_len=p.output_len) for p in planned]


def _shrunk(rows: Sequence[Row], max_len: int) -> Iterator[Row]:
    longest = max((prompt + output for _, prompt, output, _ in rows), default=1)
    factor = min(1.0, max_len / longest)
    for at, prompt, output, hashes in rows:
        yield at, max(1, int(prompt * factor)), max(1, int(output * factor)), hashes


def trace_rows(path: Path) -> Iterator[Row]:
    """Every row of a trace. Raises ValueError, with the number of the row, where it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = map(json.loads, file) if path.suffix == ".jsonl" else csv.DictReader(file)
            number = 0
            try:
                for number, row in enumerate(rows, 1):  # noqa: B007  (errors name it)
                    yield _row(row, milliseconds=path.suffix == ".jsonl")
            except json.JSONDecodeError as error:
                raise ValueError(f"--trace {path}, row {number + 1}: {error}") from None
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"--trace {path}, row {number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read --trace {path}: {error}") from None


def _row(row: Any, *, milliseconds: bool) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"it is no object with named columns but {str(row)[:40]!r}")
    arrival, prompt, output = _columns(row)
    at = _seconds(row[arrival], milliseconds=milliseconds) if arrival else 0.0
    return at, _tokens(row[prompt], prompt), _tokens(row[output], output), row.get("hash_ids") or []


def _tokens(value: Any, column: str) -> int:
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{column} is {value!r}; it must be a number of tokens") from None


def _columns(row: dict[str, Any]) -> tuple[str | None, str, str]:
    for arrival, prompt, output in _COLUMNS:
        if prompt in row and output in row:
            return (arrival if arrival in row else None), prompt, output
    known = "; ".join(", ".join(filter(None, names)) for names in _COLUMNS)
    raise ValueError(f"it has columns {', '.join(map(str, row))}; known ones are: {known}")


def _seconds(value: Any, *, milliseconds: bool) -> float:
    if milliseconds:
        return float(value) / 1e3
    text = str(value)
    try:
        return float(text)
    except ValueError:
        whole, _, fraction = text.partition(".")
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")


def _prompt(input_len: int, hashes: list[int], index: int, vocab_size: int, seed: int) -> list[int]:
    if not hashes:
        return np.random.default_rng((seed, 0, index)).integers(0, vocab_size, input_len).tolist()
    blocks = [np.random.default_rng((seed, 1, h)).integers(0, vocab_size, TRACE_BLOCK) for h in hashes]
    return np.resize(np.concatenate(blocks), input_len).tolist()


def stretched(planned: list[Planned], factor: float) -> list[Planned]:
    """The same requests, `factor` times as far apart."""
    return [Planned(at=p.at * factor, prompt=p.prompt, output_len=p.output_len) for p in planned]


def at_rate(planned: list[Planned], rate: float, burstiness: float, seed: int) -> list[Planned]:
    """The same requests at `rate` per second: gamma-distributed gaps, Poisson arrivals at burstiness 1."""
    if math.isinf(rate):
        times = np.zeros(len(planned))
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), len(planned))
        times = np.cumsum(gaps) - gaps[0]
    pairs = zip(times.tolist(), planned, strict=True)
    return [Planned(at=at, prompt=p.prompt, output_len=p.output_len) for at, p in pairs]
