"""Pages on a wire: the format of a fetch and of its answer. Bytes and NumPy; no pickle, nothing that could run.

A span of a request's tokens has a name: SHA-256 over what decides a page's content (`root`), the cache salt and all
tokens up to the span's end. Both sides make it from what they know themselves, so a mix-up is a refusal, not a wrong
answer. Format 1, little endian: 8 bytes magic, uint32 length of the header, the header as JSON (format, and for each
span the number of tokens), the spans' arrays in C order, CRC-32 over all of that.

Dimension letters: L layers, T tokens, K key/value heads.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Sequence

import numpy as np

from jaxllm.kv.logical import Rows

FORMAT = 1
_MAGIC = b"jaxllmPD"
Shapes = Sequence[tuple[tuple[int, ...], tuple[int, ...], np.dtype]]  # see `row_shapes`


def span_names(root: str, salt: str, token_ids: Sequence[int], stops: Sequence[int]) -> list[str]:
    """The names of spans that end after so many tokens, in hexadecimal; `stops` ascend."""
    digest, done, names = hashlib.sha256(f"{root}\n{salt}\n".encode()), 0, []
    for stop in stops:
        digest.update(array("q", token_ids[done:stop]).tobytes())
        done = stop
        names.append(digest.copy().hexdigest())
    return names


def encode_rows(spans: Sequence[Rows]) -> list[bytes]:
    """The parts of an answer with these spans."""
    header = json.dumps({"format": FORMAT, "tokens": [rows[0].shape[2] for rows in spans]}).encode()
    parts = [_MAGIC, len(header).to_bytes(4, "little"), header]
    parts += [np.ascontiguousarray(row).tobytes() for rows in spans for row in rows]
    check = 0
    for part in parts:
        check = zlib.crc32(part, check)
    return [*parts, check.to_bytes(4, "little")]


def decode_rows(content: bytes, tokens: Sequence[int], shapes: Shapes) -> list[Rows]:
    """The spans of an answer, which must have so many tokens each. Raises ValueError for anything else."""
    body, check = memoryview(content)[:-4], content[-4:]
    if len(content) < 16 or zlib.crc32(body).to_bytes(4, "little") != check:
        raise ValueError("the pages arrived damaged")
    start = 12 + int.from_bytes(body[8:12], "little")
    if bytes(body[:8]) != _MAGIC or json.loads(bytes(body[12:start])) != {"format": FORMAT, "tokens": list(tokens)}:
        raise ValueError("these are not the pages that were asked for")
    spans: list[Rows] = []
    for count in tokens:
        rows = []
        for before, after, dtype in shapes:
            shape = (*before, count, *after)
            size = int(np.prod(shape)) * dtype.itemsize
            if start + size > len(body):
                raise ValueError("the pages arrived cut off")
            rows.append(np.frombuffer(body[start : start + size], np.uint8).view(dtype).reshape(shape))
            start += size
        spans.append(rows)
    if start != len(body):
        raise ValueError("more arrived than was asked for")
    return spans
