"""A tokenizer as the files of a Hugging Face folder, for models whose file is of another kind.

Input: a `Tokenizer`. Output: tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat templates.
What is written loads here and in transformers with the same ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxllm.tokenizer.chat import DEFAULT
from jaxllm.tokenizer.tokenizer import Tokenizer

_NAMED = "additional_chat_templates"


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int | None = None) -> None:
    """Write the files below `folder`.

    Args:
        max_length: `model_max_length`, the tokens that the model was made for.
    """
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers then takes tokenizer.json as it is
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if max_length is not None:
        settings["model_max_length"] = max_length
    if (default := tokenizer.chat_template) is not None:
        settings["chat_template"] = default  # for readers that know no file of its own
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", tokenizer.special_tokens)
    _write_templates(tokenizer, folder)


def _write_templates(tokenizer: Tokenizer, folder: Path) -> None:
    for name, source in tokenizer.chat.templates.items():
        if name == DEFAULT:
            (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
            continue
        # The name comes from the file: it must not lead out of the folder.
        if Path(name).name != name or name in (".", "..") or "\\" in name:
            raise ValueError(f"the chat template {name!r} has a name that is no file name; rename it")
        (folder / _NAMED).mkdir(exist_ok=True)
        (folder / _NAMED / f"{name}.jinja").write_text(source, encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
