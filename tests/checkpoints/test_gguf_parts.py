"""A GGUF model that was split is the same model; parts that are missing or of another model are named in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxllm.checkpoints import CheckpointError, model_files, open_checkpoint, resolve_model
from jaxllm.config import EngineConfig
from jaxllm.weights.source import model_identity

L, D, V = 2, 64, 40


def write(path: Path, split: int = 0, seed: int = 0) -> None:
    """A tiny llama; `split` tensors per part."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=split)
    writer.add_block_count(L)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"tok{i}" for i in range(V)])
    shapes = {"token_embd": (V, D), "output_norm": (D,)}
    for i in range(L):
        block = {"attn_norm": (D,), "ffn_norm": (D,), "ffn_gate": (96, D), "ffn_up": (96, D), "ffn_down": (D, 96)}
        block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (D, D))
        shapes |= {f"blk.{i}.{stem}": shape for stem, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts in a folder, and the same model whole beside it."""
    write(tmp_path / "whole.gguf")
    folder = tmp_path / "split"
    folder.mkdir()
    write(folder / "m.gguf", split=7)
    found = sorted(folder.iterdir())
    assert [file.name for file in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_the_parts_are_the_whole(parts: list[Path]) -> None:
    whole, split = open_checkpoint(parts[0].parent.parent / "whole.gguf"), open_checkpoint(parts[0])
    assert split.config == whole.config
    assert split.tensors == whole.tensors
    for name in whole.tensors:
        np.testing.assert_array_equal(split.read(name), whole.read(name))
        split.release(name)


def test_a_folder_with_one_split_model_is_that_model(parts: list[Path]) -> None:
    folder = parts[0].parent
    assert resolve_model(folder) == parts[0]
    (folder / "mmproj-m.gguf").touch()  # the vision half is no model of its own
    assert resolve_model(folder) == parts[0]
    shutil.copy(parts[0], folder / "other.gguf")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        resolve_model(folder)


def test_identity_covers_every_part(parts: list[Path]) -> None:
    assert model_files(parts[0]) == parts
    config = EngineConfig()
    before = model_identity(config, {}, parts[0])
    assert model_identity(config, {}, parts[0]) == before
    content = parts[2].read_bytes()
    parts[2].write_bytes(content + b"\0")
    assert model_identity(config, {}, parts[0]) != before


def one_line(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    assert one_line(parts[0]).startswith(f"{parts[1]}: this part of 3 is missing")


def test_a_later_part_names_the_first(parts: list[Path]) -> None:
    assert "is not the first part; name m-00001-of-00003.gguf" in one_line(parts[1])


def test_a_part_that_lost_its_name_says_how_it_should_be_called(parts: list[Path]) -> None:
    assert "NAME-00001-of-00003.gguf" in one_line(parts[0].rename(parts[0].with_name("x.gguf")))


def test_parts_of_different_models_are_not_mixed(parts: list[Path]) -> None:
    shutil.copy(parts[2], parts[1])
    assert str(parts[1]) in one_line(parts[0])
    write(parts[0].with_name("n.gguf"), split=9)  # the second part of a model that was cut elsewhere
    shutil.copy(parts[0].with_name("n-00002-of-00003.gguf"), parts[1])
    assert "fetch the parts again" in one_line(parts[0]) or "has the tensor" in one_line(parts[0])


def test_a_truncated_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:2000])
    assert str(parts[1]) in one_line(parts[0])
