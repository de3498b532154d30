"""What process 0 sends to the others, as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.config.sampling import SamplingParams
from jaxllm.runner.batch import row_batch, sampling_rows
from jaxllm.runner.messages import decode, encode
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Chunk


def test_dispatch_survives_the_wire_and_idle_masks_are_not_sent():
    request = Request("one", [1, 2, 3], SamplingParams(temperature=0.5, seed=7), limit=9, stop_ids=frozenset((4,)))
    rows = row_batch([Chunk(request, 2, 1, 1)], 4, 8, 100_000)
    table = np.arange(8, dtype=np.int32).reshape(4, 2)
    message = encode(("decode", 4, False), (rows, table, np.int32(3)))
    key, (back, table_back, steps) = decode(message, 100_000)
    assert key == ("decode", 4, False) and steps == 3
    np.testing.assert_array_equal(table_back, table)
    assert rows.sampling is not None
    for name in ("temperature", "seed", "bias_ids", "masked", "allowed"):
        sent, got = getattr(rows.sampling, name), getattr(back.sampling, name)
        np.testing.assert_array_equal(got, sent)
        assert got.dtype == sent.dtype
    assert len(message) < rows.sampling.allowed.nbytes
    assert sampling_rows([request], 4, 100_000).allowed.shape == back.sampling.allowed.shape


@pytest.mark.parametrize("message", [b"", b"\xff" * 20, encode(("reset", 0, True), ()) + b"x"])
def test_bytes_that_are_no_message_are_refused(message):
    with pytest.raises(ValueError, match="not a message"):
        decode(message, 10)
