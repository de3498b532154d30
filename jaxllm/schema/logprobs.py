"""Log-probabilities as OpenAI writes them, for completions and for chat."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.engine.outputs import Logprob

Entry = dict[int, Logprob]
_LOWEST = -9999.0  # what OpenAI reports for "next to impossible"; infinities are no JSON


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Entry | None],
    count: int,
    offset: int,
    token_text: Callable[[int], str],
    *,
    as_ids: bool = False,
) -> dict[str, Any]:
    """Parallel lists over tokens; `offset` is where the first one stands in the text."""
    out: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in zip(token_ids, entries, strict=True):
        text = token_text(token)
        out["tokens"].append(token_name(token) if as_ids else text)
        out["token_logprobs"].append(_value(entry[token]) if entry else None)
        out["top_logprobs"].append(_top(entry, count, as_ids) if entry else None)
        out["text_offset"].append(offset)
        offset += len(text)
    return out


def _top(entry: Entry, count: int, as_ids: bool) -> dict[str, float]:
    """The `count` likeliest and the sampled one; of two tokens with one text the likelier stays."""
    best: dict[str, float] = {}
    for token, logprob in sorted(entry.items(), key=lambda e: -e[1].logprob)[: max(count, 0) + 1]:
        best.setdefault(token_name(token) if as_ids else _text(logprob), _value(logprob))
    return best


def chat_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Entry],
    count: int,
    token_bytes: Callable[[int], bytes],
    *,
    as_ids: bool = False,
) -> dict[str, Any]:
    """One object per token with its `count` alternatives; `bytes` tell half characters apart."""

    def shaped(token: int, logprob: Logprob) -> dict[str, Any]:
        text = token_name(token) if as_ids else _text(logprob)
        return {"token": text, "logprob": _value(logprob), "bytes": list(token_bytes(token))}

    content = []
    for token, entry in zip(token_ids, entries, strict=True):
        ranked = [(other, e) for other, e in entry.items() if e.rank is not None and e.rank <= count]
        ranked.sort(key=lambda pair: pair[1].rank or 0)
        content.append(shaped(token, entry[token]) | {"top_logprobs": [shaped(*e) for e in ranked]})
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[Entry | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's shape: token ids (as text) to log-probability, rank and text, per prompt token; null for the first."""
    if entries is None:
        return None

    def shaped(entry: Entry) -> dict[str, Any]:
        return {
            str(token): {"logprob": _value(one), "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in entry.items()
        }

    return [shaped(entry) if entry else None for entry in entries]


def token_name(token: int) -> str:
    """A token by its number: `return_tokens_as_token_ids`, where two tokens may have one text."""
    return f"token_id:{token}"


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST) if not math.isnan(entry.logprob) else _LOWEST
