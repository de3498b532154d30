"""Prompts as users give them -> one checked form. Knows nothing of tokenizers, models or engines."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.config.sampling import SamplingParams

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
        text,
        ids,
        _salt(fields.get("cache_salt", "")),
        _priority(fields.get("priority", 0)),
        special is not False,
        transfer,
    )


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


def as_token_ids(ids: Any) -> list[int]:
    """Token ids of any kind (lists, NumPy, torch or JAX arrays, one row of a batch) as a list of `int`.

    Raises ValueError for what is none.
    """
    plain = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, Iterable):
        raise ValueError(f"token ids are a list of whole numbers, not {type(ids).__name__}")
    known = list(plain)
    if len(known) == 1 and isinstance(known[0], list) and plain is not ids:
        known = known[0]  # an array of one row, as tokenizers return it
    if all(type(i) is int for i in known):
        return known
    for i, token in enumerate(known):
        try:
            known[i] = operator.index(token)
        except TypeError:
            raise ValueError(f"token id {str(token)[:50]!r} is not a whole number") from None
    return known


def check_prompt(ids: Sequence[int], max_model_len: int, vocab_size: int) -> list[int]:
    """Token ids as plain integers. Raises ValueError where they are no prompt for such an engine."""
    known = as_token_ids(ids)
    if not known:
        raise ValueError("the prompt is empty; give at least one token")
    if len(known) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(known)} tokens and max_model_len is {max_model_len}, which leaves no room for an "
            "answer; shorten the prompt or raise max_model_len"
        )
    if not 0 <= min(known) <= max(known) < vocab_size:
        _refuse_token(next(i for i in known if not 0 <= i < vocab_size), vocab_size)
    return known


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError where a request names tokens that there are not."""
    named = (params.stop_token_ids, params.logit_bias, params.allowed_token_ids)
    for token in (i for ids in named for i in ids or () if i >= vocab_size):
        _refuse_token(token, vocab_size)


def _refuse_token(token: int, vocab_size: int) -> None:
    raise ValueError(f"token id {token!r} is outside the vocabulary; ids must be in 0..{vocab_size - 1}")
