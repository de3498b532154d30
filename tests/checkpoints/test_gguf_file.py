"""The header parser agrees with the `gguf` package, and survives every kind of damage."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxllm.checkpoints import CheckpointError
from jaxllm.checkpoints.gguf.checkpoint import GGUFCheckpoint
from jaxllm.checkpoints.gguf.file import GGUFTensor, read_header
from jaxllm.checkpoints.gguf.ggml_types import TENSOR_TYPES, UNREADABLE
from tests.helpers.patience import patience

_LARGEST_ALLOCATION = 8 << 20  # the tiny file has 150 KB; a length that is believed would ask for far more


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def raw_gguf(
    *,
    entries: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    version: int = 3,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    num_tensors: int | None = None,
    num_entries: int | None = None,
) -> bytes:
    entries, tensors = entries or [], tensors or []
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries + tensors)
    return head + b"\0" * (-len(head) % 32) + data


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(inner: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", inner, count) + items


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_header_agrees_with_the_gguf_package(tiny_gguf: Path) -> None:
    header, reference = read_header(tiny_gguf), gguf.GGUFReader(tiny_gguf)

    expected = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata == expected
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 40
    assert header.tensors == {
        t.name: GGUFTensor(tuple(int(n) for n in t.shape[::-1]), t.tensor_type.name, int(t.data_offset), int(t.n_bytes))
        for t in reference.tensors
    }


def test_type_table_agrees_with_the_gguf_package() -> None:
    reference = {int(k): (k.name, *size) for k, size in gguf.GGML_QUANT_SIZES.items()}
    assert {k: v for k, v in reference.items() if k in TENSOR_TYPES} == TENSOR_TYPES
    for name, _, block_bytes in TENSOR_TYPES.values():
        if name in UNREADABLE or name in ("F32", "F16"):
            continue
        blocks = np.zeros((1, block_bytes), np.uint8)
        gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])  # raises where there is no such code


def test_every_value_type_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "values.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_array("words", ["a", "", "ü"])
    writer.add_array("nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = read_header(tmp_path / "values.gguf").metadata

    assert metadata.pop("general.architecture") == "llama"
    assert metadata == {
        "u8": 200,
        "i8": -5,
        "u16": 60000,
        "i16": -300,
        "i32": -70000,
        "u64": 2**63,
        "i64": -(2**62),
        "f64": 0.1,
        "yes": True,
        "words": ["a", "", "ü"],
        "nested": [[1, 2], [3]],
    }
    assert metadata["yes"] is True


def test_alignment_of_the_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in "ab":
        writer.add_tensor(name, np.full((3, 5), ord(name), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_header(path).tensors
    for name in "ab":
        place = tensors[name]
        assert place.offset % 256 == 0
        assert set(np.fromfile(path, "<f4", 15, offset=place.offset)) == {ord(name)}


HUGE = 2**64 - 1
ONE = tensor(b"x", [4])
DAMAGED = {
    "empty file": (b"", "empty"),
    "other magic": (raw_gguf(magic=b"GGML"), "starts with b'GGML'"),
    "version 1": (raw_gguf(version=1), "version 1"),
    "big endian": (raw_gguf(version=3 << 24), "big-endian"),
    "tensor count overflows": (raw_gguf(num_tensors=HUGE), "tensor count"),
    "metadata count overflows": (raw_gguf(num_entries=HUGE), "metadata count"),
    "key longer than file": (raw_gguf(entries=[struct.pack("<Q", HUGE) + b"\0" * 16]), "metadata key"),
    "key not utf-8": (raw_gguf(entries=[entry(b"\xff\xfe", 4, b"\0" * 4)]), "not UTF-8"),
    "key twice": (raw_gguf(entries=[entry(b"k", 4, b"\0" * 4)] * 2), "'k' appears twice"),
    "unknown value type": (raw_gguf(entries=[entry(b"k", 13, b"\0" * 8)]), "value type 13"),
    "array count overflows": (raw_gguf(entries=[entry(b"k", 9, array(4, 2**62))]), "'k' says"),
    "string array overflows": (raw_gguf(entries=[entry(b"k", 9, array(8, 2**61))]), "'k' says"),
    "string in array too long": (
        raw_gguf(entries=[entry(b"k", 9, array(8, 1, struct.pack("<Q", HUGE)))]),
        "a string of 'k'",
    ),
    "arrays nest too deep": (raw_gguf(entries=[entry(b"k", 9, array(9, 1) * 50)]), "nests too deep"),
    "alignment zero": (raw_gguf(entries=[entry(b"general.alignment", 4, b"\0" * 4)]), "alignment=0"),
    "alignment 3": (raw_gguf(entries=[entry(b"general.alignment", 4, b"\3\0\0\0")]), "alignment=3"),
    "alignment huge": (raw_gguf(entries=[entry(b"general.alignment", 4, b"\0\0\0\x80")]), "alignment="),
    "alignment a string": (raw_gguf(entries=[entry(b"general.alignment", 8, string(b"x"))]), "alignment='x'"),
    "no dimensions": (raw_gguf(tensors=[tensor(b"x", [])]), "0 dimensions"),
    "five dimensions": (raw_gguf(tensors=[tensor(b"x", [1] * 5)], data=b"\0" * 4), "5 dimensions"),
    "dimension zero": (raw_gguf(tensors=[tensor(b"x", [0, HUGE])]), "shape"),
    "size wraps to zero": (raw_gguf(tensors=[tensor(b"x", [2**32, 2**32])]), "'x' ends at byte"),
    "offset wraps": (raw_gguf(tensors=[tensor(b"x", [4], offset=2**64 - 32)]), "'x' ends at byte"),
    "data missing": (raw_gguf(tensors=[ONE], data=b"\0" * 15), "truncated"),
    "unaligned offset": (raw_gguf(tensors=[tensor(b"x", [4], offset=4)], data=b"\0" * 64), "alignment 32"),
    "unknown tensor type": (raw_gguf(tensors=[tensor(b"x", [4], kind=99)], data=b"\0" * 64), "type 99"),
    "part of a block": (raw_gguf(tensors=[tensor(b"x", [33], kind=8)], data=b"\0" * 64), "Q8_0 needs"),
    "tensor twice": (raw_gguf(tensors=[ONE, ONE], data=b"\0" * 64), "'x' appears twice"),
    "overlap": (raw_gguf(tensors=[ONE, tensor(b"y", [4])], data=b"\0" * 64), "'x' and 'y' overlap"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_refused_in_one_line_that_names_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_header(tmp_path / "none.gguf")


def test_array_longer_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxllm.checkpoints.gguf.file._MAX_ARRAY", 3)
    path = tmp_path / "long.gguf"
    for count, ok in ((3, True), (4, False)):
        path.write_bytes(raw_gguf(entries=[entry(b"k", 9, array(0, count, b"\7" * count))]))
        if ok:
            assert read_header(path).metadata == {"k": [7] * count}
        else:
            with pytest.raises(CheckpointError, match="4 items"):
                read_header(path)


def load_everything(path: Path) -> None:
    """Open and read all; only a CheckpointError may come out, and never a large allocation."""
    tracemalloc.reset_peak()
    try:
        checkpoint = GGUFCheckpoint.open(path)
        for name, info in checkpoint.tensors.items():
            assert checkpoint.read(name).shape == info.shape
    except CheckpointError:
        pass
    assert tracemalloc.get_traced_memory()[1] < _LARGEST_ALLOCATION


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_truncated_files_never_load(tiny_gguf: Path, tmp_path: Path) -> None:
    content, path = tiny_gguf.read_bytes(), tmp_path / "cut.gguf"
    data_start = min(t.offset for t in read_header(tiny_gguf).tensors.values())
    last = max(t.offset + t.nbytes for t in read_header(tiny_gguf).tensors.values())
    for length in [*range(0, data_start, 29), *range(data_start, last, 9973), last - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            GGUFCheckpoint.open(path)
    assert tracemalloc.get_traced_memory()[1] < _LARGEST_ALLOCATION


@pytest.mark.usefixtures("traced")
def test_mutated_headers_load_or_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    content, path = tiny_gguf.read_bytes(), tmp_path / "mutated.gguf"
    data_start = min(t.offset for t in read_header(tiny_gguf).tensors.values())
    rng, start = random.Random(0), time.monotonic()
    for _ in range(200):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            mutated[rng.randrange(data_start)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(mutated)
        load_everything(path)
    assert time.monotonic() - start < patience(30)


def test_vocabulary_of_a_hundred_thousand_strings_is_read_quickly(tmp_path: Path) -> None:
    path, words = tmp_path / "words.gguf", [f"word{i}" for i in range(100_000)]
    items = b"".join(string(word.encode()) for word in words)
    path.write_bytes(raw_gguf(entries=[entry(b"k", 9, array(8, len(words), items))]))
    start = time.monotonic()
    assert read_header(path).metadata["k"] == words
    assert time.monotonic() - start < patience(1.0)  # 0.05 s alone; parsing element by element takes several seconds
