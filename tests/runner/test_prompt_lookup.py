"""Prompt lookup on the device against the plain search it stands for."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest

from jaxllm.config import SpeculativeConfig
from jaxllm.runner import prompt_lookup


def naive(tokens: list[int], most: int, shortest: int, longest: int) -> list[int]:
    """The longest match of the last tokens, the latest of equals; what follows it, over and over."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                after = tokens[end:]
                return [after[i % len(after)] for i in range(most)]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 4), (3, 5)])
def test_drafts_are_those_of_the_plain_search(monkeypatch, shortest: int, longest: int) -> None:
    monkeypatch.setattr(prompt_lookup, "_BLOCK", 16)  # matches lie across blocks
    rng, config = (
        random.Random(longest),
        SpeculativeConfig(num_speculative_tokens=5, prompt_lookup_min=shortest, prompt_lookup_max=longest),
    )
    history = np.array([[rng.randrange(4) for _ in range(50)] for _ in range(7)], np.int32)
    look_up = jax.jit(lambda *args: prompt_lookup.look_up(*args, config))
    found = 0
    for _ in range(40):
        slots = np.array(rng.sample(range(7), 4), np.int32)
        lengths = np.array([rng.randrange(1, 51) for _ in range(4)], np.int32)
        most = np.array([rng.choice([0, 2, 5]) for _ in range(4)], np.int32)
        drafts, counts, _ = (np.asarray(a) for a in look_up(history, slots, lengths, most))
        for slot, length, limit, row, count in zip(slots, lengths, most, drafts, counts, strict=True):
            expected = naive(history[slot, :length].tolist(), limit, shortest, longest)
            assert row[:count].tolist() == expected
            found += bool(expected)
    assert found > 20
