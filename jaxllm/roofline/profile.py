"""Measured iterations of one engine as data: `jaxllm bench calibrate` writes a profile, a simulation reads it.

A JSON file <-> `Profile`, which says how long an iteration lasts. Per compiled program and bucket a sum of terms:
`base + tokens·T + pairs·(query, key) + keys·(decode keys) + starts·(requests admitted)`, fitted to measurements. Plain
Python.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.roofline.iteration_time import IterationWork

FORMAT = "jaxllm-profile-1"


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds: of an iteration, per token, per (query, key) pair of chunks, per key of decodes, per request admitted.

    Pairs and keys are sums over layers.
    """

    base: float
    tokens: float = 0.0
    pairs: float = 0.0
    keys: float = 0.0
    starts: float = 0.0

    def seconds(self, work: IterationWork) -> float:
        """Of one iteration."""
        return (
            self.base
            + self.tokens * work.tokens
            + self.pairs * work.chunk_pairs
            + self.keys * work.decode_keys
            + self.starts * work.admitted
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What was measured, of which engine, on what.

    Attributes:
        programs: name of a program -> largest number of tokens (or rows) of a bucket -> its terms.
        source: "measured", or where published figures come from.
        engine: the settings it was measured with: they are the defaults of a simulation.
    """

    device: str
    model: str
    num_devices: int
    flops_per_s: float
    bytes_per_s: float
    programs: Mapping[str, Mapping[int, Terms]]
    source: str = "measured"
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def seconds(self, work: IterationWork) -> float:
        """See `IterationTime`."""
        buckets = self.programs[work.program]
        bucket = min((bucket for bucket in buckets if bucket >= work.tokens), default=max(buckets))
        return buckets[bucket].seconds(work)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n", encoding="utf-8")


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises ValueError in one line where it is none."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        programs = {
            program: {int(bucket): Terms(**terms) for bucket, terms in buckets.items()}
            for program, buckets in read.pop("programs").items()
        }
        if not programs or not all(programs.values()):
            raise ValueError("it has no measured programs")
        return Profile(programs=programs, **read)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cannot read the profile {path}: {error}; `jaxllm bench calibrate` writes one") from None
