"""Examples -> documents: token ids, what each is to predict, and what of that counts.

Conversations go through the model's own chat template, and only what the assistant says counts, its end of turn
included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.tokenizer import Tokenizer
from jaxllm.training.data.files import Example


@dataclass(frozen=True, slots=True)
class Document:
    """One document of `n` tokens, as arrays `[n]`: see `jaxllm.training.batch.TokenBatch`."""

    place: str
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        """Tokens before the first that counts."""
        counted = np.flatnonzero(self.weights)
        return self.tokens[: counted[0] + 1] if len(counted) else self.tokens


def instruction_document(example: Example, tokenizer: Tokenizer) -> Document:
    """A conversation, a prompt with its completion, or a text. Raises ValueError that names its place."""
    if example.messages is not None:
        ids, counts = _conversation(example, tokenizer)
    elif example.completion is not None:
        assert example.text is not None
        prompt = tokenizer.encode(example.text)
        rest = tokenizer.encode(example.completion, add_special_tokens=False) + _end(tokenizer)
        ids, counts = prompt + rest, [False] * len(prompt) + [True] * len(rest)
    else:
        assert example.text is not None
        ids = tokenizer.encode(example.text) + _end(tokenizer)
        counts = [True] * len(ids)
    return next_token_document(example.place, ids, counts)


def next_token_document(place: str, ids: Sequence[int], counts: Sequence[bool]) -> Document:
    """Each token predicts the next one, and counts where that one does."""
    if len(ids) < 2:
        raise ValueError(f"{place}: has {len(ids)} tokens; there is nothing to predict")
    array = np.array(ids, np.int32)
    weights = np.array(counts[1:], np.float32)
    if not weights.any():
        raise ValueError(f"{place}: no token of it counts; the assistant's messages are empty")
    return Document(place, array[:-1], array[1:], weights)


def _end(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.eos_token_ids[:1])


def _conversation(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    messages = example.messages or []
    try:
        whole = _ids(tokenizer, messages, answering=False)
        counts = [False] * len(whole)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                _count_turn(whole, counts, messages[: i + 1], tokenizer)
    except ValueError as error:
        raise ValueError(f"{example.place}: {error}") from None
    return whole, counts


def _count_turn(whole: list[int], counts: list[bool], messages: list[dict], tokenizer: Tokenizer) -> None:
    """Mark the last message of these: from where an answer would begin to its end of turn."""
    begin = _common(_ids(tokenizer, messages[:-1], answering=True), whole)
    upto = _ids(tokenizer, messages, answering=False)
    end = _common(upto, whole)
    if end < len(upto) - 2 or begin >= end:  # a closing token or newline may be written otherwise at the very end
        raise ValueError(
            f"the chat template writes message {len(messages)} otherwise when more follow; end the conversation there"
        )
    ends = [i for i in range(begin, end) if whole[i] in tokenizer.eos_token_ids]
    end = ends[-1] + 1 if ends else end
    counts[begin:end] = [True] * (end - begin)


def _ids(tokenizer: Tokenizer, messages: list[dict], *, answering: bool) -> list[int]:
    return tokenizer.chat_prompt(messages, add_generation_prompt=answering)["prompt_token_ids"]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def label_document(example: Example, tokenizer: Tokenizer, labels: Mapping[str, int]) -> Document:
    """A text whose last token predicts its label. Raises ValueError that names its place."""
    if example.text is None or example.label is None:
        raise ValueError(f"{example.place}: classification needs a text and a label")
    if example.label not in labels:
        raise ValueError(f"{example.place}: label {example.label!r} is not among {', '.join(labels)}")
    ids = tokenizer.encode(example.text)
    if not ids:
        raise ValueError(f"{example.place}: the text has no tokens")
    targets, weights = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.float32)
    targets[-1], weights[-1] = labels[example.label], 1.0
    return Document(example.place, np.array(ids, np.int32), targets, weights)


def share_counted(documents: Iterable[Document]) -> float:
    """Of all tokens, the share that counts."""
    sums = np.sum([(document.weights.sum(), len(document.weights)) for document in documents], axis=0)
    return float(sums[0] / sums[1])
