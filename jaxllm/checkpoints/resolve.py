"""What a person types -> the files: a local path, a registered short name, or a Hugging Face repository id.

Input: a string. Output: a folder with `config.json`, or a `.gguf` file. Never opens a tensor.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from jaxllm.checkpoints.base import PICKLE_SUFFIXES, CheckpointError, refuse_pickle
from jaxllm.checkpoints.download import pull, unknown_model
from jaxllm.checkpoints.gguf.names import is_gguf, is_later_part
from jaxllm.checkpoints.registry import DEFAULT_MODEL, MODELS

_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Weights, tokenizer files and templates only. Many repositories keep a second copy in a subfolder, where only
# templates (additional_chat_templates/) are wanted.
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja", "merges.txt"]
_UNWANTED = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/tokenizer*", "tokenizer*/*", "consolidated*"]


def resolve_model(name: str | Path, *, progress: bool = True) -> Path:
    """Find the model `name`, fetching it if it has to be.

    Tried in order: an existing local path, a registered short name, a Hugging Face id `org/name`.

    Raises:
        ValueError: In one line, what was wrong and what names would work.
    """
    text = str(name)
    path = Path(os.path.expanduser(text))
    # A folder that happens to be called like a registered model must not hide it.
    if text and os.path.exists(path) and not (text in MODELS and not (path / "config.json").exists()):
        return _local(path)
    if text in MODELS:
        return pull(text, progress=progress)
    if text.startswith((".", "/", "~")) or text.endswith(".gguf"):
        raise CheckpointError(f"{text}: no such file or folder")
    if _REPOSITORY_ID.fullmatch(text):
        return _hugging_face(text, progress=progress)
    raise CheckpointError(unknown_model(text))


def _local(path: Path) -> Path:
    if path.is_dir():
        files = [file for file in sorted(path.glob("*.gguf")) if not _belongs_to_another(file)]
        # Beside a GGUF file a config.json alone is only for information.
        if (path / "config.json").is_file() and not (len(files) == 1 and _has_no_weights(path)):
            return path
        if len(files) == 1:
            return files[0]
        raise CheckpointError(
            f"{path}: no config.json and {len(files)} .gguf files; expected a Hugging Face folder or one "
            ".gguf file: name the file itself"
        )
    if is_gguf(path):
        return path
    if path.suffix in PICKLE_SUFFIXES:
        raise refuse_pickle(path)
    raise CheckpointError(
        f"{path}: not a checkpoint; pass a .gguf file, or the folder that holds config.json and the .safetensors files"
    )


def _has_no_weights(folder: Path) -> bool:
    return not (any(folder.glob("*.safetensors")) or (folder / "parameters").is_dir())


def _belongs_to_another(file: Path) -> bool:
    """The later parts of a split model, and the vision half that lies beside a language model."""
    return is_later_part(file) or file.name.lower().startswith("mmproj")


def _hugging_face(repo_id: str, *, progress: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import are_progress_bars_disabled as hidden
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

        hide = not (progress and sys.stderr.isatty()) and not hidden()
        if hide:
            disable_progress_bars()
        try:
            folder = snapshot_download(repo_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        finally:
            if hide:
                enable_progress_bars()
    except Exception as error:  # the hub's errors share no base class below Exception
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        raise CheckpointError(
            f"cannot fetch {repo_id!r} from Hugging Face ({reason}); pass a local folder or a .gguf file, "
            f"or run `jaxllm pull {DEFAULT_MODEL}`"
        ) from error
    return _local(Path(folder))
