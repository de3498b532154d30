"""A name becomes a path: what is tried, in which order, and what is said when nothing fits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import jaxllm.checkpoints.resolve as resolve_module
from jaxllm.checkpoints import DEFAULT_MODEL, CheckpointError, open_checkpoint, resolve_model


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_local_folder_and_gguf_file_are_themselves(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    file = tmp_path / "x.gguf"
    file.touch()
    assert resolve_model(str(folder)) == folder
    assert resolve_model(file) == file


def test_folder_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.touch()
    assert resolve_model(str(tmp_path)) == file
    (tmp_path / "y.gguf").touch()
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        resolve_model(str(tmp_path))


def test_a_gguf_file_is_known_by_how_it_begins(tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(b"GGUF\x03\0\0\0" + bytes(16))
    assert resolve_model(blob) == blob
    with pytest.raises(CheckpointError, match=r"general\.architecture=None"):
        open_checkpoint(blob)
    blob.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        resolve_model(blob)


def test_a_configuration_beside_a_gguf_file_is_only_for_information(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "x.gguf").touch()
    assert resolve_model(folder) == folder / "x.gguf"
    (folder / "model.safetensors").touch()
    assert resolve_model(folder) == folder


def test_a_pointer_to_a_large_file_says_so(tmp_path: Path) -> None:
    pointer = tmp_path / "x.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        open_checkpoint(pointer)


def test_short_name_is_pulled_unless_a_local_model_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve_module, "pull", lambda name, progress: Path("pulled") / name)
    assert resolve_model(DEFAULT_MODEL) == Path("pulled") / DEFAULT_MODEL
    (tmp_path / DEFAULT_MODEL).mkdir()
    assert resolve_model(DEFAULT_MODEL) == Path("pulled") / DEFAULT_MODEL
    (tmp_path / DEFAULT_MODEL / "config.json").write_text("{}")
    assert resolve_model(DEFAULT_MODEL) == Path(DEFAULT_MODEL)


def test_repository_id_fetches_weights_and_tokenizer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    folder, asked = model_folder(tmp_path / "snapshot"), {}

    def download(repo_id: str, **filters: list[str]) -> str:
        asked.update(filters, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name") == folder
    assert asked.pop("repo_id") == "org/name"
    wanted = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "merges.txt"]
    wanted += ["tokenizer.model", "tokenizer.json", "chat_template.jinja", "added_tokens.json"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    unwanted = [
        "pytorch_model.bin",
        "modeling.py",
        "original/x.safetensors",
        "original/tokenizer.model",
        "onnx/config.json",
        "consolidated.safetensors",
        "x.gguf",
    ]
    assert list(filter_repo_objects(wanted + unwanted, **asked)) == wanted


def test_no_network_is_one_line_that_names_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("cannot reach the host.\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError) as caught:
        resolve_model("org/name")
    assert str(caught.value) == (
        "cannot fetch 'org/name' from Hugging Face (cannot reach the host); pass a local folder or a .gguf "
        "file, or run `jaxllm pull smollm2-135m-instruct`"
    )


def test_repository_without_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m", "did you mean 'smollm2-135m-instruct'"),
        ("zzz", "known names: gemma-3-270m, smollm2-135m-instruct"),
        ("", "unknown model ''"),
        ("x" * 5000, "unknown model"),
        ("~nobody-here/x", "no such file or folder"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("./missing", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("org/missing.gguf", "no such file or folder"),
    ],
)
def test_unknown_name_is_one_line(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        resolve_model(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickle_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match="pickle"):
        resolve_model(tmp_path / "model.bin")


def test_import_loads_neither_jax_nor_numpy() -> None:
    program = "import sys, jaxllm.checkpoints; print(sorted({'jax', 'numpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    modules = "jaxllm.checkpoints.safetensors_folder, jaxllm.checkpoints.gguf.checkpoint"
    program = f"import sys; import {modules}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
