"""Choose the reader for a path.

Inputs: a Hugging Face folder or a `.gguf` file on this machine. Output: a `Tokenizer`. It does not know
model names (`jaxllm/checkpoints/resolve.py` turns those into paths).
"""

from __future__ import annotations

from pathlib import Path

from jaxllm.tokenizer.chat import ChatOptions
from jaxllm.tokenizer.tokenizer import Tokenizer


def load_tokenizer(path: Path, chat_options: ChatOptions | None = None) -> Tokenizer:
    """Read the tokenizer of a model.

    Args:
        path: a folder with `tokenizer.json`, or a `.gguf` file.
        chat_options: the operator's choice of template and variables.

    Raises:
        ValueError: nothing readable there; the message says what to do.
    """
    tokenizer = _read(Path(path))
    if chat_options is not None:
        tokenizer.chat.configure(chat_options)
    return tokenizer


def _read(path: Path) -> Tokenizer:
    if path.is_dir():
        from jaxllm.tokenizer.hf_folder import tokenizer_from_folder

        return tokenizer_from_folder(path)
    from jaxllm.checkpoints.gguf.names import is_gguf

    if path.is_file() and is_gguf(path):
        from jaxllm.checkpoints.gguf.file import read_header
        from jaxllm.tokenizer.gguf import tokenizer_from_metadata

        return tokenizer_from_metadata(read_header(path).metadata)
    raise ValueError(f"no tokenizer at {path}: expected a folder with tokenizer.json or a .gguf file")
