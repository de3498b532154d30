"""What makes a folder of weights a whole model: configuration, generation defaults, tokenizer and chat templates.

Input: an open checkpoint, a folder's or a GGUF file's. Output: the files of a Hugging Face folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.checkpoints.base import Checkpoint

if TYPE_CHECKING:
    from jaxllm.tokenizer import Tokenizer

_COPIED = (
    "tokenizer*",
    "*.jinja",
    "merges.txt",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*.tiktoken",
    "LICENSE*",
)
_COPIED_FOLDERS = ("additional_chat_templates",)


def write_side_files(checkpoint: Checkpoint, folder: Path, dtype: str | None) -> None:
    """Write them below `folder`; `dtype` is what `convert` was asked for, None where the files do not keep it."""
    config = dict(checkpoint.config)  # with its nulls: transformers has other defaults for some keys
    if dtype is not None:  # how transformers loads it unless told otherwise, under the name that the file has for it
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = _matrix_dtype(checkpoint, dtype)
    generation = checkpoint.generation_config
    if checkpoint.path.is_dir():
        _copy(checkpoint.path, folder)
    elif (tokenizer := _tokenizer(checkpoint.path)) is not None:
        from jaxllm.tokenizer.save_folder import save_tokenizer

        save_tokenizer(tokenizer, folder, max_length=_max_length(config))
        generation = _with_ends(generation, tokenizer, config)
    _write_json(folder / "config.json", config)
    if generation:
        _write_json(folder / "generation_config.json", generation)


def _matrix_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """What `convert` makes of matrices: "auto" keeps the narrow ones and makes bfloat16 of others."""
    kinds = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1}
    if dtype != "auto":
        return dtype
    return kinds.pop() if kinds in ({"bfloat16"}, {"float16"}) else "bfloat16"


def _copy(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    for name in _COPIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def _tokenizer(path: Path) -> Tokenizer | None:
    """None where the file has no vocabulary; one that cannot be read is an error, not a model without text."""
    from jaxllm.checkpoints.gguf.file import read_header
    from jaxllm.tokenizer.gguf import tokenizer_from_metadata

    metadata = read_header(path).metadata
    if metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None
    return tokenizer_from_metadata(metadata)


def _max_length(config: dict[str, Any]) -> int | None:
    return config.get("max_position_embeddings") or config.get("n_positions")


def _with_ends(generation: dict[str, Any], tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    """Every id that ends an answer here ends it in transformers too; defaults of sampling ask for sampling there."""
    listed = generation.get("eos_token_id") or []
    ends = dict.fromkeys([*(listed if isinstance(listed, list) else [listed]), *tokenizer.eos_token_ids])
    ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    sampling = {"do_sample": True} if {"temperature", "top_k", "top_p", "min_p"} & generation.keys() else {}
    return {**generation, **ids, **sampling, **({"eos_token_id": list(ends)} if ends else {})}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
