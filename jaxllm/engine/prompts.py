"""Prompts as users give them -> one checked form. Knows nothing of tokenizers, models or engines."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Prompt = str | Mapping[str, Any] | Sequence[int]
FIELDS = ("prompt", "prompt_token_ids", "cache_salt", "priority", "add_special_tokens", "kv_transfer_params")


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt: its text, its token ids, or both (the ids count), and how it wants to be treated."""

    text: str | None
    token_ids: Any
    cache_salt: str = ""
    priority: int = 0
    add_special_tokens: bool = True
    kv_transfer_params: Mapping[str, Any] | None = None


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or several, in every form that `LLM.generate` takes, as a list.

    Text and mappings are one prompt; so are a list or array of whole numbers. Everything else is a list of prompts.
    """
    if isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    plain = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(plain, Iterable):
        raise ValueError(f"a prompt is text, token ids or {{'prompt_token_ids': [...]}}, not {type(prompts).__name__}")
    several = list(plain)
    return [several] if several and all(map(_is_whole, several)) else several


def read_prompt(prompt: Any) -> Asked:
    """Check the form of one prompt. Raises ValueError."""
    if isinstance(prompt, str):
        fields: Mapping[str, Any] = {"prompt": prompt}
    elif isinstance(prompt, Mapping):
        fields = prompt
    else:
        fields = {"prompt_token_ids": prompt}
    text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
    if ids is None:
        if not isinstance(text, str):
            raise ValueError("a prompt must be text or {'prompt_token_ids': [...]}")
        if not text:
            raise ValueError("the prompt is empty; give at least one character")
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ValueError(f"a prompt has no field {unknown[0]!r}; it may have {', '.join(FIELDS)}")
    special = fields.get("add_special_tokens", True)
    transfer = fields.get("kv_transfer_params")
    if not isinstance(transfer, Mapping | None):
        raise ValueError("kv_transfer_params must be a table")
    return Asked(
        text, ids, _salt(fields.get("cache_salt", "")), _priority(fields.get("priority", 0)), special is not False,
        transfer,
    )  # fmt: skip


def text_of(prompt: Any) -> str | None:
    """The text of a prompt, however wrong the rest of it is."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None


def _salt(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"cache_salt={value!r}; it must be text")
    if "\0" in value:
        raise ValueError("cache_salt has a NUL character; use others")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("cache_salt has a lone surrogate; it must be Unicode text") from None
    return value


def _priority(value: Any) -> int:
    if not _is_whole(value):
        raise ValueError(f"priority={value!r}; it must be a whole number (smaller runs first)")
    return operator.index(value)


def _is_whole(value: Any) -> bool:
    if isinstance(value, bool | str | bytes | Mapping | list | tuple):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
