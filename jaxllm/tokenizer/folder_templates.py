"""The chat templates of a Hugging Face folder, from all the places where they are kept.

Inputs: a folder and its tokenizer settings. Output: Jinja source by name. It does not compile anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.tokenizer.chat import DEFAULT
from jaxllm.tokenizer.json_file import read_json


def folder_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Files of their own win over `chat_template.json` (a processor's), and that over tokenizer_config.json."""
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    own = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    older = read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if DEFAULT in own:
        return own
    return _named(older) | own


def _named(value: Any) -> dict[str, str]:
    """One template, a list of `{"name", "template"}`, or an object of them."""
    if isinstance(value, list):
        value = {e["name"]: e["template"] for e in value if isinstance(e, dict) and {"name", "template"} <= e.keys()}
    if isinstance(value, dict):
        return {name: text for name, text in value.items() if isinstance(name, str) and isinstance(text, str)}
    return {DEFAULT: value} if isinstance(value, str) else {}
