"""Safetensors folders: what is read, and every way a file or an index can be wrong."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoints import CheckpointError, open_checkpoint
from jaxllm.checkpoints.safetensors_file import SafetensorsFile

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float16).reshape(2, 3),
    "c": np.arange(8).reshape(4, 2).astype(ml_dtypes.bfloat16),
    "d": np.array([1, 2, 3], np.int64),
    "e": np.array(5.0, np.float32),
    "f": np.zeros((0, 4), np.float32),
}


def folder(path: Path, **files: Any) -> Path:
    """A folder with a config; keyword `x__json` writes `x.json`."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in {"config__json": {"model_type": "llama"}, **files}.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return path


def raw(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def described(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets,
    }


def test_single_file_is_read_as_views_of_the_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", generation_config__json={"temperature": 0.6})
    save_file(TENSORS, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {"temperature": 0.6}
    assert checkpoint.tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        got, info = checkpoint.read(name), checkpoint.tensors[name]
        assert (got.shape, got.dtype) == (value.shape, value.dtype) == (info.shape, np.dtype(info.dtype))
        np.testing.assert_array_equal(got, value)
    assert checkpoint.tensors["c"].dtype == "bfloat16"
    assert not checkpoint.read("a").flags.owndata
    assert not checkpoint.read("a").flags.writeable


def test_slice_is_the_same_part_of_the_whole(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    save_file(TENSORS, path / "model.safetensors")
    checkpoint = open_checkpoint(path)
    for index in [(slice(1, 3),), (slice(None), slice(0, 4, 2)), (slice(2, 2),)]:
        np.testing.assert_array_equal(checkpoint.read("a", index), TENSORS["a"][index])
        np.testing.assert_array_equal(checkpoint.read("c", index), TENSORS["c"][index])


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2), ("BOOL", np.bool_)],
)
def test_byte_sized_dtypes_are_read(tmp_path: Path, word: str, dtype: Any) -> None:
    path = tmp_path / "x.safetensors"
    value = np.array([0, 1, 1, 0], dtype)
    path.write_bytes(raw({"x": described(word, (4,), (0, 4))}, value.tobytes()))
    got = SafetensorsFile.open(path).read("x")
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, value)


def test_tensor_at_an_odd_offset_comes_back_aligned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"x": described("U8", (1,), (0, 1)), "y": described("F32", (2,), (1, 9))}
    path.write_bytes(raw(header, b"\1" + np.array([1.5, 2.5], np.float32).tobytes()))
    got = SafetensorsFile.open(path).read("y")
    assert got.flags.aligned
    assert got.tolist() == [1.5, 2.5]


def test_shards_are_joined_by_the_index(tmp_path: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    path = folder(tmp_path / "m", model__safetensors__index__json={"weight_map": weight_map})
    save_file({"a": TENSORS["a"]}, path / "one.safetensors")
    save_file({name: TENSORS[name] for name in "bcd"}, path / "two.safetensors")
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == {"a", "b", "c"}
    for name in "abc":
        np.testing.assert_array_equal(checkpoint.read(name), TENSORS[name])


EIGHT = b"\0" * 8
DAMAGED = {
    "shorter than its length field": (b"\1\0\0", "shorter than"),
    "empty": (b"", "shorter than"),
    "header longer than file": (raw({}, length=1000), "claims 1000 bytes"),
    "header length overflows": (raw({}, length=2**64 - 1), "claims"),
    "not json": (raw(b"{'x': 1}"), "not JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "nested without end": (raw(b"[" * 100_000), "not JSON"),
    "not an object": (raw([1, 2]), "not a JSON object"),
    "tensor not an object": (raw({"x": 3}), "'x' is not described"),
    "field missing": (raw({"x": {"dtype": "F32", "shape": [2]}}, EIGHT), "'x' is not described"),
    "field too many": (raw({"x": described() | {"y": 1}}, EIGHT), "'x' is not described"),
    "duplicate tensor": (
        raw(b'{"x": %s, "x": %s}' % ((json.dumps(described()).encode(),) * 2), EIGHT),
        "'x' appears twice",
    ),
    "unknown dtype": (raw({"x": described("F7")}, EIGHT), "dtype 'F7'"),
    "dtype not a word": (raw({"x": described(["F32"])}, EIGHT), "'x' has dtype"),
    "negative dimension": (raw({"x": described(shape=(-2,))}, EIGHT), "shape [-2]"),
    "fractional dimension": (raw({"x": described(shape=(2.0,))}, EIGHT), "shape [2.0]"),
    "boolean dimension": (raw({"x": described(shape=(True, 2))}, EIGHT), "shape [True, 2]"),
    "shape not a list": (raw({"x": described(shape="2")}, EIGHT), "shape '2'"),
    "negative offset": (raw({"x": described(offsets=(-8, 0))}, EIGHT), "offsets [-8, 0]"),
    "three offsets": (raw({"x": described(offsets=(0, 8, 8))}, EIGHT), "offsets [0, 8, 8]"),
    "offsets swapped": (raw({"x": described(offsets=(8, 0))}, EIGHT), "takes 8 bytes"),
    "size wraps": (raw({"x": described(shape=(2**32, 2**32), offsets=(0, 0))}), "takes 73786976294838206464"),
    "size differs": (raw({"x": described(shape=(3,))}, EIGHT), "takes 12 bytes"),
    "past the end": (raw({"x": described()}, b"\0" * 7), "ends at 8 of the data, which has 7 bytes"),
    "overlap": (raw({"x": described(), "y": described(offsets=(4, 12))}, b"\0" * 12), "'y' overlaps"),
    "gap": (raw({"x": described(), "y": described(offsets=(12, 20))}, b"\0" * 20), "'y' starts at 12"),
    "data too many": (raw({"x": described()}, b"\0" * 12), "the data has 12"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused_in_one_line_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_header_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"x": described()}, EIGHT))
    SafetensorsFile.open(path)
    monkeypatch.setattr("jaxllm.checkpoints.safetensors_file._MAX_HEADER", 10)
    with pytest.raises(CheckpointError, match="the limit is 10"):
        SafetensorsFile.open(path)


def test_truncated_and_mutated_files_load_or_are_refused(tmp_path: Path) -> None:
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(TENSORS, good)
    content = good.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile.open(path)
    header_end, rng = 8 + struct.unpack_from("<Q", content)[0], random.Random(0)
    for _ in range(300):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 6))):
            mutated[rng.randrange(header_end)] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            file = SafetensorsFile.open(path)
        except CheckpointError:
            continue
        for name, info in file.tensors.items():
            assert file.read(name).shape == info.shape


BAD_INDEX = {
    "no map": ({"weights": {}}, "weight_map"),
    "map of numbers": ({"weight_map": {"a": 3}}, "weight_map"),
    "missing file": ({"weight_map": {"a": "none.safetensors"}}, "'none.safetensors', which is not there"),
    "missing tensor": (
        {"weight_map": {"zz": "one.safetensors"}},
        "'zz' is in 'one.safetensors', but it is not",
    ),
    "outside the folder": ({"weight_map": {"a": "../one.safetensors"}}, "'../one.safetensors'"),
    "absolute": ({"weight_map": {"a": "/one.safetensors"}}, "'/one.safetensors'"),
    "pickle shard": ({"weight_map": {"a": "one.bin"}}, "'one.bin'"),
}


@pytest.mark.parametrize(("index", "message"), BAD_INDEX.values(), ids=BAD_INDEX)
def test_wrong_index_is_refused_by_name(tmp_path: Path, index: Any, message: str) -> None:
    path = folder(tmp_path / "m", model__safetensors__index__json=index)
    for place in (path, tmp_path):
        save_file({"a": TENSORS["a"]}, place / "one.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)
    assert "model.safetensors.index.json" in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickle_is_refused_with_the_conversion(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "m")
    (path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickle.*save_pretrained.*safe_serialization=True"):
        open_checkpoint(path)


def test_folder_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(path)
    (path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object"):
        open_checkpoint(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        open_checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be opened"):
        open_checkpoint(path)
