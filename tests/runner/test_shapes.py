"""Sizes of the ragged step."""

from __future__ import annotations

import pytest

from jaxllm.config import EngineConfig
from jaxllm.runner.shapes import token_buckets


@pytest.mark.parametrize(
    ("kwargs", "few_tokens", "multiple", "sizes"),
    [
        ({}, False, 1, (64, 128, 512)),
        ({}, True, 1, (16, 64, 128, 512)),
        ({}, True, 24, (24, 72, 144, 528)),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 4}, True, 1, (16,)),
        ({"max_num_batched_tokens": 48}, True, 1, (16, 48)),
        ({"deterministic": True}, True, 1, (512,)),
    ],
)
def test_few_tokens_have_a_size_of_their_own_where_it_is_cheaper(kwargs, few_tokens, multiple, sizes):
    config = EngineConfig(**{"max_num_batched_tokens": 512} | kwargs)
    assert token_buckets(config, multiple, few_tokens=few_tokens) == sizes
